"""Writes a checkpoint in the kernels' own layout, weight by weight: `in_panels` defines it."""

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig, read_config
from qwen3next_plugin.kernels.linear import PackedWeight, stack
from qwen3next_plugin.kernels.linear.packed_weight import BLOCK, PANEL, packed_shapes
from qwen3next_plugin.model.checkpoint.files import stored_tensors
from qwen3next_plugin.model.checkpoint.headers import (
    INDEX,
    Header,
    read_header,
    read_index,
    weight_files,
)
from qwen3next_plugin.model.checkpoint.layouts import EXPERT, group_projections, our_names
from qwen3next_plugin.model.checkpoint.mapped import give_back
from qwen3next_plugin.model.checkpoint.reading import check_stored
from qwen3next_plugin.model.checkpoint.tensors import MTP
from qwen3next_plugin.model.checkpoint.writing import DTYPES, Planned, Wrote, written
from qwen3next_plugin.model.quantisation.files import formats_of
from qwen3next_plugin.model.quantisation.format import BF16, Format
from qwen3next_plugin.model.quantisation.in_panels import METHOD, VERSION, is_packed
from qwen3next_plugin.model.quantisation.packed import head_as_int8, pack
from qwen3next_plugin.model.quantisation.stacked import HEAD, stacked_weights

AS_INT8 = re.compile(r"mtp\.layers\..*(_proj|\.experts\.\w+)$")  # of the drafter, if it is in bf16
FILE = re.compile(r"(?:model\.layers\.\d+|mtp)(?=\.)")  # what is in one file; all else in another
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx", ".msgpack"}
NOT_COPIED = ("config.json", INDEX, "quantize_config.json", "hf_quant_config.json")
QUANTIZATION = ("quantization_config", "compression_config")  # fields of config.json
FP32 = DTYPES[torch.float32]


class Plan(NamedTuple):
    """What will be written: files, and the weights that are packed, with their formats."""

    source: "Source"
    files: Mapping[str, Planned]
    weights: Mapping[str, Format]
    config: Mapping[str, Any]  # of config.json

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())


def plan_packing(folder: Path, asked: str | None, dtype: torch.dtype) -> Plan:
    """Check a checkpoint by its files' headers, and plan what is written.

    Args:
        asked: `int8` or `int4`, to which a plain checkpoint is quantised.
        dtype: in which the checkpoint is served.

    Raises:
        ConfigError, CheckpointError: what cannot be packed, and the fix.
    """
    raw = read_config(folder)
    source = Source(folder, raw, asked, dtype)
    with_mtp = any(name.startswith(MTP) for name in source.originals)
    check_stored(folder, source.config, quantised=True, formats=source.formats, with_mtp=with_mtp)
    weights = dict(source.formats_of_weights())
    quantization = {
        "quant_method": METHOD,
        "format_version": VERSION,
        "source": source.fingerprint(),
        "quantised": asked,
    }
    text = raw.get("text_config")
    config = {name: value for name, value in raw.items() if name not in QUANTIZATION}
    if isinstance(text, dict):
        config["text_config"] = {n: value for n, value in text.items() if n not in QUANTIZATION}
    return Plan(
        source, source.planned(weights), weights, config | {"quantization_config": quantization}
    )


def write_packed(plan: Plan, out: Path, wrote: Wrote = lambda count: None) -> None:
    """Write a checkpoint into a folder that is new or empty, which is there only when it is whole.

    Raises:
        ConfigError: the folder cannot be written, or the disk is too small.
    """
    partial = _check_out(plan, out)
    partial.mkdir(parents=True)
    try:
        _write(plan, partial, wrote)
        os.rename(partial, out.resolve())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_out(plan: Plan, out: Path) -> Path:
    """The folder beside it that is written first."""
    folder = plan.source.folder
    if out.resolve() == folder.resolve():
        raise ConfigError(f"{out} is the checkpoint itself; give another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there and not an empty folder; give a new one, or remove it")
    partial = out.resolve().with_name(f"{out.resolve().name}.partial")
    if partial.exists():
        raise ConfigError(
            f"{partial} is there: another `qwen3next pack` writes it, or was killed; wait for it, "
            f"or remove the folder"
        )
    parent = next(parent for parent in partial.parents if parent.is_dir())
    if (free := shutil.disk_usage(parent).free) < plan.nbytes:
        raise ConfigError(
            f"{out} takes {plan.nbytes / 2**30:.2f} GiB, and its disk has {free / 2**30:.2f} GiB "
            f"free; free some, or give a folder on another disk"
        )
    return partial


