"""Tasks and the Grain pipeline that feeds them. Importing this package registers every task."""

from experiments.data import listops as listops
