"""A norm, the router and the experts in one op: the bits of its parts."""

import pytest
import torch
from test_linear import packed
from test_norm_linear import D, again, unnormed
from test_packed_moe import E, I, shared_expert

from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.kernels.linear import linear
from qwen3next_plugin.kernels.rms_norm import normed
from qwen3next_plugin.kernels.router import router
from qwen3next_plugin.kernels.sparse_moe import sparse_moe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(dtype, *, shared=True):
    return {
        "router": packed("bf16", E, D)[0],
        "w13": packed("int4-fp16", E, 2 * I, D)[0],
        "w2": packed("int8", E, D, I)[0],
        "shared": shared_expert("int4-fp16", dtype) if shared else None,
    }


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 33])
def test_as_its_parts(cpu_backend, T, dtype, renormalise, shared):
    of, given = weights(dtype, shared=shared), unnormed(T, dtype)
    for x in (given.x, given):  # a block that reads streams has no norm of its own
        apart, at_once = (again(x), again(x)) if x is given else (x, x)
        read = normed(apart)
        logits = linear(read, of["router"])
        chosen = router(logits=logits, top_k=3, renormalise=renormalise)
        wanted = fused_moe(
            x=read, w13=of["w13"], w2=of["w2"], shared=of["shared"],
            topk_weights=chosen[0], topk_ids=chosen[1],
        )  # fmt: skip
        assert torch.equal(sparse_moe(at_once, top_k=3, renormalise=renormalise, **of), wanted)
        if x is given:
            assert torch.equal(at_once.residual_, apart.residual_)


def test_refuses(cpu_backend):
    of, given = weights(torch.float32), unnormed(3, torch.float32)
    before = given.residual_.clone()
    for changes, complaint in (
        ({"top_k": 0}, "top_k = 0 of 5 experts"),
        ({"top_k": E + 1}, "top_k = 6 of 5 experts"),
        ({"router": packed("bf16", E + 1, D)[0]}, r"router has shape \(6, 256\), w13"),
        ({"w2": of["w13"]}, "w13 has shape"),
        ({"x": given._replace(residual_=before[1:])}, "residual_ has shape"),
        ({"x": given.x.double()}, r"x is torch\.float64"),
    ):
        arguments = {"x": given, "top_k": 3, "renormalise": True, **of} | changes
        with pytest.raises(ValueError, match=f"sparse_moe: .*{complaint}"):
            sparse_moe(arguments.pop("x"), **arguments)
    assert torch.equal(given.residual_, before)
