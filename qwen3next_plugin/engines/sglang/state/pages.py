"""State pages in SGLang's pool: one opaque page for each request and linear layer, with drafts too.

SGLang stores a convolution window and S as separate tensors, and one of each per draft token. Here
one page holds both (model/state.py), and every copy of a page is a correct copy.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.configs.mamba_utils import (
    BaseLinearStateParams,
    Mamba2StateDType,
    mamba2_state_dtype,
)
from sglang.srt.configs.model_config import _get_and_verify_dtype
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import GB, MambaPool
from sglang.srt.runtime_context import (
    get_model,
    get_parallel,
    get_spec,
    max_speculative_num_draft_tokens,
)
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from qwen3next_plugin.engines.sglang.config import read_config
from qwen3next_plugin.kernels.copy_pages import copy_pages
from qwen3next_plugin.model.state import PageLayout, StatePool, state_dtype

ALIGNMENT = 64  # bytes: each page starts at a cache line


def page_layout(hf_config: Any) -> PageLayout:
    """The page of a linear layer on this rank, under the current flags.

    All have room for what another layer keeps in some: SGLang's pool has pages of one size.
    """
    config = read_config(hf_config, get_parallel().tp_size)
    name = str(mamba2_state_dtype(hf_config).temporal).removeprefix("torch.")
    return PageLayout.from_config(
        config,
        num_drafts=max_drafts(),
        activation_dtype=_get_and_verify_dtype(hf_config, get_model().dtype),
        state_dtype=state_dtype(name, setting="mamba_ssm_dtype", flag="--mamba-ssm-dtype"),
        shared=True,
    )


def max_drafts() -> int:
    """The most tokens of a row that a roll-back removes: a draft's depth, or 0 without drafts."""
    spec = get_spec()
    if not spec.speculative_algorithm:
        return 0
    if spec.speculative_adaptive:  # SGLang changes speculative_num_steps
        return (max_speculative_num_draft_tokens() or 1) - 1
    return spec.speculative_num_steps or 0


@dataclass(frozen=True, slots=True)
class PageShape:
    """The shape of a page in SGLang's terms: no convolution window, and a state of bytes."""

    layout: PageLayout

    @property
    def conv(self) -> list[tuple[int, ...]]:
        return []

    @property
    def temporal(self) -> tuple[int]:
        return (-(-self.layout.page_bytes // ALIGNMENT) * ALIGNMENT,)


@dataclass(kw_only=True, frozen=True)
class PageParams(BaseLinearStateParams):
    """SGLang's parameters of a model's linear layers."""

    shape: PageShape


def page_params(hf_config: Any) -> PageParams:
    """The page sizes that SGLang computes its pools from; replaces `mamba2_cache_params`."""
    layout = page_layout(hf_config)
    return PageParams(
        shape=PageShape(layout),
        layers=hf_config.linear_layer_ids,
        dtype=Mamba2StateDType(conv=layout.activation_dtype, temporal=torch.uint8),
    )


class PagePool(MambaPool):
    """SGLang's pool of states, holding pages; SGLang allocates, copies and frees the slots."""

    replayssm_write_pos = replayssm_spec_write_pos = replayssm_cache_base = None
    replayssm_spec_fold = replayssm_is_kda = False
    enable_linear_replayssm = enable_linear_replayssm_spec = False
    conv_shard_groups, conv_slice_axis = None, 0

    def __init__(
        self,
        *,
        size: int,
        spec_state_size: int,
        cache_params: PageParams,
        mamba_layer_ids: list[int],
        device: str,
        enable_memory_saver: bool = False,
        speculative_eagle_topk: int | None = None,
        **_: Any,  # sizes of windows, snapshots and rings, which pages do not need
    ) -> None:
        self.size, self.device, self.debug_memory_pool = size, device, False
        self.mamba_layer_ids = list(mamba_layer_ids)
        self.num_mamba_layers = len(mamba_layer_ids)
        self.layout = cache_params.shape.layout
        self.num_slots = size + 1  # SGLang's ids begin at 1
        branches = max_branches(speculative_eagle_topk)
        # The slots after those are for branches of draft trees: a step copies pages there and back.
        slots = self.num_slots + spec_state_size * branches
        saver = TorchMemorySaverAdapter.create(enable=enable_memory_saver)
        with saver.region(GPU_MEMORY_TYPE_KV_CACHE):
            pages = torch.empty(  # the system provides memory as it is touched
                (self.num_mamba_layers, slots, *cache_params.shape.temporal),
                dtype=torch.uint8,
                device=device,
            )
        self.mamba_cache = self.State(conv=[], temporal=pages)
        self.mem_usage = pages.nbytes / GB

    @property
    def pages(self) -> torch.Tensor:
        """All pages [layers, slots, bytes] uint8."""
        return self.mamba_cache.temporal

    def view(self, layer_id: int) -> StatePool:
        """The pages of one layer as the tensors they hold."""
        return self.layout.view(self.pages_of(layer_id).squeeze(0))

    def view_parts(self, layer_id: int) -> dict[str, torch.Tensor]:
        """All parts of the pages of one layer, by name."""
        return self.layout.view_parts(self.pages_of(layer_id).squeeze(0))

    def pages_of(self, layer_id: int) -> torch.Tensor:
        """The pages of one layer [1, slots, bytes] uint8."""
        i = self.mamba_layer_ids.index(layer_id)
        return self.pages[i : i + 1]

    def clear_slots(self, indices: torch.Tensor) -> None:
        """Nothing to clear: a row with an empty context ignores its page's content."""

    def get_cpu_copy(self, indices: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Windows, of which there are none, and pages, for SGLang's `load_cpu_copy`.

        On a CPU SGLang's own is no copy of a page, but the page, where `indices` is one slot.
        """
        return [], self.pages[:, indices].to("cpu", copy=True)

    def copy_from(self, src_indices: torch.Tensor, dst_indices: torch.Tensor) -> None:
        """Copy whole pages. Shapes: both [M]."""
        source, target = src_indices.int(), dst_indices.long()
        every = torch.ones_like(source, dtype=torch.bool)
        copy_pages(pages_=self.pages, source=source, target=target, mask=every)


def max_branches(topk: int | None) -> int:
    """Upper bound on the extra branches of a draft tree; a chain has none."""
    # Every node but the root may be a leaf, and one leaf uses the request's own page.
    return max(0, get_spec().speculative_num_draft_tokens - 2) if (topk or 0) > 1 else 0
