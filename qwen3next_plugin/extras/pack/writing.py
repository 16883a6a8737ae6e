"""Writes a checkpoint in the kernels' own layout, weight by weight: `in_panels` defines it."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen3next_plugin.config import ConfigError, check_name, read_config
from qwen3next_plugin.extras.pack.files import Planned, Wrote, written
from qwen3next_plugin.extras.pack.source import Source
from qwen3next_plugin.model.checkpoint.headers import INDEX
from qwen3next_plugin.model.checkpoint.progress import Say
from qwen3next_plugin.model.checkpoint.reading import check_stored
from qwen3next_plugin.model.checkpoint.tensors import MTP
from qwen3next_plugin.model.checkpoint.units import readable
from qwen3next_plugin.model.quantisation.files import unquantised
from qwen3next_plugin.model.quantisation.format import Format
from qwen3next_plugin.model.quantisation.in_panels import METHOD, VERSION
from qwen3next_plugin.model.quantisation.original import RECORD, changed, record

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx", ".msgpack"}
NOT_COPIED = ("config.json", INDEX, "quantize_config.json", "hf_quant_config.json")


class Plan(NamedTuple):
    """What will be written: files, and the weights that are packed, with their formats."""

    source: Source
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
        "quantised": asked,
    }
    config = unquantised(raw) | {"quantization_config": quantization}
    return Plan(source, source.planned(weights), weights, config)


def write_packed(
    plan: Plan, out: Path, wrote: Wrote = lambda count: None, say: Say = lambda line: None
) -> None:
    """Write a checkpoint into a folder that is new or empty, which is there only when it is whole.

    Args: say: takes lines of the log while the original is hashed.

    Raises:
        ConfigError: the folder cannot be written, the disk is too small, or the checkpoint is
            written meanwhile.
    """
    partial = _check_out(plan, out)
    original = record(plan.source.folder, say)
    partial.mkdir(parents=True)
    try:
        _write(plan, partial, wrote)
        (partial / RECORD).write_text(json.dumps(original, indent=2))
        if name := changed(original, say):
            raise ConfigError(f"{plan.source.folder / name} was written meanwhile; pack it again")
        os.rename(partial, out.resolve())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_out(plan: Plan, out: Path) -> Path:
    """The folder beside it that is written first."""
    check_name(out)
    folder = plan.source.folder
    if out.resolve() == folder.resolve():
        raise ConfigError(f"{out} is the checkpoint itself; give another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there and not an empty folder; give a new one, or remove it")
    if out.is_mount():
        raise ConfigError(f"{out} is where a disk is mounted; give a new folder in it")
    partial = out.resolve().with_name(f"{out.resolve().name}.partial")
    if partial.exists():
        raise ConfigError(
            f"{partial} is there: another `qwen3next pack` writes it, or was killed; wait for it, "
            f"or remove the folder"
        )
    parent = next(parent for parent in partial.parents if parent.is_dir())
    if (free := shutil.disk_usage(parent).free) < plan.nbytes:
        raise ConfigError(
            f"{out} takes {readable(plan.nbytes)}, and its disk has {readable(free)} "
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
