"""Copies a request's page when it crosses a block boundary, for vLLM's model runner V2.

vLLM's prefix caching ("align" mode) keeps the state of a prefix in the block that ends with it. Its
own class offsets the copy by the number of accepted drafts, because it has a state per draft. Our
page records the context lengths at which it can continue, so a verbatim copy is always correct:

- the accepted counts stay at 1: with that value vLLM's copy before a step has no offset;
- after a step, the page of each row that filled a block is copied into that block.

Both copies use vLLM's own kernel, which does nothing where there is nothing to copy, and never
wait for the device. Model runner V2 asks the model for this class; nothing else imports it.
"""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from qwen3next_plugin.engines.patching import override


class Qwen3NextModelState(MambaHybridModelState):
    """vLLM's state of a hybrid model, with one self-describing page per request.

    `_mamba_state_idx_gpu` [max_num_reqs] is vLLM's: the column of each request's page in its block
    table, advanced by `preprocess_state` before each step.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        # One entry more than requests, for the rows that vLLM masks with -1.
        columns = torch.full((2, self.max_num_reqs + 1), -1, dtype=torch.int32, device=device)
        self._from_column, self._to_column = columns
        self._no_shift = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)

    @override(
        "vllm.v1.worker.gpu.model_states.mamba_hybrid.MambaHybridModelState.postprocess_state",
        reason="vLLM copies states by accepted counts; a page is copied whole",
        remove_when="a model can declare that its state is copied whole",
    )
    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor | int,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> None:
        """Copy the page of each row that filled a block into that block; counts stay at 1.

        Also when the boundary is inside a verified draft: the page's window spans the boundary. A
        prefill chunk needs no copy, because vLLM ends the chunk, and so its page, at the boundary.

        Shapes:
            idx_mapping [N], each row's request or -1
            num_sampled [N], tokens committed by this step
            num_computed_tokens [max_num_reqs], after this step
        """
        pages = self._mamba_ctx if self._align_mode else None
        if pages is None or num_computed_tokens is None or not len(idx_mapping):
            return
        reached = num_computed_tokens[idx_mapping]
        full_blocks = reached // pages.block_size
        filled_one = full_blocks > (reached - num_sampled) // pages.block_size
        column = self._mamba_state_idx_gpu[idx_mapping]
        self._from_column[idx_mapping] = torch.where(filled_one, column, -1)  # -1: no copy
        self._to_column[idx_mapping] = full_blocks - 1
        pages.run_fused_precopy(
            len(idx_mapping), self._to_column, self._from_column, self._no_shift, idx_mapping
        )
