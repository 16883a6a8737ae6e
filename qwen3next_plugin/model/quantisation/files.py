"""Which modules of a checkpoint are quantised, and how, by its files' headers."""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from copy import copy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from qwen3next_plugin import env
from qwen3next_plugin.config import Qwen3NextConfig, quantization_of
from qwen3next_plugin.config.fields import QUANTISATIONS
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.files import stored_tensors
from qwen3next_plugin.model.checkpoint.fingerprint import State, states
from qwen3next_plugin.model.checkpoint.layouts import Shapes, holder, our_names, without_prefix
from qwen3next_plugin.model.checkpoint.tensors import all_tensors
from qwen3next_plugin.model.quantisation.at_load import formats_at_load
from qwen3next_plugin.model.quantisation.in_panels import formats_in_panels, is_packed
from qwen3next_plugin.model.quantisation.modules import (
    NO_PART,
    PLAIN_DTYPES,
    Formats,
    Stream,
    less_of,
    matrices,
    stored_formats,
    without_wrapper,
)

READ = ("quant_method", "checkpoint_format", "format_version")  # of quantization_config
LEAVES_PLAIN = "qwen3next_leaves_plain"  # an attribute of what `leave_plain` returns
Config = TypeVar("Config")


def read_formats(folder: Path, hf_config: Any, quantization: Mapping[str, Any] | None) -> Formats:
    """The formats of the trunk's and the MTP layer's modules, by the files' headers; cached.

    Args:
        hf_config: the host's, of transformers.
        quantization: its quantization_config.

    Raises:
        CheckpointError: a module is quantised in an unknown way.
    """
    read = quantization and {name: quantization.get(name) for name in READ}
    return _read_formats(
        folder,
        _unquantised(hf_config),
        _state_of(folder),
        json.dumps(read),
        env.quantise(),
        env.head(),
    )


@lru_cache(maxsize=2)
def _read_formats(
    folder: Path,
    hf_config: str,
    files: tuple[State, ...],
    quantization: str,
    asked: str | None,
    head: str,
) -> Formats:
    """Args: files, head: only for the cache's key; callees read both themselves."""
    config = Qwen3NextConfig.from_hf(json.loads(hf_config))
    return formats_of(folder, config, json.loads(quantization), asked=asked)


def check_version(folder: Path, formats: Formats | None) -> None:
    """Refuse new weights in GPTQ's other version: only the values of its zero points differ.

    Raises: CheckpointError, naming the folder.
    """
    if formats is None or not (folder / "config.json").is_file():
        return
    less = less_of(quantization_of(folder))
    served = (each.module.less for each in formats.stored.values() if "qzeros" in each.names)
    if any(each != less for each in served):
        raise CheckpointError(
            f"{folder}: checkpoint_format is not that of the served weights, and GPTQ's versions "
            f"have different zero points; use weights of the same version, or restart the server"
        )


def read_plain_modules(folder: Path, hf_config: Any) -> frozenset[str]:
    """Modules of the trunk and the MTP layer that the files have unquantised; cached.

    Raises:
        CheckpointError: only a part of a module is quantised.
    """
    return _read_plain_modules(folder, _unquantised(hf_config), _state_of(folder))


@lru_cache(maxsize=2)
def _read_plain_modules(folder: Path, hf_config: str, files: tuple[State, ...]) -> frozenset[str]:
    return plain_modules_of(folder, Qwen3NextConfig.from_hf(json.loads(hf_config)))


def _state_of(folder: Path) -> tuple[State, ...]:
    """For a cache's key: a process may serve a folder whose weight files were written anew."""
    return tuple(states(sorted(folder.glob("*.safetensors"))))


def _unquantised(hf_config: Any) -> str:
    """A config as JSON, without quantization_config, because vLLM adds fields to that."""
    return json.dumps(unquantised(json.loads(hf_config.to_json_string(use_diff=False))))


def unquantised(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the fields that say how a checkpoint is quantised, at either level."""
    found = {name: value for name, value in raw.items() if name not in QUANTISATIONS}
    if text := found.get("text_config"):
        found["text_config"] = unquantised(text)
    return found


def formats_of(
    folder: Path,
    config: Qwen3NextConfig,
    quantization: Mapping[str, Any] | None,
    *,
    asked: str | None,
) -> Formats:
    """The formats of a checkpoint's modules.

    Args:
        quantization: quantization_config of its config.json.
        asked: the value of QWEN3NEXT_QUANTISE.

    Raises:
        CheckpointError: names a module that cannot be served as it is quantised, and the fix.
    """
    shapes, of_ours = all_tensors(config), partial(holder, config=config)
    if asked is None and is_packed(quantization):
        return formats_in_panels(folder, config, quantization or {})
    if asked is None:
        stored = list(stored_tensors(folder))
        quantised = (name for name, t in stored if t.dtype not in PLAIN_DTYPES)
        of_tower = (name for name in quantised if without_prefix(name, config) is None)
        tower, ours = next(of_tower, None), our_names(stored, config)
        return stored_formats(ours, shapes, of_ours, quantization, tower=tower)
    if quantization is not None:
        raise CheckpointError(
            f"QWEN3NEXT_QUANTISE={asked}: the checkpoint is quantised already, by its "
            f"quantization_config; unset the variable"
        )
    return formats_at_load(asked, shapes, of_ours)


def plain_modules_of(folder: Path, config: Qwen3NextConfig) -> frozenset[str]:
    """Our modules that a checkpoint's files have unquantised; raises as `plain_modules`."""
    tensors = our_names(stored_tensors(folder), config)
    return plain_modules(tensors, all_tensors(config), partial(holder, config=config))


def plain_modules(tensors: Stream, shapes: Shapes, holder: Callable[[str], str]) -> frozenset[str]:
    """Our modules that are unquantised in the files.

    Args: as of `modules.stored_formats`.

    Raises: CheckpointError for a module of which the files have only a part quantised.
    """
    shapes = matrices(shapes)
    plain: dict[str, bool] = {}
    for name, tensor in tensors:
        module, _, last = name.rpartition(".")
        if f"{module}.weight" in shapes and last not in NO_PART:
            whole = last == "weight" and tensor.dtype in PLAIN_DTYPES
            plain[module] = plain.get(module, True) and whole
    found: dict[str, dict[bool, str]] = defaultdict(dict)
    for module, whole in plain.items():
        found[holder(module)][whole] = module
    for ours, parts in found.items():
        if len(parts) > 1:
            raise CheckpointError(
                f"{ours}: {parts[False]} is quantised, and {parts[True]} is not; a GPU's kernels "
                f"take both in one format: use a checkpoint with both quantised, or neither"
            )
    return frozenset(ours for ours, parts in found.items() if True in parts)


def leave_plain(
    config: Config, plain: Collection[str], linear: type[Any], unquantised: Callable[[], Any]
) -> Config:
    """An engine's quantisation, on a GPU, that skips these modules.

    Each tool names skipped modules in config.json in its own way; some do not name the MTP layer's
    input, or use names that the engine does not know for stacked projections.

    Args:
        linear: the class of an engine's projections.
        unquantised: makes their method. Other layers choose theirs if there is none.
    """
    host = type(config)

    def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
        if without_wrapper(prefix) in plain:
            return unquantised() if isinstance(layer, linear) else None
        return host.get_quant_method(self, layer, prefix)  # type: ignore[attr-defined]

    changed = copy(config)
    members = {"get_quant_method": get_quant_method, LEAVES_PLAIN: True}
    changed.__class__ = type(host.__name__, (host,), members)
    return changed
