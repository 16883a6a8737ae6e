"""Packed checkpoints: what is written is what loading the source makes, and damage is named."""

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints import write_checkpoint
from damage import SLIGHT, slightly_changed
from examples.qwen3_5_layout import rewrite
from model.packed import check, check_packed, load, opened, stored
from quantised import AT_LOAD, KINDS, MIXED, pack_checkpoint, quantise, write_quantised
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.extras.command_line.sizes import tensor_bytes
from qwen3next_plugin.extras.pack import writing
from qwen3next_plugin.extras.pack.writing import plan_packing, write_packed
from qwen3next_plugin.model.checkpoint import contents
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.headers import INDEX, read_places, weight_files
from qwen3next_plugin.model.quantisation.files import formats_of
from qwen3next_plugin.model.quantisation.in_panels import check_in_panels
from qwen3next_plugin.model.quantisation.layers import LinearMethod, Ranks
from qwen3next_plugin.model.quantisation.original import RECORD

# Two blocks of columns, the second one not full.
SMALL = {"hidden_size": 160, "num_hidden_layers": 4, "num_experts": 3}
FLAT = {"wrapped, experts in one": (True, True), "text, experts apart": (False, False)}
QKVZ = "model.layers.0.linear_attn.in_proj_qkvz"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), **SMALL)


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory) -> Path:
    """With zero points in some layers, to be damaged."""
    folder = tmp_path_factory.mktemp("packed")
    return pack_checkpoint(write_quantised(plain, folder, MIXED)[0], folder / "out")


@pytest.mark.parametrize("kind", [*KINDS, MIXED, *AT_LOAD])
def test_what_is_written_are_the_dequantised_weights(plain, tmp_path, kind):
    quantised, env, twin = quantise(plain, tmp_path, kind)
    out = pack_checkpoint(quantised, tmp_path / "out", env.get("QWEN3NEXT_QUANTISE"))
    check(out, twin)
    check_packed(out)
    _, formats = opened(out)
    names = formats.weights.keys()
    assert {QKVZ, "lm_head", "mtp.layers.0.mlp.experts.w2"} <= names
    assert ("mtp.fc" in names) == (kind not in AT_LOAD)
    assert not {name for name in names if name.endswith((".gate", "embed_tokens"))}


@pytest.mark.parametrize(("wrapped", "fused"), FLAT.values(), ids=FLAT)
def test_flat_layouts_and_drafters_in_bf16(tmp_path, wrapped, fused):
    """What a drafter in bf16 reads is int8, as at load."""
    plain = write_checkpoint(
        tmp_path / "plain",
        dtype=torch.bfloat16,
        tie_word_embeddings=True,
        **SMALL | {"torch_dtype": "bfloat16"},
    )
    flat = rewrite(plain, tmp_path / "flat", wrapped=wrapped, fused=fused)
    if fused:
        out, twin = pack_checkpoint(flat, tmp_path / "out", "int8"), flat
    else:
        quantised, twin = write_quantised(flat, tmp_path, "fp8-blocks", leave_out="^mtp")
        out = pack_checkpoint(quantised, tmp_path / "out")
    check(out, twin, rounded=True)
    _, formats = opened(out)
    drafter = {n: f.encoding for n, f in formats.weights.items() if n.startswith("mtp.")}
    assert set(drafter.values()) == {"int8"}
    assert "mtp.layers.0.mlp.shared_expert.gate_up_proj" in drafter
    assert "mtp.fc" not in drafter
    tower = {name for name in stored(flat) if "visual" in name}
    assert bool(tower) == wrapped
    assert tower <= stored(out).keys()


@pytest.mark.parametrize("kind", ["gptq_zeros", "fp8-blocks"])
def test_what_an_engine_stacks_and_is_quantised_in_part_is_dequantised(plain, tmp_path, kind):
    quantised, twin = write_quantised(
        plain, tmp_path, kind, leave_out=r"q_proj|in_proj_z|experts\.1\.down"
    )
    out = pack_checkpoint(quantised, tmp_path / "out")
    _, formats = opened(out)
    assert "model.layers.3.self_attn.qkv_proj" not in formats.weights
    _, others = load(out)
    plainly = load_file(twin / "model.safetensors")
    for name in ("self_attn.k_proj.weight", "mlp.experts.0.up_proj.weight"):
        full = f"model.layers.3.{name}"
        torch.testing.assert_close(others[full], plainly[full].float(), rtol=1e-6, atol=1e-7)


