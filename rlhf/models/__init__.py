"""Language models, the roles they play on a shared base, and what is read off their hidden states."""

from collections.abc import Iterator
from contextlib import contextmanager
