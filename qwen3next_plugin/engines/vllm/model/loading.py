"""A checkpoint's tensors into vLLM's parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from qwen3next_plugin.config import Layout, Qwen3NextConfig
from qwen3next_plugin.engines.hub import READ_HERE, folder_here
from qwen3next_plugin.engines.vllm.flags import read_config
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.model.checkpoint import progress
from qwen3next_plugin.model.checkpoint.layouts import STACKED_PROJECTIONS

logger = init_logger(LOGGER)

# A stacked projection's parts, by the names that quantisation configs and adapters use.
PACKED_MODULES = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkvz"],
    "in_proj_ba": ["in_proj_ba"],
}
FLAT_MODULES = PACKED_MODULES | {
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
}
LANGUAGE_MODEL = WeightsMapper(orig_to_new_prefix={"model.language_model.": "model."})
STACKED = WeightsMapper(orig_to_new_stacked=STACKED_PROJECTIONS)
FLAT_STACKED = STACKED | WeightsMapper(
    orig_to_new_stacked={
        ".in_proj_qkv": (".in_proj_qkvz", (0, 1, 2)),
        ".in_proj_z": (".in_proj_qkvz", 3),
        ".in_proj_b": (".in_proj_ba", 0),
        ".in_proj_a": (".in_proj_ba", 1),
    }
)


def projection_layout(config: Qwen3NextConfig, vllm_config: VllmConfig) -> Layout:
    """The layout of linear attention's projections: grouped, or with LoRA the checkpoint's.

    An adapter of a flat projection has one A for all its channels, so it needs unsplit parts.
    """
    return "grouped" if vllm_config.lora_config is None else config.layout


def load(
    model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], layout: Layout = "grouped"
) -> set[str]:
    """Load each tensor into its parameter, or into its part of a stacked one; return the names."""
    return AutoWeightsLoader(model).load_weights(
        tensors, mapper=FLAT_STACKED if layout == "flat" else STACKED
    )


@contextmanager
def one_bar(vllm_config: VllmConfig) -> Iterator[None]:
    """Within this context show one bar for trunk and MTP layer, instead of vLLM's bars of files."""
    load_config = vllm_config.load_config
    if not load_config.use_tqdm_on_load or load_config.load_format not in READ_HERE:
        yield
        return

    def total() -> int | None:
        model = vllm_config.model_config
        folder = folder_here(model.model, model.revision, load_config.download_dir)
        mtp = vllm_config.speculative_config is not None
        config = read_config(vllm_config)
        return progress.stored_bytes(folder, config, trunk=True, mtp=mtp)

    load_config.use_tqdm_on_load = False
    progress.begin(total, logger.info)
    try:
        yield
        progress.finish()
    finally:
        progress.cancel()
        load_config.use_tqdm_on_load = True