def test_without_a_drafter(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", mtp=False, **SMALL)
    out = pack_checkpoint(plain, tmp_path / "out", "int4")
    assert not [name for name in stored(out) if name.startswith("mtp.")]


def test_a_head_that_stays_plain(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_HEAD", "plain")
    out = pack_checkpoint(plain, tmp_path / "out", "int8")
    _, formats = opened(out)
    assert not formats.packed_plain
    assert torch.equal(load(out)[1]["lm_head.weight"], stored(plain)["lm_head.weight"])


def test_the_files(plain, tmp_path, packed):
    """One for each layer, the drafter and the rest; aligned; whole by their index."""
    index = json.loads((packed / INDEX).read_text())
    files = weight_files(packed, None)
    assert len(files) == SMALL["num_hidden_layers"] + 2
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert {n for n, f in index["weight_map"].items() if f == path.name} == {*file.keys()}
        _, places = read_places(path)
        assert min(place.offset for place in places.values()) % 4096 == 0
        assert not any(p.offset % 64 for n, p in places.items() if n.endswith(".packed"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(packed).values())
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in packed.iterdir()}
    assert not (packed.parent / f"{packed.name}.partial").exists()
    raw = json.loads((packed / "config.json").read_text())
    del raw["quantization_config"]
    assert raw == json.loads((plain / "config.json").read_text())
    record = json.loads((packed / RECORD).read_text())
    assert record["folder"] == str(packed.parent / "quantised")
    assert "config.json" in record["files"]
    again = pack_checkpoint(packed.parent / "quantised", tmp_path / "again")
    for path in packed.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_mapped_weights_are_the_file(packed, monkeypatch):
    monkeypatch.setattr(contents, "PIECE", 1000)  # many pieces of a tensor
    in_memory, _ = load(packed)
    monkeypatch.setenv("QWEN3NEXT_MMAP", "1")
    mapped, _ = load(packed)
    assert in_memory.keys() == mapped.keys()
    for name, weight in mapped.items():
        for part, tensor in weight.tensors.items():
            assert torch.equal(tensor, in_memory[name].tensors[part])
    maps = Path("/proc/self/maps").read_text()
    assert str(packed.resolve()) in maps
    sizes = {
        id(w.packed.untyped_storage()): w.packed.untyped_storage().nbytes() for w in mapped.values()
    }
    assert max(sizes.values()) == max(path.stat().st_size for path in weight_files(packed, None))


def test_plan_counts_what_is_in_memory(packed, monkeypatch):
    config, _ = opened(packed)
    sizes, source = tensor_bytes(packed, config, "float32", asked=None)
    of_source, _ = tensor_bytes(packed.parent / "quantised", config, "float32", asked=None)
    assert sizes == of_source
    assert source.startswith("safetensors files (")
    monkeypatch.setenv("QWEN3NEXT_MMAP", "1")
    mapped, source = tensor_bytes(packed, config, "float32", asked=None)
    panels = [t for n, t in stored(packed).items() if n.endswith((".packed", ".scale", ".zero"))]
    assert opened(packed)[1].nbytes_in_panels == sum(t.nbytes for t in panels) > 0
    assert re.fullmatch(r"safetensors files \(plain .*, mapped \d\.\d\d MiB\)", source)
    assert mapped["lm_head.weight"] == mapped["model.layers.0.mlp.experts.0.up_proj.weight"] == 0
    assert mapped["model.embed_tokens.weight"] == sizes["model.embed_tokens.weight"]


def test_a_rank_holds_nothing_but_its_part(packed):
    _, formats = opened(packed)
    weight, form = load(packed)[0][QKVZ], formats.weights[QKVZ]
    method = LinearMethod(QKVZ, form)
    method.channels, method.columns = [part // 2 for part in form.parts], weight.shape[-1]
    layer = nn.Module()
    method.attach(layer, QKVZ, weight, Ranks(1, 2))
    part = layer.packed.weight
    assert part.shape == (weight.shape[0] // 2, weight.shape[1])
    for tensor in part.tensors.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    with pytest.raises(CheckpointError, match="is loaded once: restart the server"):
        method.attach(layer, QKVZ, weight, Ranks(1, 2))


# refused ------------------------------------------------------------------------------------------


def test_where_it_cannot_be_served(packed, monkeypatch):
    _, formats = opened(packed)
    check = partial(check_in_panels, say=print)
    check(formats, on_cpu=True, tp_size=2)
    check(None, on_cpu=False, tp_size=1)
    with pytest.raises(ConfigError, match="packed for CPUs; serve what it was packed from"):
        check(formats, on_cpu=False, tp_size=1)
    monkeypatch.setenv("QWEN3NEXT_MMAP", "1")
    check(formats, on_cpu=True, tp_size=1)
    with pytest.raises(ConfigError, match="MMAP=1: only a checkpoint that `qwen3next pack` wrote"):
        check(None, on_cpu=True, tp_size=1)
    with pytest.raises(ConfigError, match="MMAP=1: tensor-parallel ranks would copy"):
        check(formats, on_cpu=True, tp_size=2)


def test_what_was_packed_has_changed(plain, tmp_path):
    """Where it is still there: in contents, whatever its time says."""
    original = shutil.copytree(plain, tmp_path / "original")
    out = pack_checkpoint(original, tmp_path / "out", "int8")

    def check() -> None:
        check_in_panels(opened(out)[1], on_cpu=True, tp_size=1, say=print)

    check()
    for file in (*original.iterdir(), original):
        os.utime(file, (1, 1))
    check()
    for what in SLIGHT:
        shutil.rmtree(original)
        slightly_changed(plain, original, what)
        said = f"{out} was packed from {original}, where model.safetensors has changed since: pack"
        with pytest.raises(ConfigError, match=re.escape(said)):
            check()
    for file in plain.iterdir():
        shutil.copyfile(file, original / file.name)
    check()
    (original / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"config.json has .* or remove {out / RECORD} to serve"):
        check()
    (out / RECORD).rename(tmp_path / RECORD)
    check()
    (tmp_path / RECORD).rename(out / RECORD)
    (original / "model.safetensors").rename(original / "model-1.safetensors")
    with pytest.raises(ConfigError, match=r"where config.json has changed"):
        check()
    (original / "model-1.safetensors").unlink()  # to make room for what was packed
    check()
    for damage in ({}, {"folder": 1, "files": {}}, {"folder": "a", "files": {"b": [1]}}):
        (out / RECORD).write_text(json.dumps(damage))
        with pytest.raises(CheckpointError, match=f"{RECORD} is damaged; remove it, or pack"):
            check()


def test_what_is_packed_changes_meanwhile(plain, tmp_path):
    original = shutil.copytree(plain, tmp_path / "original")
    plan = plan_packing(original, "int8", torch.float32)
    (original / "config.json").write_text("{}")

    def change(count: int) -> None:
        (original / "config.json").write_text("{ }")

    with pytest.raises(ConfigError, match=r"config.json was written meanwhile; pack it again"):
        write_packed(plan, tmp_path / "out", change)
    assert [*tmp_path.iterdir()] == [original]


def test_a_bad_value_is_named(packed, tmp_path):
    folder = shutil.copytree(packed.parent / "quantised", tmp_path / "bad")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [n for n in tensors if n.endswith(("weight_scale", "weight_scale_inv"))][:1]:
            tensors[name] = torch.full_like(tensors[name].float(), torch.nan)
            save_file(tensors, path)
            with pytest.raises(CheckpointError, match=r"_proj.*: pack_\w+: .*; download it again"):
                pack_checkpoint(folder, tmp_path / "out")
            return
    raise AssertionError("no scale was found")


def test_what_cannot_be_packed_is_refused(plain, tmp_path, packed):
    quantised = packed.parent / "quantised"
    for folder, asked, said in (
        (plain, None, "is not quantised; add --quantise int8 or --quantise int4"),
        (quantised, "int8", "--quantise int8: .* is quantised already"),
        (packed, None, "is packed already"),
    ):
        with pytest.raises(ConfigError, match=said):
            plan_packing(folder, asked, torch.float32)
    plan = plan_packing(quantised, None, torch.float32)
    with pytest.raises(ConfigError, match="is the checkpoint itself"):
        write_packed(plan, quantised)
    with pytest.raises(ConfigError, match="is there and not an empty folder"):
        write_packed(plan, packed)
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ConfigError, match=r"partial is there: another .* or was killed"):
        write_packed(plan, tmp_path / "out")


def test_a_small_disk_is_named_before_anything_is_written(packed, tmp_path, monkeypatch):
    plan = plan_packing(packed.parent / "quantised", None, torch.float32)
    free = shutil.disk_usage(tmp_path)._replace(free=1 << 10)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: free)
    with pytest.raises(ConfigError, match=r"takes \d\.\d\d MiB, and its disk has 0\.00 MiB free"):
        write_packed(plan, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_an_interrupted_run_leaves_nothing(packed, tmp_path):
    plan = plan_packing(packed.parent / "quantised", None, torch.float32)

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_packed(plan, tmp_path / "out", interrupt)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "out").mkdir()  # an empty folder may be there
    write_packed(plan, tmp_path / "out")
    assert opened(tmp_path / "out")[1].packed_plain == {"lm_head"}


def rewritten(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a file, which keeps its length."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= size
    file.write_bytes(data[:8] + text.ljust(size) + data[8 + size :])


def described(header: dict[str, Any], said: str) -> None:
    header["__metadata__"][QKVZ] = said


def with_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def cut_short(file: Path) -> None:
    with file.open("r+b") as opened_file:
        opened_file.truncate(file.stat().st_size - 1)


DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {  # of the folder, of a file in it
    "another version": (
        lambda folder, file: with_config(
            folder, quantization_config={"quant_method": "qwen3next", "format_version": 2}
        ),
        r"packed in format 2, and this release reads 1: pack it again",
    ),
    "another shape": (
        lambda folder, file: rewritten(file, lambda h: described(h, "int4 32 8 8")),
        rf"{QKVZ} is 'int4 32 8 8', the config asks for \(256, 160\).*pack it again",
    ),
    "another encoding": (
        lambda folder, file: rewritten(file, lambda h: described(h, "int5 32 256 160")),
        rf"{QKVZ} is 'int5 32 256 160', the config asks",
    ),
    "no description": (
        lambda folder, file: rewritten(file, lambda h: described(h, "")),
        rf"{QKVZ} is '', the config asks",
    ),
    "another group": (
        lambda folder, file: rewritten(file, lambda h: described(h, "int4 32 256 160")),
        rf"{QKVZ}\.(packed|scale) is .*, where \(.*\) fits: it is damaged; pack it again",
    ),
    "a group that the encoding has not": (
        lambda folder, file: rewritten(file, lambda h: described(h, "int4 16 256 160")),
        rf"{QKVZ} is 'int4 16 256 160', the config asks",
    ),
    "another model": (
        lambda folder, file: with_config(folder, hidden_size=128),
        r"the config asks for \(.*128\): config\.json and the files do not belong together",
    ),
    "forgotten": (
        lambda folder, file: rewritten(file, lambda h: h["__metadata__"].pop(QKVZ)),
        rf"unexpected tensor {QKVZ}\.packed",
    ),
    "truncated": (lambda folder, file: cut_short(file), "header cannot be used .*truncated"),
    "a file gone": (lambda folder, file: file.unlink(), "tensors? (is|are) missing|is not there"),
    "no packed weight": (
        lambda folder, file: [
            rewritten(each, lambda h: h.pop("__metadata__"))
            for each in folder.glob("*.safetensors")
        ],
        "no packed weight is in its files: pack it again",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(packed, tmp_path, damage, said):
    folder = Path(shutil.copytree(packed, tmp_path / "damaged"))
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][f"{QKVZ}.packed"]
    damage(folder, file)
    with pytest.raises(CheckpointError, match=said):
        check_packed(folder)


def test_a_file_that_is_cut_short_while_it_is_read(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "cut"))
    _, formats = opened(folder)
    place = formats._places["lm_head.packed"]
    with place.path.open("r+b") as file:
        file.truncate(place.offset + 100)
    with pytest.raises(CheckpointError, match="is truncated, download it again"):
        contents.read(place)


def test_settings_that_do_not_go_with_it(packed, monkeypatch):
    raw = json.loads((packed / "config.json").read_text())
    config = Qwen3NextConfig.from_hf(raw)
    with pytest.raises(CheckpointError, match=r"QWEN3NEXT_QUANTISE=int8: .* quantised already"):
        formats_of(packed, config, raw["quantization_config"], asked="int8")
    monkeypatch.setenv("QWEN3NEXT_HEAD", "plain")
    with pytest.raises(ConfigError, match=r"QWEN3NEXT_HEAD=plain: lm_head of .* is packed in int8"):
        opened(packed)
