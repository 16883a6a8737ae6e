"""State pages in vLLM's cache: one opaque page for each request and linear layer, also with drafts.

vLLM stores a convolution window and S as separate tensors, and one of each per draft token. Here
one page holds both (model/state.py), and every copy of a page is a correct copy.
"""

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.vllm.names import BACKEND_NAME
from qwen3next_plugin.model.state import PageLayout, state_dtype

PAGE_DTYPE = torch.int8  # a page is bytes to vLLM


def page_layout(
    config: Qwen3NextConfig, vllm_config: VllmConfig, *, shared: bool = False
) -> PageLayout:
    """The page of one linear layer on this rank, under these engine flags.

    Args: shared: as of `PageLayout.from_config`.
    """
    name = vllm_config.cache_config.mamba_ssm_cache_dtype
    if name == "auto":  # vLLM would use the activations' dtype; the recurrence drifts in bf16
        name = "float32"
    return PageLayout.from_config(
        config,
        num_drafts=vllm_config.num_speculative_tokens,
        activation_dtype=vllm_config.model_config.dtype,
        state_dtype=state_dtype(
            name, setting="mamba_ssm_cache_dtype", flag="--mamba-ssm-cache-dtype"
        ),
        shared=shared,
    )


def largest_page(config: Qwen3NextConfig, vllm_config: VllmConfig) -> PageLayout:
    """The largest layout of all layers, because vLLM's pages have one size."""
    return page_layout(config, vllm_config, shared=True)


def page_spec(layout: PageLayout, vllm_config: VllmConfig) -> MambaSpec:
    """What vLLM sizes its cache by: one page of the largest layout for each request.

    The page is declared as large as the block that vLLM pads it to. When a prefix hit ends inside
    a block, vLLM 0.32 copies only as many bytes of the block as the first layer in it declares,
    and the block may also hold KV. Remove when it copies whole blocks: a test marked `compat`.
    """
    cache_config = vllm_config.cache_config
    return MambaSpec(
        shapes=((cache_config.mamba_page_size_padded or layout.page_bytes,),),
        dtypes=(PAGE_DTYPE,),
        block_size=cache_config.mamba_block_size,
        mamba_type=MambaAttentionBackendEnum[BACKEND_NAME],
        mamba_cache_mode=cache_config.mamba_cache_mode,
        num_speculative_blocks=0,
    )
