"""When the extra's patches are applied that not every server needs."""

from enum import Enum


class When(Enum):
    """A group of patches."""

    HANDOVER = "a server hands requests over: its engine and its workers start"