def _write(plan: Plan, folder: Path, wrote: Wrote) -> None:
    weight_map: dict[str, str] = {}
    for name, planned in plan.files.items():
        with written(folder / name, planned, wrote) as write:
            for weight in planned.described:
                packed = plan.source.packed(weight, plan.weights[weight])
                for part, tensor in packed.tensors.items():
                    write(f"{weight}.{part}", tensor)
                del packed, tensor
            for tensor_name in planned.tensors:
                if tensor_name.rpartition(".")[0] not in planned.described:
                    plan.source.copy(tensor_name, write)
        weight_map |= dict.fromkeys(planned.tensors, name)
    for path in sorted(plan.source.folder.iterdir()):
        if path.is_file() and path.suffix not in WEIGHTS and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(plan.config, indent=2))


class Source:
    """The checkpoint that is packed."""

    def __init__(
        self, folder: Path, raw: Mapping[str, Any], asked: str | None, dtype: torch.dtype
    ) -> None:
        text = raw.get("text_config") or {}
        levels = [level.get(name) for level in (raw, text) for name in QUANTIZATION]
        quantization = next(filter(None, levels), None)
        _check_asked(folder, quantization, asked)
        self.folder, self.dtype = folder, dtype
        self.config = Qwen3NextConfig.from_hf(raw)
        self.formats = formats_of(folder, self.config, quantization, asked=asked)
        self.wholes = stacked_weights(self.config)
        self._headers = {
            name: (path, header)
            for path in weight_files(folder, read_index(folder))
            for name, header in read_header(path).items()
        }
        self.originals: dict[str, str] = {}  # our tensor → that of the checkpoint that has it
        for name, tensor in stored_tensors(folder):
            for ours, _ in our_names([(name, tensor)], self.config):
                self.originals[ours] = name
        self._files = ExitStack()
        self._opened: dict[Path, Any] = {}
        self._views = lru_cache(maxsize=4)(self._split)

    def fingerprint(self) -> str:
        """Of config.json and the weight files, but for what is behind their headers."""
        found = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in weight_files(self.folder, read_index(self.folder)):
            with path.open("rb") as file:
                size = file.read(8)
                header = file.read(int.from_bytes(size, "little"))
            found.update(f"{path.name} {path.stat().st_size}".encode() + header)
        return f"sha256:{found.hexdigest()}"

    def formats_of_weights(self) -> Iterator[tuple[str, Format]]:
        """The weights that are packed, with their formats; what has BF16 becomes int8."""
        there = {ours.rpartition(".")[0] for ours in self.originals}
        for name, whole in self.wholes.items():
            if whole.modules[0] not in there:
                continue  # of a drafter that the files lack
            is_expert = EXPERT.match(whole.modules[0])
            fits = not is_expert or self.config.moe_intermediate_size % PANEL == 0
            module, which = name.rsplit(".", 1) if is_expert else (name, "weight")
            if name == HEAD:
                if head_as_int8(self.formats):
                    yield name, BF16
            elif found := self.formats.of(module):
                yield name, found[which]
            elif AS_INT8.match(name) and self.dtype == torch.bfloat16 and fits:
                yield name, BF16

    def planned(self, weights: Mapping[str, Format]) -> dict[str, Planned]:
        """The files, by their names."""
        packed: dict[str, dict[str, str]] = defaultdict(dict)
        panels: dict[str, dict[str, Header]] = defaultdict(dict)
        others: dict[str, dict[str, Header]] = defaultdict(dict)
        for name, form in weights.items():
            sample, shape = self._sample(name, form), self.wholes[name].shape
            lines, entries = packed_shapes(sample.encoding, shape, sample.group)
            sizes = " ".join(map(str, (sample.group % shape[-1], *shape)))  # 0: all columns
            packed[_file(name)][name] = f"{sample.encoding} {sizes}"
            panels[_file(name)][f"{name}.packed"] = Header("U8", lines)
            for part in sample.tensors.keys() - {"packed"}:
                dtype = DTYPES[sample.tensors[part].dtype]
                others[_file(name)][f"{name}.{part}"] = Header(dtype, entries)
        for name, header in self._copied(weights).items():
            others[_file(name)].setdefault(name, header)
        for file in others:  # the widest values first: each begins at one of its own
            widest = sorted(others[file].items(), key=lambda item: _width(item[1]), reverse=True)
            others[file] = dict(widest)
        names = sorted(panels.keys() | others.keys(), key=_natural)
        return {
            f"model-{i:05}-of-{len(names):05}.safetensors": Planned(
                panels[name] | others[name], packed[name]
            )
            for i, name in enumerate(names, start=1)
        }

    def packed(self, name: str, form: Format) -> PackedWeight:
        """A weight of ours; of experts, each core packs one at a time."""
        whole = self.wholes[name]
        if len(whole.shape) == 2:
            return self._packed(whole.modules, form)
        experts = whole.shape[0]
        each = len(whole.modules) // experts
        modules = [whole.modules[i : i + each] for i in range(0, len(whole.modules), each)]
        with ThreadPoolExecutor(
            len(os.sched_getaffinity(0)), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return stack(pool.map(lambda one: self._packed(one, form), modules), experts)

    def copy(self, name: str, write: Callable[[str, Tensor], None]) -> None:
        """Write a tensor as it is in the files, or the dequantised weight of a module."""
        if name in self._headers:
            tensor = self._tensor(name)
            write(name, tensor)
            give_back(tensor)
        else:
            stored = self._stored((name.removesuffix(".weight"),))
            write(name, dict(self.formats.converted(stored))[name])

    def _sample(self, name: str, form: Format) -> PackedWeight:
        """A weight that is packed alike, of a few output channels: more than share a scale."""
        *_, N, K = self.wholes[name].shape
        shapes = form.tensors(min(N, BLOCK + 1), K).items()
        tensors = {n: torch.zeros(shape, dtype=dtype) for n, (shape, dtype) in shapes}
        return pack(tensors, form, as_int8=True).weight

    def _packed(self, modules: tuple[str, ...], form: Format) -> PackedWeight:
        tensors = self._converted(modules)
        if form == BF16:
            tensors = {"weight": tensors["weight"].to(self.dtype)}
        return pack(tensors, form, as_int8=True).weight

    def _stored(self, modules: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of modules as they are in the files, mapped."""
        for module in modules:
            kept = self.formats.stored.get(module)
            for last in sorted(kept.names) if kept else ("weight",):
                name = f"{module}.{last}"
                yield name, self._views(self.originals[name])[name]

    def _converted(self, modules: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors of modules in our format, stacked."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        copied = ((n, t.clone()) for n, t in self.formats.converted(self._stored(modules)))
        for name, tensor in group_projections(copied, self.config):
            found[name.rpartition(".")[2]].append(tensor)
        return {n: ts[0] if len(ts) == 1 else torch.cat(ts) for n, ts in found.items()}

    def _copied(self, weights: Mapping[str, Format]) -> dict[str, Header]:
        """The tensors that are not packed, under their names here."""
        gone = {module for name in weights if name != HEAD for module in self.wholes[name].modules}
        if HEAD in weights and not self.config.tie_word_embeddings:
            gone.add(HEAD)
        stored = self.formats.stored
        found: dict[str, Header] = {}
        ours_of = defaultdict(list)
        for ours, original in self.originals.items():
            ours_of[original].append(ours)
        for name, (_, header) in self._headers.items():
            for ours in ours_of.get(name) or [name]:
                module, _, last = ours.rpartition(".")
                parts = stored[module].names if module in stored else ("weight",)
                if last not in parts:
                    found[name] = header
                elif module in gone:
                    continue
                elif module in stored:
                    kept = stored[module].module
                    found[f"{module}.weight"] = Header(FP32, (kept.channels, kept.columns))
                else:
                    found[name] = header
        return found

    def _split(self, original: str) -> dict[str, Tensor]:
        """The tensors of ours that a tensor of the checkpoint has."""
        return dict(our_names([(original, self._tensor(original))], self.config))

    def _tensor(self, original: str) -> Tensor:
        """A tensor of the checkpoint, mapped."""
        path = self._headers[original][0]
        if path not in self._opened:
            self._opened[path] = self._files.enter_context(safe_open(path, framework="pt"))
        return self._opened[path].get_tensor(original)


def _check_asked(folder: Path, quantization: Mapping[str, Any] | None, asked: str | None) -> None:
    if is_packed(quantization):
        raise ConfigError(f"{folder} is packed already; serve it as it is")
    if quantization and asked:
        raise ConfigError(
            f"--quantise {asked}: {folder} is quantised already, by its quantization_config; leave "
            f"--quantise out to keep its formats"
        )
    if not quantization and not asked:
        raise ConfigError(
            f"{folder} is not quantised; add --quantise int8 or --quantise int4 to quantise it"
        )


def _file(name: str) -> str:
    """What is in the same file as a tensor."""
    found = FILE.search(name)
    return found[0] if found else ""


def _width(header: Header) -> int:
    return next(dtype for dtype, name in DTYPES.items() if name == header.dtype).itemsize


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
