"""Checkpoints that mix two models of the family: every engine refuses them at load."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from family import FAMILY

DENSE, MOE = "dense_HV=3H_wrapped_7-layers", "moe_HV=4H_top-3-of-12_5-layers"
Raw = dict[str, Any]


class Mixed(NamedTuple):
    """A member of the family, what is wrong with its config.json, and how the error puts it."""

    member: str
    edit: Callable[[Raw], None]
    message: str

    def write(self, folder: Path) -> Path:
        """Write the checkpoint; returns its folder."""
        return edited(FAMILY[self.member].write(folder), self.edit)


def edited(model: Path, edit: Callable[[Raw], None]) -> Path:
    """The checkpoint with its config.json edited."""
    file = model / "config.json"
    raw = json.loads(file.read_text())
    edit(raw)
    file.write_text(json.dumps(raw))
    return model


def _unknown_layer(raw: Raw) -> None:
    raw.pop("full_attention_interval", None)
    kinds = ["linear_attention"] * (raw["num_hidden_layers"] - 1)
    raw["layer_types"] = [*kinds, "sliding_attention"]


CONFIGS: Mapping[str, Mixed] = {
    "a text model of another layout": Mixed(
        DENSE,
        lambda raw: raw["text_config"].update(model_type="qwen3_next"),
        r"text_config\.model_type = 'qwen3_next': model_type is 'qwen3_5'; use one layout",
    ),
    "one field at both levels": Mixed(
        DENSE,
        lambda raw: raw.update(hidden_size=64),
        r"hidden_size = 64: text_config says 96, and that is what counts; write .*text_config",
    ),
    "experts in a dense model": Mixed(
        DENSE,
        lambda raw: raw["text_config"].update(num_experts=8),
        r"num_experts = 8: 'qwen3_5_text' has dense layers only; with experts it is 'qwen3_5_moe",
    ),
    "an unknown kind of layer": Mixed(
        MOE, _unknown_layer, r"layer_types = \['sliding_attention'\]: use linear_attention and"
    ),
}


def without_mtp(folder: Path, member: str, level: str | None) -> Path:
    """A checkpoint without an MTP layer whose config says so, at the top or in `level`."""

    def none(raw: Raw) -> None:
        text = raw.get("text_config", raw)
        del text["mtp_num_hidden_layers"]
        (raw[level] if level else raw)["mtp_num_hidden_layers"] = 0

    return edited(FAMILY[member].write(folder, mtp=False), none)


WITHOUT_MTP = {"none in text_config": (DENSE, "text_config"), "none at the top": (MOE, None)}


class Swapped(NamedTuple):
    """The config of one checkpoint over the tensors of another, and how the error puts it."""

    config: str  # of FAMILY
    tensors: str  # of FAMILY; "": the same weights, as Qwen3-Next's
    message: str

    def write(self, folder: Path) -> Path:
        """Write the checkpoint; returns its folder."""
        plain, model = FAMILY[self.config].pair(folder / "config")
        tensors = FAMILY[self.tensors].write(folder / "tensors") if self.tensors else plain
        shutil.copyfile(tensors / "model.safetensors", model / "model.safetensors")
        return model


TOGETHER = "config.json and the safetensors files do not belong together; take both from one"
FAULT = r"tensor \S+ (has shape )?\("  # unexpected, or of another shape
TENSORS: Mapping[str, Swapped] = {
    "Qwen3-Next's": Swapped(MOE, "", rf"unexpected tensor model\.layers\.\d\..*: .*{TOGETHER}"),
    "experts for a dense config": Swapped(DENSE, MOE, rf"{FAULT}.*: .*{TOGETHER}"),
    "dense layers for a config with experts": Swapped(MOE, DENSE, rf"{FAULT}.*: .*{TOGETHER}"),
}
