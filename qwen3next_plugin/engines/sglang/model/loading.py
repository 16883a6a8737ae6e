"""A checkpoint's tensors into SGLang's parameters."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_parallel, get_server_args
from torch import nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines import extras
from qwen3next_plugin.engines.hub import folder_here
from qwen3next_plugin.engines.sglang.config import read_config
from qwen3next_plugin.engines.sglang.cpu.environment import without_gpu
from qwen3next_plugin.engines.sglang.names import NO_UPDATES, logger
from qwen3next_plugin.engines.sglang.state.pages import page_layout
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.model.checkpoint import progress
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.layouts import STACKED_PROJECTIONS, Shapes
from qwen3next_plugin.model.checkpoint.reading import check_scales, parameters
from qwen3next_plugin.model.checkpoint.tensors import (
    MTP,
    loaded_tensors,
    name_in_drafter,
    not_loaded_tensors,
)
from qwen3next_plugin.model.quantisation.blanks import Blanks
from qwen3next_plugin.model.quantisation.layers import Ranks, attacher
from qwen3next_plugin.model.quantisation.modules import served_formats
from qwen3next_plugin.model.quantisation.packing import Packer

# A stacked projection's parts, by the names that quantisation configs use.
PACKED_MODULES = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
EXPERT = re.compile(r"\.experts\.(\d+)\.(gate|up|down)_proj\.")
SHARDS = {"gate": ("w13_", "w1"), "up": ("w13_", "w3"), "down": ("w2_", "w2")}


class OurModel(nn.Module):
    """What trunk, drafter and vision-language models have in common: how they load."""

    packed_modules_mapping = PACKED_MODULES
    fall_back_to_pt_during_load = False  # safetensors only: nothing is unpickled
    _derived_weight_cache_error = NO_UPDATES
    fixed: str | None = None  # why a server cannot be given other weights

    def _set_config(self, hf_config: Any, quant_config: QuantizationConfig | None) -> None:
        """Read the config, and check that this machine computes what it asks for."""
        self.config = read_config(hf_config, get_parallel().tp_size)
        layout = page_layout(hf_config.get_text_config())
        device = torch.get_default_device()
        dispatch.load(device.type)
        extras.before_load("sglang", self.config, layout, device, logger.info)
        self.blanks: Blanks | None = None  # to load it again
        self.quantised = quant_config is not None
        self.formats = served_formats(quant_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the trunk's share of the checkpoint, strictly; the drafter loads `mtp.*`."""
        expected, ignored = loaded_tensors(self.config), not_loaded_tensors(self.config)
        load(self, self._checked(weights, expected=expected, ignored=ignored))

    def _checked(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        expected: Shapes,
        ignored: Iterable[str],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        if self.blanks is None:
            self.blanks = Blanks(self)
        if without_gpu():  # our platform ends the bar
            progress.begin(lambda: _stored_bytes(self.config, expected), logger.info)
        return parameters(
            weights,
            self.config,
            expected=expected,
            ignored=ignored,
            quantised=self.quantised,
            formats=self.formats,
            parts=Packer(self, name_in_drafter),
            attach=attacher(self, Ranks(get_parallel().tp_rank, get_parallel().tp_size)),
        )


def _stored_bytes(config: Qwen3NextConfig, expected: Iterable[str]) -> int | None:
    """Bytes that the bar counts: of the MTP layer if that is expected, else of the trunk."""
    args, mtp = get_server_args(), any(name.startswith(MTP) for name in expected)
    folder = folder_here(args.model_path, args.revision, args.download_dir)
    return progress.stored_bytes(folder, config, trunk=not mtp, mtp=mtp)


def load(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load each tensor into its parameter, or into its part of a stacked one."""
    named = {name for name, _ in model.named_parameters()}
    loaded: set[str] = set()

    def find(name: str) -> Any:  # loaders are attributes
        """The parameter of that name, which is not kept: a packed layer drops it."""
        if name not in named:
            raise CheckpointError(
                f"tensor {name}: the config's quantization_config leaves this layer unquantised, "
                f"and the checkpoint does not"
            )
        loaded.add(name)
        return model.get_parameter(name)

    for name, tensor in tensors:
        if expert := EXPERT.search(name):
            holder, which = SHARDS[expert[2]]
            name = EXPERT.sub(f".experts.{holder}", name)
            parameter = find(name)
            parameter.weight_loader(
                parameter, tensor, name, shard_id=which, expert_id=int(expert[1])
            )
            continue
        part = next((key for key in STACKED_PROJECTIONS if f"{key}." in name), None)
        if part is not None:
            whole, shard = STACKED_PROJECTIONS[part]
            parameter = find(name.replace(part, whole))
            parameter.weight_loader(parameter, tensor, shard)
            continue
        parameter = find(name)
        getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
    check_scales(named, loaded)
