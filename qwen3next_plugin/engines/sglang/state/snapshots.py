"""Snapshots on a GPU: copies of running requests' pages for SGLang's radix cache.

SGLang keeps them in extra slots ("extra_buffer"), so that its scheduler can run a step ahead of the
GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import cast

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import mamba_cache_chunk_size
from sglang.srt.utils import is_pin_memory_available

from qwen3next_plugin.kernels.copy_pages import copy_pages
from qwen3next_plugin.model.step import NULL_SLOT, Step


@dataclass(frozen=True, slots=True)
class Copies:
    """Pages to copy, one for each of M rows, where the mask is set.

    Shapes:
        source, target [M] slots, mask [M]
    """

    source: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor

    def run(self, pages_: torch.Tensor) -> None:
        """Shapes: pages_ [layers, slots, bytes]."""
        copy_pages(pages_=pages_, source=self.source, target=self.target, mask=self.mask)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A step of prompts in two parts, head and tail, split where pages are to be copied.

    The head is computed, then pages are copied, then the tail is computed.
    """

    head: Step
    copies: Copies
    tail: Step | None

    @classmethod
    def build(cls, step: Step, forward_batch: ForwardBatch) -> "Snapshot":
        """Split each row of the step in two; a row whose page is not copied is all head.

        SGLang wants the page at a multiple of its chunk size, counted from the row's first token.
        """
        chunk, device = mamba_cache_chunk_size(), step.slot.device
        lens = cast(list[int], forward_batch.extend_seq_lens_cpu)
        prefix = cast(list[int], forward_batch.extend_prefix_lens_cpu)
        wanted = cast(list[bool], forward_batch.mamba_prefill_track_mask_cpu)
        seqlens = cast(list[int], forward_batch.mamba_track_seqlens_cpu)
        heads = [
            min(n, (seqlens[i] - prefix[i]) // chunk * chunk) if wanted[i] else n
            for i, n in enumerate(lens)
        ]
        tails = [n - head for n, head in zip(lens, heads, strict=True)]
        cuts = accumulate(chain.from_iterable(zip(heads, tails, strict=True)))
        query_start_loc, slot = upload([0, *cuts], device), step.slot
        context_len = torch.stack((step.context_len, step.context_len), 1)
        context_len[:, 1] += upload(heads, device)
        nobody = torch.full_like(slot, NULL_SLOT)

        def part(first: torch.Tensor, second: torch.Tensor, max_query_len: int) -> Step:
            return Step(
                query_start_loc=query_start_loc,
                slot=torch.stack((first, second), 1).flatten(),
                context_len=context_len.flatten(),
                num_tokens=step.num_tokens,
                max_query_len=max_query_len,
            )

        return cls(
            head=part(slot, nobody, max(heads)),
            copies=Copies(
                slot, forward_batch.mamba_track_indices, upload(wanted, device, torch.bool)
            ),
            tail=part(nobody, slot, max(tails)) if any(tails) else None,
        )


def upload(
    values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """Copy host values to the device without waiting for it."""
    pinned = is_pin_memory_available(device)
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)
