"""Drafter: for each request the fastest number of drafts, which may be none.

Replaces the loop of vLLM's EagleProposer, which runs every request through the MTP layer for each
draft in every step. vLLM still loads the layer and manages its cache, and its runner calls
`propose` after each step. mtp/loop.py decides.
"""

import time
from copy import copy
from typing import Any

import numpy as np
import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from qwen3next_plugin import env
from qwen3next_plugin.engines.vllm.metrics import worker_board
from qwen3next_plugin.engines.vllm.names import HANDOVER, LOGGER
from qwen3next_plugin.engines.vllm.speculation.chains import Chains
from qwen3next_plugin.engines.vllm.speculation.finished import finished
from qwen3next_plugin.engines.vllm.speculation.sampler import NO_TOKEN
from qwen3next_plugin.mtp.loop import Loop, usable_drafts
from qwen3next_plugin.mtp.metrics import Observer
from qwen3next_plugin.mtp.policy import make_policy

logger = init_logger(LOGGER)


def _is_shipped(transfer: KVTransferConfig | None) -> bool:
    """Whether a KV connector may send the MTP layer's cache at any time, so it must be complete."""
    if transfer is None:
        return False
    return transfer.is_kv_producer or transfer.kv_connector != HANDOVER


class Drafter(Chains):
    """vLLM's drafter with our loop; one per worker. It also reads the runner's requests."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any) -> None:
        super().__init__(_alone(vllm_config), device, runner)
        self.supports_mm_inputs = False  # the loop keeps tokens, not their vectors
        self.runner = runner
        policy = make_policy(self.num_speculative_tokens)
        self.loop = Loop(
            observer=Observer(policy, worker_board(vllm_config), logger.error),
            ranks=get_tp_group(),
            # A pass reads at most as many tokens as a step.
            max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            step_seconds=env.step_seconds() if device.type == "cpu" else 0.0,
            usable_drafts=self._usable_drafts,
            must_run=_is_shipped(vllm_config.kv_transfer_config),
        )
        self.most = 0  # drafts per request that vLLM asks for
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
        """Drafts for each request of the step that just ended. Shapes: those of `finished`."""
        entered = time.perf_counter()
        self.most = num_speculative_tokens
        # `target_positions` of a model that reads images are not those in the sequence.
        positions = self.runner.positions[: len(target_token_ids)]
        requests, loop, seconds = self.runner.input_batch.req_ids, self.loop, entered - self.left
        if len(positions) == len(requests) and loop.continued_by(requests, positions.tolist()):
            token_ids = next_token_ids.to(target_token_ids.dtype)
            fed = loop.plain_step(token_ids, target_hidden_states, seconds)
        else:
            loop.keep_plain()  # so that the loop knows where requests ended
            step = finished(
                self.runner,
                loop,
                query_start_loc=common_attn_metadata.query_start_loc,
                sampled_after=token_indices_to_sample,
                token_ids=target_token_ids,
                positions=positions,
                hidden_states=target_hidden_states,
                next_token_ids=next_token_ids,
            )
            # The runner's requests include preempted ones that wait.
            fed = loop.step(step, self.runner.requests.keys(), seconds)
        drafts: list[list[int]] = [[] for _ in requests]
        if fed:
            self._draft(fed, common_attn_metadata.block_table_tensor, drafts)
        # Includes the time to choose lengths, which without drafts happens every few steps.
        drafting = time.perf_counter() - entered
        loop.drafted(drafting, drafting)
        self.left = time.perf_counter()
        return drafts

    def _usable_drafts(self, request: str, computed: int) -> int:
        state = self.runner.requests[request]
        end = min(self.runner.max_model_len, self.draft_model_config.max_model_len)
        if (params := state.sampling_params) is not None and params.max_tokens is not None:
            end = min(end, state.num_prompt_tokens + params.max_tokens)
        return min(self.most, usable_drafts(end, computed))

    def prepare_next_token_ids_padded(
        self,
        sampled_token_ids: torch.Tensor,
        requests: Any,
        gpu_input_batch: Any,
        discard_request_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's last token, and how many it has. Shapes: sampled_token_ids [N, drafts + 1].

        vLLM also looks for the token after an unfinished prompt. That is done in `finished`; here
        it has any token.
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


def _alone(vllm_config: VllmConfig) -> VllmConfig:
    """The config without data parallelism: each engine has all experts of its MTP layer.

    So each engine can draft independently of the others.
    """
    if vllm_config.parallel_config.data_parallel_size == 1:
        return vllm_config
    alone = copy(vllm_config)
    alone.parallel_config = copy(vllm_config.parallel_config)
    alone.parallel_config.reconfigure_for_independent_dp_rank()
    return alone
