"""What a run is: data, training, evaluation, plan, sweep, tables."""
