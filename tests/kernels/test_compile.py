"""torch.compile traces every public op whole; each op's schema and fake match the op."""

import pytest
import torch
from state_pages import SMALL, Layer, Pool, Step

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.causal_conv1d import causal_conv1d
from qwen3next_plugin.kernels.dilated_conv1d import dilated_conv1d
from qwen3next_plugin.kernels.draft_head import draft_head
from qwen3next_plugin.kernels.fused_moe import SharedExpert, fused_moe
from qwen3next_plugin.kernels.fused_moe.cpu import shared_parts
from qwen3next_plugin.kernels.gated_delta_net import (
    GatedDeltaNetShape,
    GatedDeltaNetWeights,
    Projections,
    gated_delta_net,
)
from qwen3next_plugin.kernels.gated_delta_rule import gated_delta_rule
from qwen3next_plugin.kernels.hyper_connection import HyperConnectionWeights, hyper_connection
from qwen3next_plugin.kernels.index_keys import index_keys
from qwen3next_plugin.kernels.linear import (
    PackedWeight,
    linear,
    pack_bf16,
    pack_int4,
    pack_int8,
    stack,
)
from qwen3next_plugin.kernels.linear.cpu import parts
from qwen3next_plugin.kernels.ngram_embedding import NgramHash, NgramTable, ngram_embedding
from qwen3next_plugin.kernels.norm_linear import norm_linear
from qwen3next_plugin.kernels.output_gate import output_gate
from qwen3next_plugin.kernels.paged_attention import Selection, paged_attention
from qwen3next_plugin.kernels.ple_gate import PLENorms, ple_gate
from qwen3next_plugin.kernels.qk_norm_rope import qk_norm_rope
from qwen3next_plugin.kernels.rms_norm import Unnormed, rms_norm
from qwen3next_plugin.kernels.rms_norm_gated import rms_norm_gated
from qwen3next_plugin.kernels.router import router
from qwen3next_plugin.kernels.select_blocks import select_blocks
from qwen3next_plugin.kernels.shared_expert_gate import shared_expert_gate
from qwen3next_plugin.kernels.silu_and_mul import silu_and_mul
from qwen3next_plugin.kernels.sparse_moe import sparse_moe

STEP = ("query_start_loc", "slot", "context_len")


