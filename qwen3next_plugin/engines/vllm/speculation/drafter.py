"""The propose loop: drafts as long as they pay, each request its own length, down to none.

Replaces the loop of vLLM's EagleProposer, which runs every request through the MTP layer k times
in every step. Loading and the layer's cache stay the host's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

from qwen3next_plugin.engines.vllm import metrics as figures
from qwen3next_plugin.engines.vllm.flags import read_config
from qwen3next_plugin.mtp.metrics import Account
from qwen3next_plugin.mtp.pending import MAX_PENDING, Pending, PendingTokens
from qwen3next_plugin.mtp.policy import make_policy


@dataclass(slots=True)
class Request:
    """A row of the step that just ended."""

    id: str
    index: int  # of the row in the batch
    rows: PendingTokens  # its committed tokens
    scheduled: int  # its tokens in the step, rejected drafts included
    prefilling: bool  # more of the prompt is to come: nothing was sampled
    continues: bool  # drafted for in the step before, so that it was decoded or verified in this
    draft: int = 0  # tokens to draft now

    @property
    def end(self) -> int:
        """The position after its committed tokens, that of the token sampled last."""
        return self.rows.first + len(self.rows)


class Drafter(EagleProposer):
    """vLLM's drafter with our loop; one per worker, with the runner's requests at hand."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        config = read_config(vllm_config)
        self.policy = make_policy(config, self.num_speculative_tokens)
        board = figures.of_worker(vllm_config)
        self.account = Account(board, self.num_speculative_tokens, config.num_linear_layers)
        # A connector ships the cache as it is, so nothing may be behind.
        self.max_pending = MAX_PENDING if vllm_config.kv_transfer_config is None else 0
        self.pending = Pending()
        self.next_position: dict[str, int] = {}  # of each request that may continue
        self.met: set[str] = set()  # requests that the schedule may remember
        self.left = 0.0  # when the last proposal ended

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft for each request of the step that just ended: between none and k tokens.

        Shapes:
            target_token_ids, target_positions [T], target_hidden_states [T, D] of the step's
            tokens, rejected drafts included; next_token_ids [N], the token sampled last;
            token_indices_to_sample [N], where its hidden state lies (None: at the row's end)
        """
        entered = time.perf_counter()
        self.model.see(target_token_ids)
        starts = common_attn_metadata.query_start_loc
        ends = starts[1:] if token_indices_to_sample is None else token_indices_to_sample + 1
        requests = self._requests(
            starts.tolist(),
            ends.tolist(),
            target_token_ids,
            target_positions,
            target_hidden_states,
            next_token_ids,
        )
        self._observe(requests, entered - self.left)
        self._choose_lengths(requests, num_speculative_tokens)
        drafts: list[list[int]] = [[] for _ in requests]
        fed = self._feed(requests)
        if fed:
            began = time.perf_counter()
            self._draft(fed, common_attn_metadata.block_table_tensor, drafts)
            if all(request.continues for request in fed):
                passes = max(request.draft for request in fed)
                seconds = time.perf_counter() - began
                if passes:
                    self.policy.observe_draft(len(requests), passes, seconds)
        self.left = time.perf_counter()
        reads_prompt = any(not request.continues for request in fed)
        self.account.draft(self.left - entered, reads_prompt=reads_prompt)
        self.account.estimates(self.policy.snapshot)
        return drafts

    def _requests(
        self,
        starts: Sequence[int],
        ends: Sequence[int],
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
    ) -> list[Request]:
        """The step's rows with their committed tokens, shifted as the MTP layer takes them."""
        firsts = positions[starts[:-1]].tolist()
        prefilling = self.runner.discard_request_mask.np[: len(firsts)].tolist()
        shifted = torch.empty_like(token_ids)  # [T]
        shifted[:-1] = token_ids[1:]
        shifted[[end - 1 for end in ends]] = next_token_ids.to(token_ids.dtype)
        requests = []
        for i, request in enumerate(self.runner.input_batch.req_ids[: len(firsts)]):
            begin, end, first = starts[i], ends[i], firsts[i]
            if prefilling[i]:  # vLLM gives the prompt's last token for the one after the chunk
                shifted[end - 1] = self.runner.requests[request].get_token_id(first + end - begin)
            rows = PendingTokens(first, shifted[begin:end], hidden_states[begin:end])
            continues = self.next_position.get(request) == first
            scheduled = starts[i + 1] - begin
            requests.append(Request(request, i, rows, scheduled, prefilling[i], continues))
        known = self.runner.requests.keys()
        self.met |= self.next_position.keys()
        for gone in self.met - known:  # the preempted stay known, also while they wait
            self.policy.forget(gone)
            self.account.forget(gone)
        self.met &= known
        self.next_position = {
            request.id: request.end for request in requests if not request.prefilling
        }
        self.pending.keep_only(known)
        return requests

    def _observe(self, requests: list[Request], seconds: float) -> None:
        """Learn from the step: what was accepted, and, where no prompt was read, its time."""
        for request in requests:
            self.account.row(request.id, request.rows.first, request.scheduled, len(request.rows))
            if request.continues:
                self.account.verify(request.scheduled - 1)
            if request.continues and request.scheduled > 1:
                accepted = len(request.rows) - 1
                self.policy.observe_verify(request.id, request.scheduled - 1, accepted)
        if requests and all(request.continues for request in requests):
            tokens = sum(request.scheduled for request in requests)
            self.policy.observe_step(len(requests), tokens, seconds)
            self.account.step(tokens > len(requests), seconds)

    def _choose_lengths(self, requests: list[Request], limit: int) -> None:
        """Set how many tokens each request drafts; the first rank's clock decides for all."""
        drafting = [request for request in requests if not request.prefilling]
        if not drafting:
            return
        lengths = self.policy.lengths([request.id for request in drafting])
        group = get_tp_group()
        if group.world_size > 1:
            lengths = group.broadcast(torch.tensor(lengths, dtype=torch.int64), src=0).tolist()
        for request, length in zip(drafting, lengths, strict=True):
            request.draft = max(0, min(length, limit, self._room(request)))

    def _room(self, request: Request) -> int:
        """How many drafts a step can keep before the request ends: it yields one token more."""
        state = self.runner.requests[request.id]
        end = self.runner.max_model_len
        if (params := state.sampling_params) is not None and params.max_tokens is not None:
            end = min(end, state.num_prompt_tokens + params.max_tokens)
        return end - request.end - 2  # beside the token sampled last and the one after the drafts

    def _feed(self, requests: list[Request]) -> list[Request]:
        """The requests that go through the MTP layer now, with all they are behind."""
        fed = []
        for request in requests:
            if request.draft or self._may_not_lag(request):
                rows = self.pending.take(request.id, request.rows)
                self.account.caught_up(len(rows) - len(request.rows))
                request.rows = rows
                fed.append(request)
            else:
                self.pending.put(request.id, request.rows)
                self.account.skipped()
        return fed

    def _may_not_lag(self, request: Request) -> bool:
        """Whether the request has to go through the MTP layer though it drafts nothing.

        vLLM offers a block to other requests as soon as it is full: whatever were missing in it
        would be missing for all of them. A prompt, of which it offers parts of a block too, is
        never behind.
        """
        fills_block = request.end // self.block_size > request.rows.first // self.block_size
        behind = self.pending.count(request.id) + len(request.rows)
        return (
            request.prefilling or not request.continues or fills_block or behind > self.max_pending
        )

    def _draft(
        self, fed: list[Request], block_table: torch.Tensor, drafts: list[list[int]]
    ) -> None:
        """Run the MTP layer over what they are behind, then over its own drafts."""
        counts = [len(request.rows) for request in fed]
        block_table = block_table[[request.index for request in fed]]
        positions = torch.cat([torch.arange(request.rows.first, request.end) for request in fed])
        hidden_states = self._forward(
            torch.cat([request.rows.token_ids for request in fed]),
            positions,
            torch.cat([request.rows.hidden_states for request in fed]),
            counts,
            block_table,
        )
        ends = torch.tensor(counts).cumsum(0) - 1
        hidden_states, positions = hidden_states[ends], positions[ends]  # [fed, D], [fed]
        token_ids = torch.zeros(len(fed), dtype=torch.int64)
        for depth in range(max(request.draft for request in fed)):
            keep = [i for i, request in enumerate(fed) if request.draft > depth]
            if len(keep) < len(fed):
                fed = [fed[i] for i in keep]
                hidden_states, positions = hidden_states[keep], positions[keep]
                token_ids, block_table = token_ids[keep], block_table[keep]
            if depth > 0:
                positions = positions + 1
                ones = [1] * len(fed)
                hidden_states = self._forward(
                    token_ids, positions, hidden_states, ones, block_table
                )
            token_ids = self.model.get_top_tokens(hidden_states)  # [fed]
            for request, token in zip(fed, token_ids.tolist(), strict=True):
                drafts[request.index].append(token)

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        counts: list[int],
        block_table: torch.Tensor,
    ) -> torch.Tensor:
        """One pass of the MTP layer over `counts` tokens of each row; returns [T, D]."""
        query_start_loc = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        seq_lens = (positions[query_start_loc[1:] - 1] + 1).to(torch.int32)
        row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        block = block_table[row, positions // self.block_size].long()
        slot_mapping = block * self.block_size + positions % self.block_size
        _, metadata = self.build_per_group_and_layer_attn_metadata(
            CommonAttentionMetadata(
                query_start_loc=query_start_loc,
                query_start_loc_cpu=query_start_loc,
                seq_lens=seq_lens,
                seq_lens_cpu_upper_bound=seq_lens,
                num_reqs=len(counts),
                num_actual_tokens=len(positions),
                max_query_len=max(counts),
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=block_table,
                slot_mapping=slot_mapping,
                causal=True,
            )
        )
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=len(positions),
            slot_mapping=dict.fromkeys(metadata, slot_mapping),
        ):
            return self.model(
                # The dtype that vLLM compiled the layer with; it drops the guards that would tell.
                input_ids=token_ids.to(self.input_ids.dtype),
                positions=positions,
                hidden_states=hidden_states,
            )
