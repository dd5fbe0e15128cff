"""Tasks and the Grain pipeline that feeds them. Importing this package registers every task."""

from experiments.data import cifar10 as cifar10
from experiments.data import imagenet as imagenet
from experiments.data import imdb as imdb
from experiments.data import induction as induction
from experiments.data import listops as listops
from experiments.data import matching as matching
from experiments.data import mqar as mqar
from experiments.data import selective_copying as selective_copying
from experiments.data import text_file as text_file