def calls():
    """A fresh call of every public op: (op, keyword arguments)."""
    layer, step = Layer.random(SMALL), Step(((1, 0, 5), (0, 0, 2)))
    pool, x = Pool(SMALL, 2, 3), layer.projections(step.T)
    x4, w = torch.randn(3, 2, 2, 24), torch.randn(24)
    out = torch.empty(step.T, SMALL.HV * SMALL.V)
    attention = {
        "qkv": torch.randn(3, 2 * 3 * 24), "q_weight": w, "k_weight": w,
        "cos_sin": torch.randn(9, 10), "positions": torch.tensor([0, 3, 8]),
        "num_heads": 2, "num_kv_heads": 1, "head_dim": 24, "rotary_dim": 10, "eps": 1e-6,
    }  # fmt: skip
    paged = {
        "key_cache": torch.randn(5, 1, 24), "value_cache": torch.randn(5, 1, 24),
        "token_table": torch.tensor([[4, 1, 0, 2]], dtype=torch.int32),
        "table_row": torch.tensor([0]), "query_start_loc": torch.tensor([0, 3], dtype=torch.int32),
        "seq_lens": torch.tensor([4]), "scale": 0.2,
    }  # fmt: skip
    nibbles = torch.randint(0, 16, (32, 32), dtype=torch.uint8)
    int4 = pack_int4(nibbles[:, ::2], torch.rand(32, 1), nibbles[:, :1])
    int8 = pack_int8(nibbles[:, :16].view(torch.int8), torch.rand(32, 1))
    return {
        "linear": (linear, {"x": torch.randn(3, 32), "weight": int4}),
        "norm_linear": (norm_linear, {
            "x": Unnormed(torch.randn(3, 32), torch.randn(32), 1e-6, torch.randn(3, 32)),
            "weight": int4, "other": pack_bf16(torch.randn(7, 32).bfloat16()),
        }),
        "sparse_moe": (sparse_moe, {
            "x": Unnormed(torch.randn(3, 32), torch.randn(32), 1e-6, torch.randn(3, 32)),
            "router": pack_bf16(torch.randn(2, 32).bfloat16()), "top_k": 1, "renormalise": True,
            "w13": stack([int4, int4], 2), "w2": stack([int8, int8], 2),
            "shared": SharedExpert(int4, int8, torch.rand(1, 32)),
        }),
        "fused_moe_packed": (fused_moe, {
            "x": torch.randn(2, 32), "w13": stack([int4, int4], 2), "w2": stack([int8, int8], 2),
            "topk_weights": torch.rand(2, 1),
            "topk_ids": torch.tensor([[1], [0]], dtype=torch.int32),
            "shared": SharedExpert(int4, int8, torch.rand(1, 32)),
        }),
        "causal_conv1d": (causal_conv1d, {
            "q": x["q"], "k": x["k"], "v": x["v"], "weight": layer.weight,
            "pool_": pool.pages(), "step": step.bundle(),
        }),
        "gated_delta_rule": (gated_delta_rule, {
            **layer.recurrence_inputs(step.T), "A_log": layer.A_log, "dt_bias": layer.dt_bias,
            "pool_": pool.pages(), "step": step.bundle(),
        }),
        "gated_delta_net": (gated_delta_net, {
            "projections": Projections(
                torch.randn(step.T, SMALL.C + SMALL.HV * SMALL.V),
                torch.randn(step.T, 2 * SMALL.HV),
                GatedDeltaNetShape(SMALL.H, SMALL.HV, SMALL.K, SMALL.V),
            ),
            "weights": GatedDeltaNetWeights(
                layer.weight, layer.A_log, layer.dt_bias, torch.randn(SMALL.V), 1e-6
            ),
            "pool_": pool.pages(), "step": step.bundle(), "out_": out,
        }),
        "rms_norm": (rms_norm, {"x": x4[0, 0], "weight": w, "eps": 1e-6}),
        "add_rms_norm": (rms_norm, {
            "x": x4[0, 0], "weight": w, "eps": 1e-6, "residual_": x4[0, 1].clone(),
        }),
        "rms_norm_gated": (rms_norm_gated, {
            "x": x4, "z": x4 + 1, "weight": w, "eps": 1e-6, "sigmoid_gate": True,
        }),
        "qk_norm_rope": (qk_norm_rope, attention),
        "output_gate": (output_gate, {"x_": x4[0].clone(), "gate": x4[1]}),
        "router": (router, {"logits": x4[:, 0, 0], "top_k": 5, "renormalise": True}),
        "shared_expert_gate": (shared_expert_gate, {
            "x": x4[0, 0], "weight": w[None], "shared_": x4[0, 1].clone(),
        }),
        "add_shared_expert_gate": (shared_expert_gate, {
            "x": x4[0, 0], "weight": w[None], "shared_": x4[0, 1].clone(), "routed": x4[1, 0],
        }),
        "silu_and_mul": (silu_and_mul, {"x": x4[0, 0]}),
        "paged_attention": (paged_attention, {**paged, "q": x4[:, 0]}),
        "tree_paged_attention": (paged_attention, {
            **paged, "q": x4[:, 1], "tree_mask": torch.ones(9).bool(),
        }),
        "selected_paged_attention": (paged_attention, {
            **paged, "q": x4[:, 1],
            "selection": Selection(
                torch.tensor([[0], [-1], [0]], dtype=torch.int32),
                torch.tensor([2, 0, 3], dtype=torch.int32), 2,
            ),
        }),
        **of_qwen4_exp(pool, step),
        "draft_head": (draft_head, {
            "x": x4[0, 0], "weight": torch.randint(-127, 128, (9, 24), dtype=torch.int8),
            "scale": torch.rand(9), "token_ids": torch.tensor([4, 0, 8], dtype=torch.int32),
        }),
    }  # fmt: skip


