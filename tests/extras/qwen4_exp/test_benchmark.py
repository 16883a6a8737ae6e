"""The benchmark of Qwen3.8-Flash-Next: engines load its models, and wrong results are red."""

import pytest
import torch

from benchmarks.full.limits import step_bytes
from benchmarks.qwen4 import measure, model, sparse
from benchmarks.report import RedCheckError, Run
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.extras.qwen4_exp.ple import open_table
from qwen3next_plugin.kernels.paged_attention import paged_attention
from qwen3next_plugin.model.checkpoint.reading import check_stored
from qwen3next_plugin.model.quantisation.files import formats_of
from released import read_with

SMALL = {
    "vocab_size": 12 * 512,
    "hidden_size": 256,
    "num_attention_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "hc_lowrank": 32,
    "ple_embed_dim": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}


@pytest.fixture
def small(monkeypatch):
    """The released config with small layers and tables."""
    monkeypatch.setattr(model, "read_config", read_with(SMALL))
    monkeypatch.setattr(model, "EXPERTS", 16)
    monkeypatch.setattr(model, "ROWS", {"int4": 50, "bf16": 50, "large": 500})


def test_models_are_what_engines_load(small, tmp_path):
    for form in ("large", "bf16", "int4"):
        folder = model.model(tmp_path, form)
        raw = read_config(folder)
        config = Qwen3NextConfig.from_hf(raw)
        formats = None
        if form != "bf16":
            formats = formats_of(folder, config, raw["quantization_config"], asked=None)
            assert not formats.dequantised
        check_stored(folder, config, quantised=False, formats=formats, with_mtp=True)
        table = open_table(folder, config, 1)
        rows, d = table.shape
        assert 2 * rows * d == model.table_bytes(form)
        assert bool(table.take(torch.arange(rows)).count_nonzero()) == (form != "large")
        assert model.model(tmp_path, form) == folder
    both = (step_bytes(model.config_of(form), "int4", 1) for form in ("int4", "large"))
    assert len({*both}) == 1  # no step reads the table


def test_other_attention_than_the_definitions_is_red(monkeypatch):
    monkeypatch.setattr(sparse, "CONTEXT", 4096)
    layer = sparse.Layer(Qwen3NextConfig.from_hf(read_config(sparse.RELEASED / model.SIZE)))
    layer.check()
    monkeypatch.setattr(sparse, "paged_attention", lambda **given: 1.5 * paged_attention(**given))
    with pytest.raises(RedCheckError, match="not full attention"):
        layer.check()
    monkeypatch.undo()
    monkeypatch.setattr(sparse, "CONTEXT", 4096)
    other = layer.rule._replace(top_k=layer.rule.top_k - 1)
    monkeypatch.setattr(layer, "_defined", lambda: layer.sparse(other))
    with pytest.raises(RedCheckError, match="from its definition"):
        layer.check()


class Unread:
    """An engine whose memory does not grow."""

    def call(self, name, **arguments):
        return 1e9


def test_a_table_that_was_not_read_is_red(tmp_path):
    with pytest.raises(RedCheckError, match="was not read"):
        measure.table(Run(tmp_path, "qwen4", {}), Unread())
