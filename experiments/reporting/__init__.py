"""The parts of experiments.tables: cells with intervals, text forms, plots, the page."""
