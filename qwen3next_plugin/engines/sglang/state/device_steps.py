"""The linear-attention backend on a GPU: never waits for the GPU, and can run in CUDA graphs."""

from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
    eager_on_graph,
    is_in_breakable_cuda_graph,
)
from sglang.srt.model_executor.runner_utils.prefill_graph import is_in_prefill_graph_scope

from qwen3next_plugin.engines.sglang.state.pages import PagePool
from qwen3next_plugin.engines.sglang.state.snapshots import Copies, Snapshot, upload
from qwen3next_plugin.engines.sglang.state.steps import (
    GatedDeltaNetBackend,
    HybridBackend,
    StepBuilder,
)
from qwen3next_plugin.model.gated_delta_net import attend, launch_idle
from qwen3next_plugin.model.step import NULL_SLOT, DeviceSteps, Step

if TYPE_CHECKING:
    from qwen3next_plugin.engines.sglang.model.linear_attention import GatedDeltaNet


class DeviceStepBuilder(StepBuilder):
    """Builds steps on the device, in tensors that CUDA graphs may keep."""

    def __init__(self, pool: PagePool, max_rows: int, device: torch.device) -> None:
        super().__init__(pool)
        self.device = device
        self.steps = DeviceSteps(max_rows, device)

    def reserve(self, max_rows: int) -> None:
        """Make room for the largest graph, before any is captured."""
        if max_rows > len(self.steps.slot):
            self.steps = DeviceSteps(max_rows, self.device)

    def build(self, forward_batch: ForwardBatch, slot: torch.Tensor) -> Step:
        """Build the step of this batch. Shapes: slot [N]."""
        mode, N = forward_batch.forward_mode, forward_batch.batch_size
        seq_lens = forward_batch.seq_lens
        if mode.is_target_verify():  # lengths do not count the drafts
            max_query_len = forward_batch.spec_info.draft_token_num
            query_start_loc = torch.arange(N + 1, device=self.device) * max_query_len
            num_tokens, seq_lens = N * max_query_len, seq_lens + max_query_len
        elif mode.is_decode_or_idle():
            query_start_loc = torch.arange(N + 1, device=self.device)
            num_tokens, max_query_len = N, 1
        else:
            lens = cast(list[int], forward_batch.extend_seq_lens_cpu)
            starts = [0, *accumulate(lens)]
            query_start_loc = upload(starts, self.device)
            num_tokens, max_query_len = starts[-1], max(lens)
        return self.steps.build(
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            slot=slot,
            num_tokens=num_tokens,
            max_query_len=max_query_len,
        )


class DeviceGatedDeltaNetBackend(GatedDeltaNetBackend):
    """Runs layers without waiting; copies pages for the snapshots of SGLang's radix cache."""

    extend_dummy_seqs_capped_by_req_pool = True  # there is room for as many rows as requests
    builder: DeviceStepBuilder

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.snapshot: Snapshot | None = None  # pages wanted in the middle of this step's rows
        self.copies: Copies | None = None  # pages wanted after this step's last layer
        self.last_layer = self.pool.mamba_layer_ids[-1]
        self._compile(runner.model)

    def make_builder(self, runner: Any) -> DeviceStepBuilder:
        device = torch.device(runner.device)
        return DeviceStepBuilder(self.pool, self.req_to_token_pool.size, device)

    def _compile(self, model: Any) -> None:
        """Launch each kernel once, on rows without a page, so that no request waits for it."""
        layer = next(layer for layer in model.model.layers if layer.is_linear).linear_attn
        launch_idle(weights=layer.weights, shape=layer.shape, pool_=self.views[layer.layer_id])
        null = torch.full((1,), NULL_SLOT, dtype=torch.int32, device=self.builder.device)
        Copies(null, null.long(), null == NULL_SLOT).run(self.pool.pages)

    # What SGLang asks of a backend that runs in CUDA graphs.

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make room for the largest graph, before any is captured."""
        self.builder.reserve(max_bs)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """A graph's batch: its last `num_padding` rows are left over from an earlier batch."""
        self._begin(forward_batch, 0 if in_capture else forward_batch.num_padding)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """A batch that runs without a graph."""
        self._begin(forward_batch, 0)

    def update_verify_buffers_to_fill_after_draft(self, *_: Any, **__: Any) -> None:
        """Nothing to fill: the step of a chain does not depend on the drafted tokens."""

    # A step.

    def _begin(self, forward_batch: ForwardBatch, num_padding: int) -> None:
        """Build the step that all linear layers share, and the copies that it makes."""
        mode, N = forward_batch.forward_mode, forward_batch.batch_size
        slot = self.req_to_token_pool.get_mamba_indices(forward_batch.req_pool_indices)
        slot[N - num_padding :] = 0  # in place: the tensor was gathered for this step
        self.step = self.builder.build(forward_batch, slot)
        self.snapshot = self.copies = None
        if mode.is_target_verify():
            return
        if mode.is_decode_or_idle():
            mask = getattr(forward_batch, "mamba_track_mask", None)
            if mode.is_decode() and mask is not None:
                self.copies = Copies(self.step.slot, forward_batch.mamba_track_indices, mask)
        elif any(forward_batch.mamba_prefill_track_mask_cpu or ()):
            self.snapshot = Snapshot.build(self.step, forward_batch)

    # A layer.

    def attend(self, layer: "GatedDeltaNet", qkvz: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
        """Run a layer's recurrence on this step's rows; tokens after them are padding.

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
        """As `attend`, into out_ [T, HV·V]."""
        T = self.step.num_tokens
        out_[T:].zero_()
        qkvz, ba, out_ = qkvz[:T], ba[:T], out_[:T]
        if self.snapshot is None:
            self._recurrence(layer, qkvz, ba, self.step, out_)
        else:
            self._recurrence(layer, qkvz, ba, self.snapshot.head, out_)
            self.snapshot.copies.run(self.pool.pages_of(layer.layer_id))
            if self.snapshot.tail is not None:  # a row without a page yields zeros
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


def _write_zeros(
    layer: "GatedDeltaNet", qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor
) -> None:
    """Replaces the layer while a graph is captured."""
    out.zero_()


@eager_on_graph(capture_stub=_write_zeros)
def _between_graphs(
    layer: "GatedDeltaNet", qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor
) -> None:
    """A prompt's graph is cut here, because its rows change from step to step."""
    get_attn_backend().linear_attn_backend.run(layer, qkvz, ba, out)


class DeviceHybridBackend(HybridBackend):
    """SGLang's pair of backends on a GPU, with snapshots after a verification."""

    linear_attn_backend: DeviceGatedDeltaNetBackend

    def update_mamba_state_after_mtp_verify(
        self,
        last_correct_step_indices: torch.Tensor,
        mamba_track_indices: torch.Tensor | None,
        mamba_steps_to_track: torch.Tensor | None,
        *_: Any,
        **__: Any,
    ) -> None:
        """Copy the page of each request that passed a point where a snapshot is wanted.

        The page spans the drafts, so one copy is correct for every accepted length among them.

        Shapes:
            all [N]; mamba_steps_to_track is -1 where no snapshot is wanted
        """
        if mamba_track_indices is None or mamba_steps_to_track is None:
            return
        backend = self.linear_attn_backend
        slot = backend.builder.steps.slot[: len(last_correct_step_indices)]
        Copies(slot, mamba_track_indices, mamba_steps_to_track >= 0).run(backend.pool.pages)
