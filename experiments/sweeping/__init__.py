"""The parts of experiments.sweep: jobs, their ledger, their workers, the display."""
