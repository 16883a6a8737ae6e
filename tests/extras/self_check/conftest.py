"""The check runs on every backend, as kernels do."""

from backends import backend, native_level, pytest_collection_modifyitems, seeded_and_poisoned

__all__ = ["backend", "native_level", "pytest_collection_modifyitems", "seeded_and_poisoned"]
