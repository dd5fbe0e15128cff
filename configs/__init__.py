"""What an experiment is: functions that return a config, their sweeps beside them."""
