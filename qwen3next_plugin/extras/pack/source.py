"""A checkpoint that is packed: what becomes of its tensors, and each weight of ours, packed."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig, quantization_of
from qwen3next_plugin.extras.pack.files import DTYPES, Planned
from qwen3next_plugin.kernels.linear import PackedWeight, stack
from qwen3next_plugin.kernels.linear.packed_weight import BLOCK, PANEL, packed_shapes
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.files import STORED_DTYPES, stored_tensors
from qwen3next_plugin.model.checkpoint.headers import Header, read_header, read_index, weight_files
from qwen3next_plugin.model.checkpoint.layouts import (
    EXPERT,
    group_projections,
    is_tied_head,
    our_names,
)
from qwen3next_plugin.model.checkpoint.mapped import giving_back
from qwen3next_plugin.model.quantisation.files import formats_of
from qwen3next_plugin.model.quantisation.format import BF16, Format
from qwen3next_plugin.model.quantisation.in_panels import is_packed
from qwen3next_plugin.model.quantisation.modules import KV_SCALES
from qwen3next_plugin.model.quantisation.packing import pack, plain_as_int8
from qwen3next_plugin.model.quantisation.stacked import HEAD_MODULE, is_plain, stacked_weights

AS_INT8 = re.compile(r"mtp\.layers\..*(_proj|\.experts\.\w+)$")  # of the drafter, if it is in bf16
FILE = re.compile(r"(?:model\.layers\.\d+|mtp)(?=\.)")  # what is in one file; all else in another
FP32 = DTYPES[torch.float32]


class Source:
    """The checkpoint that is packed."""

    def __init__(
        self, folder: Path, raw: Mapping[str, Any], asked: str | None, dtype: torch.dtype
    ) -> None:
        quantization = quantization_of(folder)
        _check_asked(folder, quantization, asked)
        self.folder, self.dtype = folder, dtype
        self.config = Qwen3NextConfig.from_hf(raw)
        self.formats = formats_of(folder, self.config, quantization, asked=asked)
        self.wholes = stacked_weights(self.config)
        self._headers = {
            name: (path, header)
            for path in weight_files(folder, read_index(folder))
            for name, header in read_header(path).items()
            if not is_tied_head(name, self.config)
        }
        self.originals: dict[str, str] = {}  # our tensor → that of the checkpoint that has it
        for name, tensor in stored_tensors(folder):
            for ours, _ in our_names([(name, tensor)], self.config):
                self.originals[ours] = name
        self._files = ExitStack()
        self._opened: dict[Path, Any] = {}
        self._views = lru_cache(maxsize=4)(self._split)

    def formats_of_weights(self) -> Iterator[tuple[str, Format]]:
        """The weights that are packed, with their formats; what has BF16 becomes int8."""
        there = {ours.rpartition(".")[0] for ours in self.originals}
        for name, whole in self.wholes.items():
            if whole.modules[0] not in there:
                continue  # of a drafter that the files lack
            is_expert = EXPERT.match(whole.modules[0])
            fits = not is_expert or self.config.moe_intermediate_size % PANEL == 0
            module, which = name.rsplit(".", 1) if is_expert else (name, "weight")
            if is_plain(name):
                if plain_as_int8(self.formats):
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
            for part, tensor in sample.tensors.items():
                if part != "packed":
                    others[_file(name)][f"{name}.{part}"] = Header(DTYPES[tensor.dtype], entries)
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
        module = name.removesuffix(".weight")
        if module in self.formats.stored:
            write(name, dict(self.formats.converted(self._stored((module,))))[name])
            return
        with giving_back() as done:
            tensor = self._tensor(name)
            write(name, tensor)
            done(tensor)

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
        try:
            return pack(tensors, form, as_int8=True).weight
        except ValueError as error:
            raise CheckpointError(f"{modules[0]}: {error}; download it again") from error

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
        packed = (self.wholes[name].modules for name in weights if name != HEAD_MODULE)
        gone = {module for modules in packed for module in modules}
        if HEAD_MODULE in weights and not self.config.tie_word_embeddings:
            gone.add(HEAD_MODULE)
        stored = self.formats.stored
        found: dict[str, Header] = {}
        ours_of = defaultdict(list)
        for ours, original in self.originals.items():
            ours_of[original].append(ours)
        for name, (_, header) in self._headers.items():
            for ours in ours_of.get(name) or [name]:
                module, _, last = ours.rpartition(".")
                parts = stored[module].names if module in stored else ("weight",)
                if last in KV_SCALES:
                    continue
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
    return STORED_DTYPES[header.dtype].itemsize


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
