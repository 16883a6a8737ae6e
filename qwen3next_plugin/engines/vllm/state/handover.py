"""Prefill on one server, decode on another: pages through vLLM's NIXL connector, on CPUs.

The connector reads a recurrent state in parts, so that servers may have different numbers of
tensor parallel ranks. A page is one part, read whole, and only from a server that is alike in all
that decides what is in it (handover_flags.py). patches.py puts these functions in place.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import nixl_utils
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from qwen3next_plugin.engines.nixl import waiting
from qwen3next_plugin.engines.vllm.flags import read_config
from qwen3next_plugin.engines.vllm.names import BACKEND_NAME, LOGGER
from qwen3next_plugin.engines.vllm.state.handover_flags import ALIKE, hands_over
from qwen3next_plugin.engines.vllm.state.pages import page_layout
from qwen3next_plugin.model.state import PageLayout

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.ssm_conv_transfer_utils import (
        MambaConvSplitInfo,
    )

logger = init_logger(LOGGER)


def with_what_is_alike(
    host: Callable[..., str],
    vllm_config: VllmConfig,
    attn_backend_name: str,
    transfer_mode: str = "pull",
) -> str:
    """vLLM's digest of what two servers must have alike, and ours, which is to be read."""
    own = vllm_config.kv_transfer_config.kv_connector_extra_config[ALIKE]
    return f"{host(vllm_config, attn_backend_name, transfer_mode)} ({own})"


def in_one_part(
    host: "Callable[..., MambaConvSplitInfo]", mamba_spec: MambaSpec, local_tp: int
) -> "MambaConvSplitInfo":
    """The parts of a state: a page is no convolution window, and a state of all its bytes."""
    if mamba_spec.mamba_type != MambaAttentionBackendEnum[BACKEND_NAME]:
        return host(mamba_spec, local_tp)
    from vllm.distributed.kv_transfer.kv_connector.v1.ssm_conv_transfer_utils import (
        MambaConvSplitInfo,
    )

    return MambaConvSplitInfo(
        conv_rows=0,
        local_proj_dims=(),
        conv_dtype_size=1,
        ssm_sizes=(0, mamba_spec.page_size_bytes),
    )


def refuse_other_pages(
    host: Callable[..., tuple[set[str], set[str]]], worker: Any, transfers: dict[str, list[int]]
) -> tuple[set[str], set[str]]:
    """Requests whose blocks have been read, and those that failed: also if pages are another's.

    The other server frees blocks that nobody has read in time, and uses them again.
    """
    done, failed = host(worker, transfers)
    for request in done - failed:
        read = worker._recving_metadata[request]
        length = read.remote.num_tokens or 0
        if wrong := _spans_of_others(worker, read.local_block_ids, length):
            failed.add(request)
            logger.error(
                "qwen3next_plugin: request %s fails: pages continue at %s, not at %d, so the "
                "prefill server has used its blocks again; ask for the answer sooner, or set a "
                "longer kv_lease_duration there (30 seconds by default)",
                *(request, wrong, length),
            )
    return done, failed


def _spans_of_others(
    worker: Any, blocks: tuple[list[int], ...], length: int
) -> list[tuple[int, int]]:
    """Of the pages in these blocks, by cache group, the spans that cannot continue at `length`."""
    layout = page_layout(read_config(worker.vllm_config), worker.vllm_config)
    found = (
        _span(layout, worker.device_kv_caches[name], block * group.kv_cache_spec.page_size_bytes)
        # No blocks at all: all are cached here.
        for group, numbers in zip(worker.kv_cache_config.transfer_groups, blocks, strict=False)
        if isinstance(group.kv_cache_spec, MambaSpec)
        for name in group.layer_names
        for block in numbers
    )
    most = layout.num_drafts + 1
    return [(s, e) for s, e in found if not 0 <= s <= length <= e <= s + most]


def _span(layout: PageLayout, pages: torch.Tensor, offset: int) -> tuple[int, int]:
    """Of the page that begins so many bytes into a layer's pages."""
    page = (ctypes.c_char * layout.page_bytes).from_address(pages.data_ptr() + offset)
    start, end = layout.view(torch.frombuffer(page, dtype=torch.uint8)[None]).span[0].tolist()
    return start, end


@contextmanager
def beside_computation(vllm_config: VllmConfig) -> Iterator[None]:
    """While vLLM makes its NIXL connector: leave all cores to those who compute.

    vLLM moves this thread, one of them, to the last core. Remove when it leaves the thread where
    it is.
    """
    if not hands_over(vllm_config):
        yield
        return
    cores = os.sched_getaffinity(0)
    try:
        with waiting(sys.modules[nixl_utils.NixlWrapper.__module__].nixlBind):
            yield
    finally:
        os.sched_setaffinity(0, cores)
