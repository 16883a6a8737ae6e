"""The linear-attention backend on a GPU: no wait for it, steps that CUDA graphs keep, snapshots.

A snapshot is the copy of a page that SGLang's radix cache keeps of a request that runs on, in a
slot of its own ("extra_buffer"), so that its scheduler may run a step ahead of the GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, cast

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
    eager_on_graph,
    is_in_breakable_cuda_graph,
)
from sglang.srt.model_executor.runner_utils.prefill_graph import is_in_prefill_graph_scope
from sglang.srt.runtime_context import mamba_cache_chunk_size
from sglang.srt.utils import is_pin_memory_available

from qwen3next_plugin.engines.sglang.state.steps import HybridBackend, LinearBackend
from qwen3next_plugin.kernels.copy_pages import copy_pages
from qwen3next_plugin.model.gated_delta_net import attend, launch_idle
from qwen3next_plugin.model.step import NULL_SLOT, DeviceSteps, Step

if TYPE_CHECKING:
    from qwen3next_plugin.engines.sglang.model.linear_attention import GatedDeltaNet


@dataclass(frozen=True, slots=True)
class Copies:
    """Pages to copy, of rows of a step: [M] slots each, and which are to be copied."""

    source: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor

    def run(self, pages_: torch.Tensor) -> None:
        """Shapes: pages_ [layers, slots, bytes]."""
        copy_pages(pages_=pages_, source=self.source, target=self.target, mask=self.mask)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A prompt's rows up to where the radix cache wants a page, that page, and what follows."""

    head: Step
    copies: Copies
    tail: Step | None


