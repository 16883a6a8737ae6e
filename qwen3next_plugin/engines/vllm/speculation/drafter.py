"""Drafter: drafts as many tokens as pay, for each request its own number, down to none.

Replaces the loop of vLLM's EagleProposer, which runs every request through the MTP layer k times
in every step. vLLM still loads the layer and manages its cache.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from qwen3next_plugin.engines.vllm.metrics import worker_board
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.engines.vllm.speculation.chains import Chains
from qwen3next_plugin.engines.vllm.speculation.finished import FinishedStep
from qwen3next_plugin.engines.vllm.speculation.sampler import NO_TOKEN
from qwen3next_plugin.mtp.metrics import Observer
from qwen3next_plugin.mtp.pending import Pending, Row, choose_lengths
from qwen3next_plugin.mtp.plain_steps import PlainSteps, wait_after
from qwen3next_plugin.mtp.policy import make_policy

logger = init_logger(LOGGER)


class Drafter(Chains):
    """vLLM's drafter with our loop; one per worker. It also reads the runner's requests."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.policy = make_policy(self.num_speculative_tokens)
        self.observer = Observer(self.policy, worker_board(vllm_config), logger.error)
        self.pending = Pending()
        # A KV connector ships the layer's cache at any time, so no token may be missing from it.
        self.must_run = vllm_config.kv_transfer_config is not None
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens  # of one pass
        self.next_position: dict[str, int] = {}  # of each request that may continue
        self.plain: PlainSteps | None = None  # if the next step may be one of them
        self.idle = 0  # steps in a row for which nothing was drafted
        self.wait = 0  # more of them until lengths are chosen, also if requests come and go
        self.left = 0.0  # when the last call of propose ended

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
        """Draft up to k tokens for each request of the step that just ended.

        Shapes:
            target_token_ids, target_positions [T], target_hidden_states [T, D] of the step's
            tokens, rejected drafts included; next_token_ids [N], the last sampled tokens;
            token_indices_to_sample [N], the indices of the tokens that they were sampled after
            (None: the last token of each row)
        """
        entered = time.perf_counter()
        # `target_positions` of a model that reads images are not those in the sequence.
        positions = self.runner.positions[: len(target_token_ids)]
        requests, table = self.runner.input_batch.req_ids, common_attn_metadata.block_table_tensor
        seconds = entered - self.left
        if (
            self.plain is not None
            and len(target_token_ids) == len(requests)
            and self.plain.continued_by(requests, positions.tolist())
        ):
            token_ids = next_token_ids.to(target_token_ids.dtype)
            self.idle += 1
            self.plain.add(token_ids, target_hidden_states, seconds)
            rows = self._look(self.plain) if self._is_time() else []
        else:
            self._keep_plain()
            step = self._finished(
                common_attn_metadata.query_start_loc,
                token_indices_to_sample,
                target_token_ids,
                positions,
                target_hidden_states,
                next_token_ids,
            )
            if token_indices_to_sample is None and not self.must_run and not self._is_time():
                rows = []
                self._skip(step, target_token_ids, seconds)
            else:
                rows = self._look_at(step, target_token_ids, seconds)
        drafts: list[list[int]] = [[] for _ in requests]
        if rows:
            self._limit_drafts(rows, num_speculative_tokens)
            # A pass reads at most as many tokens as a step.
            if fed := self.pending.feed(rows, self.max_tokens, every=self.must_run):
                self._draft(fed, table, drafts)
            # Choosing lengths counts: without drafts that is done every few steps.
            drafting = time.perf_counter() - entered
            self.observer.observe_draft(rows, passes_seconds=drafting, seconds=drafting)
        self.left = time.perf_counter()
        return drafts

    def prepare_next_token_ids_padded(
        self,
        sampled_token_ids: torch.Tensor,
        requests: Any,
        gpu_input_batch: Any,
        discard_request_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each request's last token, and how many it has. Shapes: sampled_token_ids [N, k + 1].

        vLLM also looks for the token after an unfinished prompt. That is done in `_finished`;
        here it has any token.
        """
        if sampled_token_ids.shape[1] == 1:
            next_token_ids = sampled_token_ids[:, 0]
            return next_token_ids, torch.ones_like(next_token_ids)
        rows = sampled_token_ids.tolist()
        counts = [len(row) - row.count(NO_TOKEN) for row in rows]
        last = [row[count - 1] for row, count in zip(rows, counts, strict=True)]
        return torch.tensor(last), torch.tensor(counts)

    def prepare_inputs_padded(
        self,
        common_attn_metadata: CommonAttentionMetadata,
        spec_decode_metadata: SpecDecodeMetadata,
        valid_sampled_tokens_count: torch.Tensor,
    ) -> tuple[CommonAttentionMetadata, torch.Tensor | None, torch.Tensor | None]:
        """The index of the token after which each request's last one was sampled.

        Nothing else changes: `_forward` makes its own metadata.
        """
        drafts = spec_decode_metadata.num_draft_tokens
        if not any(drafts):
            return common_attn_metadata, None, None
        ends = common_attn_metadata.query_start_loc.numpy()[1:]
        rejected = np.array(drafts) + 1 - valid_sampled_tokens_count.numpy()
        return common_attn_metadata, torch.from_numpy(ends - 1 - rejected), None

    def _finished(
        self,
        query_start_loc: torch.Tensor,
        sampled_after: torch.Tensor | None,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
    ) -> FinishedStep:
        """The step; its tokens are shifted by one, as the MTP layer reads them."""
        known = self.runner.requests.keys()  # those that wait after a preemption included
        self.observer.keep_only(known)
        self.pending.keep_only(known)
        bounds = query_start_loc.numpy()
        ends = bounds[1:] if sampled_after is None else sampled_after.numpy() + 1
        firsts = positions.numpy()[bounds[:-1]].tolist()
        requests = list(self.runner.input_batch.req_ids)
        states = [self.runner.requests[request] for request in requests]
        prefilling = self.runner.discard_request_mask.np[: len(firsts)].tolist()
        after = np.empty_like(token_ids.numpy())  # the token after each [T]
        after[:-1] = token_ids.numpy()[1:]
        after[ends - 1] = next_token_ids.numpy()
        step = FinishedStep(
            requests=requests,
            starts=bounds[:-1].tolist(),
            firsts=firsts,
            scheduled=np.diff(bounds).tolist(),
            counts=(ends - bounds[:-1]).tolist(),
            prefilling=prefilling,
            continues=[  # streaming input adds to a prompt where its answer ended
                self.next_position.get(request) == first >= state.num_prompt_tokens
                for request, first, state in zip(requests, firsts, states, strict=True)
            ],
            token_ids=torch.from_numpy(after),
            hidden_states=hidden_states,
        )
        for i in (i for i, more in enumerate(prefilling) if more):
            # vLLM gives the prompt's last token, not the one after the chunk
            token = _token_at(states[i], step.ends[i])
            after[step.starts[i] + step.counts[i] - 1] = token
        return step

    def _is_time(self) -> bool:
        """Count a step without drafts; whether lengths are chosen after it."""
        self.wait -= 1
        return self.wait <= 0

    def _skip(self, step: FinishedStep, token_ids: torch.Tensor, seconds: float) -> None:
        """Keep a step without drafts for the MTP layer. Shapes: token_ids [T] of the step."""
        if all(step.continues):
            self.plain = self._plain_from(step.requests, step.firsts)
            self.plain.add(step.token_ids, step.hidden_states, seconds)
            return
        self.model.see(token_ids)
        self.pending.put([step.row(i) for i, one in enumerate(step.continues) if not one])
        if decoding := [i for i, continues in enumerate(step.continues) if continues]:
            requests = [step.requests[i] for i in decoding]
            self.observer.observe_plain(requests, 1, ())
            self.observer.observe_skipped(len(requests))
            at = torch.tensor([step.starts[i] for i in decoding])
            self.pending.put_steps(
                requests,
                [step.firsts[i] for i in decoding],
                [step.token_ids[at]],
                [step.hidden_states[at]],
            )
        self._go_on(step.requests, step.ends, step.prefilling)

    def _look_at(self, step: FinishedStep, token_ids: torch.Tensor, seconds: float) -> list[Row]:
        """Learn from a step and choose lengths; its rows. Shapes: token_ids [T] of the step."""
        self.model.see(token_ids)
        rows = [step.row(i) for i in range(len(step))]
        self.observer.observe_step(rows, seconds)
        # None where the step read its prompt: an answer's first token does not wait for drafts.
        drafting = [row for row in rows if row.continues]
        for row, length in zip(drafting, self._lengths([r.request for r in drafting]), strict=True):
            row.draft = length
        self._go_on_after(rows)
        return rows

    def _look(self, plain: PlainSteps) -> list[Row]:
        """Learn from plain steps and choose lengths; the rows of the last if they draft."""
        self.model.see(torch.cat(plain.token_ids))
        if rows := plain.look(self._lengths):
            self._go_on_after(rows)
        else:
            self.wait = wait_after(self.idle)
            self.next_position = dict(zip(plain.requests, plain.firsts, strict=True))
        return rows

    def _keep_plain(self) -> None:
        """Keep the plain steps so far for the MTP layer, without choosing lengths."""
        if self.plain is not None and len(self.plain):
            self.model.see(torch.cat(self.plain.token_ids))
            self.plain.keep()
            self.next_position = dict(zip(self.plain.requests, self.plain.firsts, strict=True))

    def _lengths(self, requests: Sequence[str], more: int = 0) -> list[int]:
        return choose_lengths(self.policy, self.pending, requests, more, get_tp_group())

    def _go_on_after(self, rows: list[Row]) -> None:
        """Note where requests go on, and when to choose lengths again."""
        requests, ends = [row.request for row in rows], [row.tokens.end for row in rows]
        self._go_on(requests, ends, [row.prefilling for row in rows])
        if any(row.draft for row in rows):
            self.idle, self.plain = 0, None
        self.wait = wait_after(self.idle)

    def _go_on(self, requests: list[str], ends: list[int], prefilling: list[bool]) -> None:
        """Note where requests go on. Expect plain steps next if all of them decode."""
        going_on = zip(requests, ends, prefilling, strict=True)
        self.next_position = {request: end for request, end, more in going_on if not more}
        self.plain = None
        if not self.must_run and not any(prefilling):
            self.plain = self._plain_from(requests, ends)

    def _plain_from(self, requests: list[str], firsts: list[int]) -> PlainSteps:
        return PlainSteps(requests, firsts, self.observer, self.pending)

    def _limit_drafts(self, rows: list[Row], limit: int) -> None:
        for row in rows:
            if row.draft:
                row.draft = max(0, min(row.draft, limit, self._room(row)))

    def _room(self, row: Row) -> int:
        """How many drafts the request can still use; a step yields one token more."""
        state = self.runner.requests[row.request]
        end = self.runner.max_model_len
        if (params := state.sampling_params) is not None and params.max_tokens is not None:
            end = min(end, state.num_prompt_tokens + params.max_tokens)
        return end - row.tokens.end - 2  # the last sampled token, and the one after the drafts


def _token_at(state: Any, position: int) -> int:
    """A token of a request's prompt; any token if its prompt is of embeddings."""
    return 0 if state.prompt_token_ids is None else state.get_token_id(position)
