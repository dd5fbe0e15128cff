"""Does every mixer work in every place of every topology? Parts of experiments.matrix: cells, tasks, runs, records."""