def of_qwen4_exp(pool: Pool, step: Step):
    """Calls of the ops that only this model has."""
    T, rows, (hc, D) = step.T, step.bundle(), (2, 32)
    x, injection = torch.randn(T, 4, hc * D).unbind(1), torch.rand(T, hc)
    streams = {"streams_": torch.randn(T, hc, D), "block": x[0][:, :D], "injection": injection}
    bf16 = pack_int8(torch.randint(-9, 9, (16, hc * D), dtype=torch.int8), torch.rand(16, 1))
    up = pack_int8(torch.randint(-9, 9, (hc * D, 16), dtype=torch.int8), torch.rand(hc * D, 1))
    norm, inject = torch.randn(hc * D), torch.randn(hc, hc * D)
    sequences = {
        "token_table": torch.tensor([[4, 1, 0, 2]], dtype=torch.int32),
        "table_row": torch.tensor([0]), "query_start_loc": torch.tensor([0, 3], dtype=torch.int32),
        "seq_lens": torch.tensor([4]), "block_size": 2,
    }  # fmt: skip
    return {
        "hyper_connection": (hyper_connection, {
            **copied(streams), "eps": 1e-6, "weights": HyperConnectionWeights(
                norm, torch.randn(7, hc * D), torch.randn(hc * D, 7), None
            ),
        }),
        "hyper_connection_packed": (hyper_connection, {
            **copied(streams), "eps": 1e-6,
            "weights": HyperConnectionWeights(norm, bf16, up, inject),
        }),
        "ple_gate": (ple_gate, {
            **copied(streams), "keys": x[1], "values": x[2][:, :D], "eps": 1e-6,
            "norms": PLENorms(norm, norm, norm),
        }),
        "dilated_conv1d": (dilated_conv1d, {
            "x": x[3], "weight": torch.randn(hc * D, 4), "dilation": 2,
            "conv_": torch.randn(2, 10, hc * D), "span": pool.span_, "step": rows,
        }),
        "ngram_embedding": (ngram_embedding, {
            "token_ids": torch.arange(T), "table": NgramTable.of([torch.randn(9, 5)], mapped=False),
            "hashing": NgramHash(
                torch.tensor([3, 5]), torch.tensor([4, 5]), torch.tensor([0, 4]), 2
            ),
            "tokens_": torch.zeros(2, 5, dtype=torch.int32), "span": pool.span_, "step": rows,
            "out_dtype": torch.bfloat16,
        }),
        "index_keys": (index_keys, {
            "qk": torch.randn(3, 72), "q_weight": torch.randn(24), "k_weight": torch.randn(24),
            "cos_sin": torch.randn(9, 10), "positions": torch.tensor([0, 3, 8]),
            "block_positions": torch.tensor([0, 2, 8]), "key_cache_": torch.randn(5, 24),
            "block_cache_": torch.randn(5, 24), **sequences, "eps": 1e-6,
        }),
        "select_blocks": (select_blocks, {
            "q": torch.randn(3, 2, 24), "block_cache": torch.randn(5, 24), **sequences, "top_k": 1,
        }),
    }  # fmt: skip


def tensors(*trees):
    return [
        leaf for leaf in torch.utils._pytree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)
    ]


def copied(tree):
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, tree)


@pytest.mark.parametrize("name", calls())
def test_traced_whole(monkeypatch, name):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "cpu")
    op, arguments = calls()[name]
    again = copied(arguments)
    torch.compiler.reset()  # or the ops before count as recompilations of this one
    traced = torch.compile(lambda **given: op(**given), fullgraph=True, backend="aot_eager")
    for ours, expected in zip(
        tensors(traced(**again), again), tensors(op(**arguments), arguments), strict=True
    ):
        assert torch.equal(ours.nan_to_num(7), expected.nan_to_num(7))


