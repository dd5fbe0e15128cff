"""Tests, in the layout of the tree they test."""

from tests import typecheck as typecheck  # pytest names it as tests.typecheck
