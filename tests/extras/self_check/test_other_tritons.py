"""Kernels agree under every Triton that we support."""

import pytest
from test_interpreter import VERSIONS, under


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_kernels_agree_under_another_triton(version):
    tests = "tests/extras/self_check/test_self_check.py"
    assert " passed" in under(version, "-m", "pytest", "-q", tests, "-k", "triton")
