"""Experts with packed weights against their equation; the same bits in any batch."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from test_linear import KINDS, packed

from qwen3next_plugin.kernels.fused_moe import SharedExpert, fused_moe, reference
from qwen3next_plugin.kernels.linear import stack, unpack
from tolerances import assert_close

T, D, E, I, S, k = 33, 256, 5, 128, 176, 3  # noqa: E741, the field's letters


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


def shared_expert(kind, dtype, S=S):
    """One whose second weight has another format."""
    other = "bf16" if kind == "int8" else "int8"
    w13, w2 = packed(kind, 2 * S, D)[0], packed(other, D, S)[0]
    return SharedExpert(w13, w2, torch.randn(1, D).to(dtype) / 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_reference(native_level, kind, dtype):
    for T in (1, 33):
        arguments = inputs(kind, dtype, T)
        out = fused_moe(**arguments)
        assert out.dtype == dtype
        assert_close("fused_moe", dtype, out, reference.run(**arguments))


@cache  # the reference takes longer than all backends
def with_shared_expert(kind, dtype) -> list[tuple[dict, torch.Tensor]]:
    """Arguments for 1, 33 and 300 tokens, the last in two runs, and what the reference returns."""
    batches = ((1, torch.float32), (33, dtype), (300, dtype))
    given = [inputs(kind, dtype, T) | {"shared": shared_expert(kind, W)} for T, W in batches]
    return [(arguments, reference.run(**arguments)) for arguments in given]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shared_expert_against_the_reference(native_level, kind, dtype):
    for arguments, expected in with_shared_expert(kind, dtype):
        assert_close("fused_moe", dtype, fused_moe(**arguments), expected)


def test_shared_expert_is_an_expert(cpu_backend):
    """It adds what an expert of all tokens, whose weight is the gate, adds."""
    arguments = inputs("int4-fp16", torch.float32)
    shared = shared_expert("int4-fp16", torch.float32, I)
    gates = (arguments["x"] @ shared.gate.T).sigmoid()
    alone = fused_moe(
        x=arguments["x"],
        w13=stack([shared.w13], 1),
        w2=stack([shared.w2], 1),
        topk_weights=gates,
        topk_ids=torch.zeros_like(gates, dtype=torch.int32),
    )
    both = fused_moe(**arguments, shared=shared)
    assert_close("fused_moe", torch.float32, both, fused_moe(**arguments) + alone)


def test_the_reference_is_that_of_the_unpacked_weights(monkeypatch, kind):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    arguments = inputs(kind, torch.float32)
    plain = {name: unpack(arguments[name]) for name in ("w13", "w2")}
    assert torch.equal(fused_moe(**arguments), fused_moe(**arguments | plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_tokens_share_the_batch(native_level, kind, dtype):
    """A token's result is the same bits alone, in any batch, and on one thread."""
    arguments = inputs(kind, dtype, 300) | {"shared": shared_expert(kind, dtype)}
    whole = fused_moe(**arguments)
    per_token = ("x", "topk_weights", "topk_ids")
    for begin, end in ((0, 1), (7, 9), (7, 12), (10, 43), (250, 300)):
        part = {name: t[begin:end] for name, t in arguments.items() if name in per_token}
        assert torch.equal(fused_moe(**arguments | part), whole[begin:end])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(fused_moe(**arguments), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_route_to_no_expert_adds_nothing(cpu_backend, kind):
    """The others are as with weight 0; no expert runs for it, as expert 0 gives NaN.

    Their bits, too, but for the reference's, whose products depend on how many tokens there are.
    """
    near = {"rtol": 2**-7, "atol": 1e-3} if cpu_backend == "reference" else {"rtol": 0, "atol": 0}
    arguments = inputs(kind, torch.bfloat16)  # none has expert 0
    alone = {"shared": shared_expert(kind, torch.bfloat16)}
    none = torch.rand(T, k) < 0.5
    none[7] = True
    weights, ids = arguments["topk_weights"], arguments["topk_ids"]
    arguments["topk_weights"] = weights.masked_fill(none, 0)
    expected, beside = fused_moe(**arguments), fused_moe(**arguments | alone)
    for weight in (arguments["w13"], arguments["w2"]):
        for tensor in weight.tensors.values():
            tensor[0].view(torch.uint8).fill_(255)
        assert unpack(weight)[0].isnan().any()
    arguments |= {"topk_weights": weights, "topk_ids": ids.masked_fill(none, -1)}
    torch.testing.assert_close(fused_moe(**arguments), expected, **near)
    torch.testing.assert_close(fused_moe(**arguments, **alone), beside, **near)
    arguments["topk_ids"] = torch.full_like(ids, -1)
    assert not fused_moe(**arguments).any()
    torch.testing.assert_close(fused_moe(**arguments, **alone)[7], beside[7], **near)


def test_no_tokens(cpu_backend, kind):
    arguments = inputs(kind, torch.float32, 0)
    assert fused_moe(**arguments).shape == (0, D)
    shared = shared_expert(kind, torch.float32)
    assert fused_moe(**arguments, shared=shared).shape == (0, D)


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
    shared = shared_expert("int8", torch.bfloat16)
    plain = {"w13": unpack(w13).bfloat16(), "w2": unpack(w2).bfloat16()}
    for more, bad, complaint in (
        (plain, {}, "shared is packed, the other weights are not"),
        ({}, {"w2": packed("int8", D, I)[0]}, r"shared\.w13 has shape"),
        ({}, {"w13": odd[0]}, r"shared\.w13 has shape"),
        ({}, {"w2": w2}, r"shared\.w2 has shape"),
        ({}, {"gate": shared.gate[0]}, r"shared\.gate has shape"),
        ({}, {"gate": shared.gate.half()}, r"shared\.gate is torch.float16"),
        ({}, {"w13": packed("int8", 40, D)[0], "w2": packed("int8", D, 20)[0]},
         "the shared expert has 20 inner features, no multiple of 16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"fused_moe: .*{complaint}"):
            fused_moe(**arguments | more, shared=shared._replace(**bad))
    arguments["topk_ids"][2, 1] = E
    with pytest.raises(RuntimeError, match=rf"topk_ids\[2, 1\] = {E} is not one of {E} experts"):
        fused_moe(**arguments)
