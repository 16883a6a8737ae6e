"""Every transformers has what our classes override and read; its sources are not imported."""

import ast
from pathlib import Path

import pytest

from engines.contract import Sources, check_entry, definition, host, kept, other_hosts, pairs

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[3]
OTHERS = [str(path.parent) for path in sorted(ROOT.glob(".transformers/*/.installed"))]
MODELS = {
    "models/qwen3_next/modeling_qwen3_next.py": ("Qwen3Next", "Qwen3NextModel"),
    "models/qwen3_5/modeling_qwen3_5.py": ("Qwen3_5", "Qwen3_5TextModel"),
    "models/qwen3_5_moe/modeling_qwen3_5_moe.py": ("Qwen3_5Moe", "Qwen3_5MoeTextModel"),
}
# What ours reads of a linear layer, besides its input projections.
LAYER = {
    *("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "layer_idx"),
    *("conv1d", "A_log", "dt_bias", "norm", "layer_norm_epsilon", "out_proj"),
}
PROJECTIONS = {
    "Qwen3Next": {"in_proj_qkvz", "in_proj_ba"},
    "Qwen3_5": {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"},
    "Qwen3_5Moe": {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"},
}
CACHES = {
    "CacheLayerMixin": {"keys", "values", "is_initialized"},
    "Cache": {"layers"},
}


@pytest.fixture(scope="module", params=["installed", *OTHERS, *other_hosts("transformers")])
def sources(request) -> Sources:
    return host("transformers", request.param)


def test_what_is_overridden_is_there(sources):
    from qwen3next_plugin.engines.transformers.patches import TABLE

    assert TABLE
    for entry in TABLE:
        check_entry(sources, entry)


@pytest.mark.parametrize("file", MODELS)
def test_a_model_has_what_ours_reads(sources, file):
    name, model = MODELS[file]
    layer = definition(sources.tree(file), f"{name}GatedDeltaNet")
    assert LAYER | PROJECTIONS[name] <= kept(layer)
    assert {"layers", "norm", "rotary_emb", "embed_tokens"} <= kept(
        definition(sources.tree(file), model)
    )
    # A mask of our own for each kind of layer.
    assert "attention_mask), dict)" in ast.unparse(definition(sources.tree(file), model))


@pytest.mark.parametrize(("owner", "name"), pairs(CACHES))
def test_a_cache_keeps_what_ours_reads(sources, owner, name):
    assert name in kept(definition(sources.tree("cache_utils.py"), owner))


def test_classes_are_registered_where_the_host_looks(sources):
    mapping = definition(sources.tree("models/auto/auto_factory.py"), "_LazyAutoMapping")
    assert "if key in self._extra_content:" in ast.unparse(mapping)
