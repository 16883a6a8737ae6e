"""Packed weights lie in large pages, where the system has them."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from qwen3next_plugin.kernels.linear import pack_bf16
from qwen3next_plugin.model import mapped
from qwen3next_plugin.model.packed import Packed

MB = 1 << 20


def in_large_pages(tensor):
    """Bytes of the mapping with a tensor's middle that are in large pages."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    for mapping in re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
    ):
        if not mapping:
            continue
        start, end = (int(x, 16) for x in mapping.split(maxsplit=1)[0].split("-"))
        if start <= middle < end:
            return 1024 * int(re.search(r"AnonHugePages: +(\d+)", mapping)[1])
    raise AssertionError("no such mapping")


@pytest.fixture
def needs_large_pages():
    """Skips unless this system moves memory to large pages when asked."""
    page = mapped._large_page()
    if not page:
        pytest.skip("no transparent large pages here")
    room = torch.ones(4 * page, dtype=torch.uint8)
    start = -(-room.data_ptr() // page) * page
    if ctypes.CDLL(None).madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(page), mapped.MADV_COLLAPSE
    ):
        pytest.skip("this kernel does not collapse pages")


def test_packed_weights_lie_in_large_pages(needs_large_pages):
    weight = pack_bf16(torch.randn(4096, 4096).bfloat16())
    before = weight.packed.clone()
    packed = Packed(weight)
    assert packed.packed.data_ptr() == weight.packed.data_ptr()
    assert in_large_pages(packed.packed) >= 32 * MB - 2 * mapped._large_page()
    assert torch.equal(packed.packed, before)


@pytest.mark.parametrize("enabled", ["always madvise [never]", None])
def test_no_large_pages_where_the_system_wants_none(monkeypatch, tmp_path, enabled):
    if enabled:
        (tmp_path / "enabled").write_text(enabled)
        (tmp_path / "hpage_pmd_size").write_text("2097152")
    monkeypatch.setattr(mapped, "LARGE_PAGES", tmp_path)
    monkeypatch.setattr(mapped, "_advise", lambda *_: pytest.fail("was advised"))
    mapped._large_page.cache_clear()
    try:
        mapped.use_large_pages(torch.zeros(8 * MB, dtype=torch.uint8))
    finally:
        mapped._large_page.cache_clear()