def flat(arguments):
    """The arguments under the names that the torch op's schema has for them."""
    if isinstance(x := arguments.get("x"), Unnormed):
        norm = {"norm": x.weight, "eps": x.eps, "residual_": x.residual_}
        arguments = {**arguments, "x": x.x, **norm}
    named = {"router": "router_{}", "weight": "{}", "other": "{}2", "w13": "{}13", "w2": "{}2"}
    for name, pattern in named.items():
        if isinstance(w := arguments.get(name), PackedWeight):
            fields = map(pattern.format, ("packed", "scale", "zero", "encoding", "group"))
            of_linear = {"N2": w.shape[0]} if name == "other" else {"N": w.shape[-2]}
            sizes = of_linear | {"I": w.shape[-1]}  # of w2, which comes last
            arguments = {**arguments, **dict(zip(fields, parts(w), strict=True)), **sizes}
    if shared := arguments.get("shared"):
        schema = torch.ops.qwen3next.fused_moe_packed.default._schema
        names = [argument.name for argument in schema.arguments]
        last = names[names.index("gate") :]
        arguments = {**arguments, **dict(zip(last, shared_parts(shared), strict=True))}
    if "streams_" in arguments:
        return {**arguments, **flat_streams(arguments)}
    if isinstance(selection := arguments.get("selection"), Selection):
        arguments = {**arguments, **selection._asdict()}
    elif "key_cache" in arguments:
        arguments = {**arguments, "block_size": 1}
    if isinstance(table := arguments.get("table"), NgramTable):
        hashing = arguments["hashing"]._asdict()
        where = {"rows": table.shape[0], "d": table.shape[1], "stored": table.dtype}
        stored = {name: getattr(table, name) for name in table.__slots__}
        arguments = {**arguments, **hashing, **stored, **where}
    if weights := arguments.get("weights"):
        projections = arguments["projections"]
        sizes = {"H": SMALL.H, "HV": SMALL.HV, "K": SMALL.K, "V": SMALL.V, "flat": False}
        of_layer = weights._asdict() | projections._asdict() | sizes
        arguments = {**arguments, **of_layer, "weight": weights.conv}
    pool, step = arguments.get("pool_"), arguments.get("step")
    if step is None:
        return arguments
    arguments = {**arguments, **{name: getattr(step, name) for name in STEP}}
    if pool is None:
        return arguments
    pages = {f"{name}_": page for name, page in pool._asdict().items()} | {"span": pool.span}
    return {**arguments, **pages}


def flat_streams(arguments):
    """Those of the ops on streams: norms, or weights of which two are packed."""
    if norms := arguments.get("norms"):
        return {f"{name}_norm": norm for name, norm in norms._asdict().items()}
    flat = arguments["weights"]._asdict()
    for name in ("down", "up"):
        if isinstance(weight := flat[name], PackedWeight):
            suffixes = ("", "_scale", "_zero", "_encoding", "_group")
            flat |= {f"{name}{s}": part for s, part in zip(suffixes, parts(weight), strict=True)}
            flat["L"] = weight.shape[1]  # of up, which comes last
    return flat


@pytest.mark.parametrize("name", calls())
def test_schema_and_fake(monkeypatch, name):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "cpu")
    dispatch.load("cpu")  # the fakes
    _, arguments = calls()[name]
    native_op = getattr(
        torch.ops.qwen3next,
        name.removeprefix("add_").removeprefix("tree_").removeprefix("selected_"),
    ).default
    order = [argument.name for argument in native_op._schema.arguments]
    given = tuple(flat(arguments).get(argument) for argument in order)
    tests = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(native_op, given, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize("of_engine", [False, True])
def test_ops_traced_together(monkeypatch, of_engine):
    """A graph may hold several ops, none of which has run before; an engine has loaded them all."""
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "cpu")
    monkeypatch.setattr(dispatch, "_LOADED", {})
    if of_engine:
        dispatch.load("cpu")
    x, w = torch.randn(3, 8), torch.randn(8)

    def layer(x):
        y = rms_norm(x=x, weight=w, eps=1e-6)
        z = y.view(3, 1, 1, 8)
        return rms_norm_gated(x=z, z=z, weight=w, eps=1e-6)

    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
