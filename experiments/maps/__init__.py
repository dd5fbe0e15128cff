"""Attention maps: captured from a model that runs, drawn as pictures and pages."""
