"""SGLang's CPU attention backend, for chains of different lengths."""

import torch
from sglang.srt.layers.attention.intel_amx_backend import IntelAMXAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from qwen3next_plugin.engines.sglang.speculation.verify_input import RaggedVerifyInput

Metadata = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


class AttentionBackend(IntelAMXAttnBackend):
    """Verifies of each request the tokens that it has."""

    def _build_extend_metadata(self, forward_batch: ForwardBatch) -> Metadata:
        """Sequence lengths, new tokens, where they start, and no mask. Shapes: [N] each."""
        chains = forward_batch.spec_info
        if not isinstance(chains, RaggedVerifyInput):
            return super()._build_extend_metadata(forward_batch)
        counts = chains.query_start_loc.diff().int()
        return forward_batch.seq_lens + counts, counts, chains.query_start_loc[:-1].int(), None