class DeviceBackend(LinearBackend):
    """Finds slots and lengths on the device, and gives them to kernels in tensors that stay."""

    extend_dummy_seqs_capped_by_req_pool = True  # there is room for as many rows as requests

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.device = torch.device(runner.device)
        self.steps = DeviceSteps(self.req_to_token_pool.size, self.device)
        self.snapshot: Snapshot | None = None  # in the middle of this step's rows
        self.copies: Copies | None = None  # after this step's last layer
        self.last_layer = self.pool.mamba_layer_ids[-1]
        self._compile(runner.model)

    def _compile(self, model: Any) -> None:
        """Launch each kernel once, on rows that own no page: not at the first request."""
        layer = next(layer for layer in model.model.layers if layer.is_linear).linear_attn
        launch_idle(weights=layer.weights, shape=layer.shape, pool_=self.views[layer.layer_id])
        null = torch.full((1,), NULL_SLOT, dtype=torch.int32, device=self.device)
        Copies(null, null.long(), null == NULL_SLOT).run(self.pool.pages)

    # What SGLang asks of a backend that its graphs capture.

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make room for the largest graph before any is captured."""
        if max_bs > len(self.steps.slot):
            self.steps = DeviceSteps(max_bs, self.device)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """A graph's batch: its last rows, `num_padding` of them, hold what was there before."""
        self._begin(forward_batch, 0 if in_capture else forward_batch.num_padding)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """A batch that runs without a graph."""
        self._begin(forward_batch, 0)

    def update_verify_buffers_to_fill_after_draft(self, *_: Any, **__: Any) -> None:
        """Nothing of a chain's step depends on what is drafted."""

    # A step.

    def _begin(self, forward_batch: ForwardBatch, num_padding: int) -> None:
        """Build the step that all linear layers share, and what is copied of it."""
        mode, N = forward_batch.forward_mode, forward_batch.batch_size
        self.snapshot = self.copies = None
        slot = self.req_to_token_pool.get_mamba_indices(forward_batch.req_pool_indices)
        slot[N - num_padding :] = 0  # a copy, gathered for this step
        if mode.is_decode_or_idle() or mode.is_target_verify():
            drafted = forward_batch.spec_info.draft_token_num if mode.is_target_verify() else 0
            n = drafted or 1
            self.step = self.steps.build(
                query_start_loc=torch.arange(N + 1, device=self.device) * n,
                seq_lens=forward_batch.seq_lens + drafted,  # which do not count drafts
                slot=slot,
                num_tokens=N * n,
                max_query_len=n,
            )
            if mode.is_decode() and getattr(forward_batch, "mamba_track_mask", None) is not None:
                self.copies = Copies(
                    self.step.slot,
                    forward_batch.mamba_track_indices,
                    forward_batch.mamba_track_mask,
                )
            return
        lens = cast(list[int], forward_batch.extend_seq_lens_cpu)
        starts = [0, *accumulate(lens)]
        self.step = self.steps.build(
            query_start_loc=self._upload(starts),
            seq_lens=forward_batch.seq_lens,
            slot=slot,
            num_tokens=starts[-1],
            max_query_len=max(lens),
        )
        if any(forward_batch.mamba_prefill_track_mask_cpu or ()):
            self.snapshot = self._snapshot(forward_batch, lens, starts)

    def _upload(self, values: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        pinned = is_pin_memory_available(self.device)
        return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(
            self.device, non_blocking=True
        )

    def _snapshot(
        self, forward_batch: ForwardBatch, lens: list[int], starts: list[int]
    ) -> Snapshot:
        """Each row as two, up to where its page is kept and from there; others whole in the first.

        SGLang keeps the page of a multiple of its chunk, counted from where the row begins.
        """
        chunk, N = mamba_cache_chunk_size(), len(lens)
        prefix = cast(list[int], forward_batch.extend_prefix_lens_cpu)
        kept = cast(list[bool], forward_batch.mamba_prefill_track_mask_cpu)
        seqlens = cast(list[int], forward_batch.mamba_track_seqlens_cpu)
        heads = [
            min(n, (seqlens[i] - prefix[i]) // chunk * chunk) if kept[i] else n
            for i, n in enumerate(lens)
        ]
        tails = [n - head for n, head in zip(lens, heads, strict=True)]
        cut = [0, *accumulate(chain.from_iterable(zip(heads, tails, strict=True)))]
        query_start_loc, slot = self._upload(cut), self.step.slot
        context_len = torch.stack((self.step.context_len, self.step.context_len), 1)
        context_len[:, 1] += self._upload(heads)
        nobody = torch.full_like(slot, NULL_SLOT)

        def part(first: torch.Tensor, second: torch.Tensor, longest: int) -> Step:
            return Step(
                query_start_loc=query_start_loc,
                slot=torch.stack((first, second), 1).flatten(),
                context_len=context_len.flatten(),
                num_tokens=starts[N],
                max_query_len=longest,
            )

        return Snapshot(
            head=part(slot, nobody, max(heads)),
            copies=Copies(
                slot, forward_batch.mamba_track_indices, self._upload(kept, dtype=torch.bool)
            ),
            tail=part(nobody, slot, max(tails)) if any(tails) else None,
        )

    # A layer.

    def attend(self, layer: "GatedDeltaNet", qkvz: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
        """Run a layer's recurrence on this step's rows; tokens behind them are padding.

        Shapes:
            qkvz [T, H·(2K + 2R·V)], ba [T, H·2R], returns [T, HV·V]
        """
        out = qkvz.new_empty(len(qkvz), layer.shape.num_value_heads * layer.shape.value_dim)
        if is_in_prefill_graph_scope() and is_in_breakable_cuda_graph():
            _between_graphs(layer, qkvz, ba, out)
        else:
            self.run(layer, qkvz, ba, out)
        return out

    def run(
        self, layer: "GatedDeltaNet", qkvz: torch.Tensor, ba: torch.Tensor, out_: torch.Tensor
    ) -> None:
        """As `attend`, to out_ [T, HV·V]."""
        T = self.step.num_tokens
        out_[T:].zero_()
        qkvz, ba, out_ = qkvz[:T], ba[:T], out_[:T]
        if self.snapshot is None:
            self._recurrence(layer, qkvz, ba, self.step, out_)
        else:
            self._recurrence(layer, qkvz, ba, self.snapshot.head, out_)
            self.snapshot.copies.run(self.pool.pages_of(layer.layer_id))
            if self.snapshot.tail is not None:  # a row without a page leaves zeros
                tail = torch.empty_like(out_)
                self._recurrence(layer, qkvz, ba, self.snapshot.tail, tail)
                out_ += tail
        if self.copies is not None and layer.layer_id == self.last_layer:
            self.copies.run(self.pool.pages)

    def _recurrence(
        self,
        layer: "GatedDeltaNet",
        qkvz: torch.Tensor,
        ba: torch.Tensor,
        step: Step,
        out_: torch.Tensor,
    ) -> None:
        attend(
            qkvz=qkvz,
            ba=ba,
            weights=layer.weights,
            shape=layer.shape,
            pool_=self.views[layer.layer_id],
            step=step,
            out_=out_,
        )


def _leave_zeros(
    layer: "GatedDeltaNet", qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor
) -> None:
    """What stands in for the layer while a graph is captured."""
    out.zero_()


@eager_on_graph(capture_stub=_leave_zeros)
def _between_graphs(
    layer: "GatedDeltaNet", qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor
) -> None:
    """A prompt's graph is cut here: its rows are others each time, its tensors are not."""
    get_attn_backend().linear_attn_backend.run(layer, qkvz, ba, out)


class DeviceHybridBackend(HybridBackend):
    """SGLang's pair of backends, where the radix cache keeps pages of requests that run on."""

    linear_attn_backend: DeviceBackend

    def update_mamba_state_after_mtp_verify(
        self,
        last_correct_step_indices: torch.Tensor,
        mamba_track_indices: torch.Tensor | None,
        mamba_steps_to_track: torch.Tensor | None,
        *_: Any,
        **__: Any,
    ) -> None:
        """Keep the page of a request that came past a point where one is wanted.

        The page spans the drafts, so its copy as it is stands for each length among them.

        Shapes: all [N]; mamba_steps_to_track is -1 where no page is wanted
        """
        if mamba_track_indices is None or mamba_steps_to_track is None:
            return
        backend = self.linear_attn_backend
        slot = backend.steps.slot[: len(last_correct_step_indices)]
        Copies(slot, mamba_track_indices, mamba_steps_to_track >= 0).run(backend.pool.pages)
