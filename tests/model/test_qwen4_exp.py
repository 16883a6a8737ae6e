"""Qwen4-Exp's parts: the tensors that transformers has, and the table of n-grams in its files."""

import pytest
import torch

from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.reading import check_stored
from qwen3next_plugin.model.checkpoint.tensors import loaded_tensors, trunk_tensors
from qwen3next_plugin.model.ngrams import hashing
from qwen3next_plugin.model.ple import open_table
from qwen3next_plugin.model.state import PageLayout
from qwen4_exp import write_qwen4_exp


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen4_exp(tmp_path_factory.mktemp("qwen4_exp"))


@pytest.fixture(scope="module")
def config(folder) -> Qwen3NextConfig:
    return Qwen3NextConfig.from_hf(read_config(folder))


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_parameters_are_those_of_transformers(config, theirs):
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        torch.Size(shape).numel() for shape in trunk_tensors(config).values()
    )
    own = {name for name in loaded_tensors(config) if ".experts." not in name}
    assert own < {name for name, _ in theirs.named_parameters()}


def test_hashes_are_those_of_transformers(config, theirs):
    kind = type(theirs.model.layers[1].ple.ple_embedding)
    for index, i in enumerate((1, 4)):
        embedding, ours = kind(theirs.config, 128, i, index), hashing(config, i)
        assert torch.equal(ours.multipliers, embedding.layer_multipliers)
        assert torch.equal(ours.sizes, embedding.ngram_heads_vocab_sizes)
        assert torch.equal(ours.offsets, embedding.ngram_heads_offsets)
        assert ours.eos == embedding.eos_token_id


@pytest.mark.parametrize("where", ["mapped", "resident"])
def test_the_table_is_that_of_transformers(folder, config, theirs, where, monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_NGRAM", where)
    for i in (1, 4):
        table = open_table(folder, config, i)
        weight = theirs.model.layers[i].ple.ple_embedding.ngram_embedding.weight
        assert table.mapped == (where == "mapped")
        assert torch.equal(table.take(torch.arange(len(weight))), weight)


def test_a_checkpoint_that_lacks_a_part_is_refused(folder, config, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".shard_7.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    for check in (
        lambda: open_table(tmp_path, config, 1),
        lambda: check_stored(tmp_path, config, quantised=False, formats=None, with_mtp=True),
    ):
        with pytest.raises(CheckpointError, match="shard_7"):
            check()


def test_what_only_transformers_reads_may_be_there_or_not(folder, config, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.1.ple.ple_embedding."
    del tensors[f"{stem}layer_multipliers"]
    tensors["model.hyper_connection_mixer.block_inject_weight.weight"] = torch.zeros(4, 256)
    save_file(tensors, tmp_path / "model.safetensors")
    check_stored(tmp_path, config, quantised=False, formats=None, with_mtp=True)


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_page_with_n_grams(config, num_drafts):
    sizes = {
        ngrams: PageLayout.from_config(
            config,
            num_drafts=num_drafts,
            activation_dtype=torch.bfloat16,
            state_dtype=torch.float32,
            ngrams=ngrams,
        )
        for ngrams in (False, True)
    }
    plain, layout = sizes[False], sizes[True]
    more = 4 * (3 + num_drafts) + 2 * 256 * (10 + num_drafts)
    assert layout.page_bytes == plain.page_bytes + more
    pages = torch.zeros(2, -(-layout.page_bytes // 64) * 64, dtype=torch.int8)
    pool = layout.view_ngrams(pages)
    assert pool is not None
    pool.tokens.fill_(7)
    pool.conv.fill_(1)
    assert not any(part.any() for part in layout.view(pages))
    assert pool.tokens.shape == (2, 3 + num_drafts)
    assert pool.conv.shape == (2, 10 + num_drafts, 256)
    assert plain.view_ngrams(pages) is None
