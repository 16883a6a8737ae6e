"""Every transformers has what our classes override and read; its sources are not imported."""

import ast
from pathlib import Path

import pytest

from engines.contract import (
    Sources,
    changes,
    check_entry,
    definition,
    host,
    kept,
    other_hosts,
    pairs,
)
from engines.patch_lists import check_generated

ROOT = Path(__file__).parents[3]
OTHERS = [str(path.parent) for path in sorted(ROOT.glob(".transformers/*/.installed"))]
MODELS = {
    "models/qwen3_next/modeling_qwen3_next.py": ("Qwen3Next", "Qwen3NextModel"),
    "models/qwen3_5/modeling_qwen3_5.py": ("Qwen3_5", "Qwen3_5TextModel"),
    "models/qwen3_5_moe/modeling_qwen3_5_moe.py": ("Qwen3_5Moe", "Qwen3_5MoeTextModel"),
    "models/qwen4_exp/modeling_qwen4_exp.py": ("Qwen4ExpText", "Qwen4ExpTextModel"),
}
LAST = {"Qwen4ExpText": "hyper_connection_mixer"}  # where it is no norm
# What ours reads of a linear layer, besides its input projections.
LAYER = {
    *("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "layer_idx"),
    *("conv1d", "A_log", "dt_bias", "norm", "layer_norm_epsilon", "out_proj"),
}
PROJECTIONS = {
    "Qwen3Next": {"in_proj_qkvz", "in_proj_ba"},
    "Qwen3_5": {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"},
    "Qwen3_5Moe": {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"},
    "Qwen4ExpText": {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"},
}
CACHES = {
    "CacheLayerMixin": {"keys", "values", "is_initialized"},
    "LinearAttentionCacheLayerMixin": {"conv_states", "conv_kernel_size", "has_previous_state"},
    "Cache": {"layers"},
}
# What Qwen4-Exp calls of our cache, by the class that calls it.
CALLED = {
    "NGramEmbedding": "state_idx=2, conv_kernel_size=self.context_len",
    "PLELayer": "state_idx=1, conv_kernel_size=self.short_conv_state_len",
    "QSAIndexer": ".update_indexer(raw_keys, self.layer_idx)",
    "Model": "position_ids = torch.cat([",
}


@pytest.fixture(scope="module", params=["installed", *OTHERS, *other_hosts("transformers")])
def sources(request) -> Sources:
    return host("transformers", request.param)


def test_what_is_overridden_is_there(sources):
    entries = changes("transformers")
    assert len(entries) > 5
    check_generated("transformers")
    for entry in entries:
        check_entry(sources, entry)


@pytest.mark.parametrize("file", MODELS)
def test_a_model_has_what_ours_reads(sources, file):
    name, model = MODELS[file]
    layer = definition(sources.tree(file), f"{name}GatedDeltaNet")
    assert LAYER | PROJECTIONS[name] <= kept(layer)
    last = LAST.get(name, "norm")
    assert {"layers", last, "rotary_emb", "embed_tokens"} <= kept(
        definition(sources.tree(file), model)
    )
    assert "activation" in kept(definition(sources.tree(file), f"{name}RMSNormGated"))
    # A mask of our own for each kind of layer.
    assert "attention_mask), dict)" in ast.unparse(definition(sources.tree(file), model))


@pytest.mark.parametrize(("owner", "name"), pairs(CACHES))
def test_a_cache_keeps_what_ours_reads(sources, owner, name):
    assert name in kept(definition(sources.tree("cache_utils.py"), owner))


@pytest.mark.parametrize("part", CALLED)
def test_qwen4_exp_calls_the_cache_as_ours_takes_it(sources, part):
    tree = sources.tree("models/qwen4_exp/modeling_qwen4_exp.py")
    assert CALLED[part] in ast.unparse(definition(tree, f"Qwen4ExpText{part}"))


def test_classes_are_registered_where_the_host_looks(sources):
    mapping = definition(sources.tree("models/auto/auto_factory.py"), "_LazyAutoMapping")
    assert "if key in self._extra_content:" in ast.unparse(mapping)


def test_the_kinds_of_models_are_there(sources):
    from qwen3next_plugin.engines.transformers.plugin import models

    assert models().keys() <= sources.names("models/auto/auto_mappings.py")
