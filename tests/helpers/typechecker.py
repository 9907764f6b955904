"""The run-time type checker of the tests: beartype, which accepts an int as a float, as mypy does."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
