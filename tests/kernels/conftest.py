"""Every kernel test runs on every backend."""

from backends import (
    backend,
    bits_level,
    cpu_backend,
    few,
    native_level,
    pytest_collection_modifyitems,
    seeded_and_poisoned,
    split_rows,
)

__all__ = [
    "backend",
    "bits_level",
    "cpu_backend",
    "few",
    "native_level",
    "pytest_collection_modifyitems",
    "seeded_and_poisoned",
    "split_rows",
]
