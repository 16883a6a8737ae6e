"""Experts with packed weights against their equation; the same bits in any batch."""

from dataclasses import replace

import pytest
import torch
from test_linear import KINDS, packed

from qwen3next_plugin.kernels.fused_moe import fused_moe, reference
from qwen3next_plugin.kernels.linear import unpack
from tolerances import assert_close

T, D, E, I, k = 33, 256, 5, 128, 3  # noqa: E741, the field's letters


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def inputs(kind, dtype, T=T):
    """Arguments of the op; x has gaps between its rows, expert 0 gets no token."""
    x = torch.randn(T, D + 3).to(dtype)[:, :D]
    scores = torch.randn(T, E).softmax(-1)
    scores[:, 0] = 0
    weights, ids = scores.topk(k)
    w13, w2 = packed(kind, E, 2 * I, D)[0], packed(kind, E, D, I)[0]
    return {"x": x, "w13": w13, "w2": w2, "topk_weights": weights, "topk_ids": ids.int()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_reference(native_level, kind, dtype):
    for T in (1, 33):
        arguments = inputs(kind, dtype, T)
        out = fused_moe(**arguments)
        assert out.dtype == dtype
        assert_close("fused_moe", dtype, out, reference.run(**arguments))


def test_the_reference_is_that_of_the_unpacked_weights(monkeypatch, kind):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    arguments = inputs(kind, torch.float32)
    plain = {name: unpack(arguments[name]) for name in ("w13", "w2")}
    assert torch.equal(fused_moe(**arguments), fused_moe(**arguments | plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_tokens_share_the_batch(native_level, kind, dtype):
    """A token's result is the same bits alone, in any batch, and on one thread."""
    arguments = inputs(kind, dtype)
    whole = fused_moe(**arguments)
    per_token = ("x", "topk_weights", "topk_ids")
    for begin, end in ((0, 1), (7, 9), (7, 12), (10, 33)):
        part = {name: t[begin:end] for name, t in arguments.items() if name in per_token}
        assert torch.equal(fused_moe(**arguments | part), whole[begin:end])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(fused_moe(**arguments), whole)
    finally:
        torch.set_num_threads(threads)


def test_no_tokens(cpu_backend, kind):
    assert fused_moe(**inputs(kind, torch.float32, 0)).shape == (0, D)


def test_refuses(cpu_backend):
    arguments = inputs("int8", torch.bfloat16)
    w13, w2 = arguments["w13"], arguments["w2"]
    odd = packed("int8", E, 40, D)[0], packed("int8", E, D, 20)[0]
    for bad, complaint in (
        ({"w13": unpack(w13).bfloat16()}, "w2 is packed, the other weight is not"),
        ({"w2": unpack(w2).bfloat16()}, "w13 is packed, the other weight is not"),
        ({"w2": packed("int8", D, I)[0]}, "w2 has shape"),
        ({"w13": odd[0]}, "w13 has shape"),
        ({"w13": odd[0], "w2": odd[1]}, "20 inner features, no multiple of 16"),
        ({"w13": replace(w13, scale=w13.scale[:3])}, r"w13\.scale has shape"),
    ):
        with pytest.raises(ValueError, match=f"fused_moe: .*{complaint}"):
            fused_moe(**arguments | bad)
    arguments["topk_ids"][2, 1] = E
    with pytest.raises(RuntimeError, match=rf"topk_ids\[2, 1\] = {E} is not one of {E} experts"):
        fused_moe(**arguments)
