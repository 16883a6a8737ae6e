"""Parameters of a test of which some run every time, the others with --long."""

from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")


def long_except(always: Iterable[T], cases: Iterable[T]) -> list:
    """The cases, those that are not in `always` marked `long`."""
    return [c if c in always else pytest.param(c, marks=pytest.mark.long) for c in cases]
