"""The linear-attention backend: turns SGLang's forward batch into a Step, and runs the layers."""

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.hybrid_linear_attn_backend import HybridLinearAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from qwen3next_plugin.engines.sglang.state.pages import PagePool
from qwen3next_plugin.engines.sglang.state.tree_steps import TreeStep
from qwen3next_plugin.model.gated_delta_net import attend
from qwen3next_plugin.model.state import StateError
from qwen3next_plugin.model.step import Step, build_step

if TYPE_CHECKING:
    from qwen3next_plugin.engines.sglang.model.linear_attention import GatedDeltaNet


class StepBuilder:
    """Builds one Step per engine step from lengths and slots alone.

    SGLang's own backend scatters states by the number of accepted drafts. Ours needs no count: a
    page records where it ends, so a roll-back needs only the context length.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool

    def build(self, forward_batch: ForwardBatch, slot: torch.Tensor) -> Step:
        """Build the step of this batch. Shapes: slot [N]."""
        N, seq_lens = forward_batch.batch_size, forward_batch.seq_lens
        if forward_batch.forward_mode.is_target_verify():  # lengths do not count the chains
            query_start_loc = forward_batch.spec_info.query_start_loc
            seq_lens = seq_lens + query_start_loc.diff()
        elif forward_batch.forward_mode.is_decode_or_idle():
            query_start_loc = torch.arange(N + 1)
        else:
            query_start_loc = torch.zeros(N + 1, dtype=torch.int64)
            query_start_loc[1:] = forward_batch.extend_seq_lens.cumsum(0)
        return build_step(
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            slot=slot,
            num_tokens=int(query_start_loc[-1]),
            num_slots=self.pool.num_slots,
            max_query_len=int(query_start_loc.diff().max()),
        )

    def build_tree(self, forward_batch: ForwardBatch, slot: torch.Tensor) -> TreeStep:
        """Build the step that verifies this batch's draft trees. Shapes: slot [N]."""
        spec_info = forward_batch.spec_info
        return TreeStep.build(
            next_token=spec_info.retrieve_next_token,
            next_sibling=spec_info.retrieve_next_sibling,
            context_len=forward_batch.seq_lens,
            slot=slot,
            num_slots=self.pool.pages.shape[1],
            first_branch=self.pool.num_slots,
        )


class GatedDeltaNetBackend(AttentionBackend):
    """Holds the step of the running forward pass, and the pages of all linear layers."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.pool: PagePool = self.req_to_token_pool.mamba_pool
        self.builder = self.make_builder(runner)
        self.views = {layer: self.pool.view(layer) for layer in self.pool.mamba_layer_ids}
        self.parts = {layer: self.pool.view_parts(layer) for layer in self.views}
        self.rids: list[str] | None = None
        self.step: Step
        self.tree: TreeStep | None = None

    def make_builder(self, runner: Any) -> StepBuilder:
        return StepBuilder(self.pool)

    def supports_prefill_graph_extend(self) -> bool:
        """False: a prompt's graph is cut at linear layers."""
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Build the step that all linear layers share."""
        self.rids, self.tree = forward_batch.rids, None
        slot = self.req_to_token_pool.get_mamba_indices(forward_batch.req_pool_indices)
        spec_info = forward_batch.spec_info
        if forward_batch.forward_mode.is_target_verify() and spec_info.tree_topk != 1:
            self.tree = self.builder.build_tree(forward_batch, slot)
            self.pool.copy_from(self.tree.source, self.tree.branch)
            self.step = self.tree.step
        else:
            self.step = self.builder.build(forward_batch, slot)

    def attend(self, layer: "GatedDeltaNet", qkvz: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
        """Run a layer's recurrence on this step's rows.

        Shapes:
            qkvz [T, H·(2K + 2R·V)], ba [T, H·2R], returns [T, HV·V]

        Raises:
            StateError: a page that cannot serve the step; names request and layer.
        """
        if self.tree is not None:
            return self._attend_tree(self.tree, layer, qkvz, ba)
        return self._run(layer, qkvz, ba)

    def _attend_tree(
        self, tree: TreeStep, layer: "GatedDeltaNet", qkvz: torch.Tensor, ba: torch.Tensor
    ) -> torch.Tensor:
        of_paths = self._run(layer, qkvz[tree.token], ba[tree.token])
        out = of_paths.new_zeros(len(qkvz), of_paths.shape[1])
        out[tree.token] = of_paths  # every path computes the same bits for a shared token
        return out

    def _run(self, layer: "GatedDeltaNet", qkvz: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
        try:
            return attend(
                qkvz=qkvz,
                ba=ba,
                weights=layer.weights,
                shape=layer.shape,
                pool_=self.views[layer.layer_id],
                step=self.step,
            )
        except RuntimeError as error:
            raise self.state_error(layer.prefix, error) from error

    def state_error(self, layer: str, error: RuntimeError) -> StateError:
        """The error of a layer's kernel, with the request that it names."""
        state_error = StateError(layer, str(error))
        if state_error.row is None or self.rids is None or self.tree is not None:
            return state_error
        return StateError(f"request {self.rids[state_error.row]}, {layer}", str(error))

    def commit(self, last_node: torch.Tensor) -> None:
        """After verifying a tree: keep each request's page of the accepted path."""
        if self.tree is not None:
            source, target = self.tree.accepted(last_node.tolist())
            self.pool.copy_from(torch.tensor(source).long(), torch.tensor(target).long())


class HybridBackend(HybridLinearAttnBackend):
    """SGLang's pair of backends; no states are scattered after a verification."""

    linear_attn_backend: GatedDeltaNetBackend

    def update_mamba_state_after_mtp_verify(
        self, last_correct_step_indices: torch.Tensor, *_: Any, **__: Any
    ) -> None:
        """Shapes: last_correct_step_indices [N], the last accepted node of each tree."""
        self.linear_attn_backend.commit(last_correct_step_indices)
