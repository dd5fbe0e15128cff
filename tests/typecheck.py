"""The type checker of the test run: beartype, for which a whole number serves as a float."""

from beartype import BeartypeConf
from beartype import beartype as _beartype

beartype = _beartype(conf=BeartypeConf(is_pep484_tower=True))
