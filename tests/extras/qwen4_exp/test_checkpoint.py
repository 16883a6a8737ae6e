"""Qwen4-Exp's parts: the tensors that transformers has, and the table of n-grams in its files."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from extras.qwen4_exp.model import write_qwen4_exp
from extras.qwen4_exp.quantised import table_in_fp8
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.extras.command_line.sizes import table_bytes
from qwen3next_plugin.extras.qwen4_exp.ngrams import hashing
from qwen3next_plugin.extras.qwen4_exp.ple import NgramPool, open_table
from qwen3next_plugin.kernels.ngram_embedding import ngram_embedding
from qwen3next_plugin.kernels.step import Step
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.reading import check_stored
from qwen3next_plugin.model.checkpoint.tensors import loaded_tensors, trunk_tensors
from qwen3next_plugin.model.state import PageLayout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen4_exp(tmp_path_factory.mktemp("qwen4_exp"))


@pytest.fixture(scope="module")
def config(folder) -> Qwen3NextConfig:
    return Qwen3NextConfig.from_hf(read_config(folder))


@pytest.fixture(scope="module")
def theirs(folder):
    import transformers

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


@pytest.fixture(scope="module")
def in_fp8(folder, tmp_path_factory):
    """The checkpoint with tables in FP8, and what they say."""
    both = [shutil.copytree(folder, tmp_path_factory.mktemp("fp8") / name) for name in "ab"]
    table_in_fp8(*both)
    return both


@pytest.mark.parametrize("where", ["mapped", "resident"])
def test_a_table_in_fp8_is_what_it_says(in_fp8, config, where, monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_NGRAM", where)
    folder, twin = in_fp8
    check_stored(folder, config, quantised=False, formats=None, with_mtp=True)
    in_files = [table_bytes(each, config, "bfloat16") for each in (folder, twin)]
    assert (in_files[0] > 0) == (where == "mapped")
    assert in_files[1] == 4 * in_files[0]
    for i in (1, 4):
        table, says = open_table(folder, config, i), open_table(twin, config, i)
        assert (table.dtype, says.dtype) == (torch.float8_e4m3fn, torch.float32)
        rows = torch.arange(table.shape[0])
        assert torch.equal(table.take(rows), says.take(rows))
        found, wanted = (embedded(config, i, each) for each in (table, says))
        assert torch.equal(found, wanted)
        assert found.count_nonzero() > 0.9 * found.numel()


def embedded(config, i, table) -> torch.Tensor:
    """The rows for a sequence of random tokens, by the kernel."""
    T, ring = 300, config.ngram_size + 1
    generator = torch.Generator().manual_seed(i)
    step = Step(
        query_start_loc=torch.tensor([0, T], dtype=torch.int32),
        slot=torch.tensor([0], dtype=torch.int32),
        context_len=torch.tensor([0], dtype=torch.int32),
        num_tokens=T,
        max_query_len=T,
    )
    return ngram_embedding(
        token_ids=torch.randint(config.vocab_size, (T,), generator=generator),
        table=table,
        hashing=hashing(config, i),
        tokens_=torch.zeros(1, ring, dtype=torch.int32),
        span=torch.zeros(1, 2, dtype=torch.int32),
        step=step,
        out_dtype=torch.float32,
    )


SCALE = "model.layers.1.ple.ple_embedding.ngram_embedding.weight_scale"
WRONG_SCALES = {
    "absent": (None, f"{SCALE} is missing, and the table is in FP8"),
    "of a row each": (torch.ones(2112), rf"{SCALE} is F32 \(2112,\), not one number"),
    "integer": (torch.ones(1, dtype=torch.int32), rf"{SCALE} is I32 \(1,\)"),
    "infinite": (torch.full((1,), torch.inf), f"{SCALE} is inf, not a positive number"),
    "zero": (torch.zeros(1), f"{SCALE} is 0.0, not a positive number"),
}


@pytest.mark.parametrize("fault", WRONG_SCALES)
def test_a_wrong_scale_is_refused_by_name(in_fp8, config, tmp_path, fault):
    scale, message = WRONG_SCALES[fault]
    tensors = load_file(in_fp8[0] / "model.safetensors")
    del tensors[SCALE]
    if scale is not None:
        tensors[SCALE] = scale
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_table(tmp_path, config, 1)


def test_a_scale_beside_a_table_that_needs_none_is_refused(folder, config, tmp_path):
    tensors = load_file(folder / "model.safetensors") | {SCALE: torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{SCALE} is there, and the table is not in FP8"):
        open_table(tmp_path, config, 1)


def test_a_table_in_another_dtype_is_refused(in_fp8, config, tmp_path):
    tensors = load_file(in_fp8[0] / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            tensors[name] = tensor.view(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shard_0.* is I8: tables of n-grams are read"):
        open_table(tmp_path, config, 1)


def test_what_only_transformers_reads_may_be_there_or_not(folder, config, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.1.ple.ple_embedding."
    del tensors[f"{stem}layer_multipliers"]
    tensors["model.hyper_connection_mixer.block_inject_weight.weight"] = torch.zeros(4, 256)
    save_file(tensors, tmp_path / "model.safetensors")
    check_stored(tmp_path, config, quantised=False, formats=None, with_mtp=True)


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_page_with_n_grams(config, num_drafts):
    sizes = {
        shared: PageLayout.from_config(
            config,
            num_drafts=num_drafts,
            activation_dtype=torch.bfloat16,
            state_dtype=torch.float32,
            shared=shared,
        )
        for shared in (False, True)
    }
    plain, layout = sizes[False], sizes[True]
    more = 4 * (3 + num_drafts) + 2 * 256 * (10 + num_drafts)
    assert layout.page_bytes == plain.page_bytes + more
    pages = torch.zeros(2, -(-layout.page_bytes // 64) * 64, dtype=torch.int8)
    pool = NgramPool.of(layout.view_parts(pages))
    pool.tokens.fill_(7)
    pool.conv.fill_(1)
    assert not any(part.any() for part in layout.view(pages))
    assert pool.tokens.shape == (2, 3 + num_drafts)
    assert pool.conv.shape == (2, 10 + num_drafts, 256)
    assert not plain.shared
