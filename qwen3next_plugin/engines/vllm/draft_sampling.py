"""Temperature, top-k and top-p of drafts on the CPU, which vLLM loses.

vLLM spreads these values of a request over its draft tokens by a small kernel. Its CPU version in
0.32 (`_expand_kernel_impl` in `vllm/utils/cpu_triton_utils.py`) writes into a converted copy unless
the values are int64, so the logits are divided by uninitialised memory: with speculation, tokens
sampled at any temperature but 0 are not drawn from the model's distribution.

Installed through vLLM's own `register_kernels`. Can go when vLLM's writes where it is told: the
test marked `compat` in test_sampling.py fails then.
"""

import torch
from vllm.platforms import current_platform

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def install() -> None:
    """Replace the host's kernel by one that keeps the dtype; idempotent."""
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.v1.sample import rejection_sampler

    if HAS_TRITON or not current_platform.is_cpu():
        return
    if getattr(rejection_sampler.expand_kernel, "func", None) is not expand:
        register_kernels({KERNEL: expand})


def expand(
    output_ptr: torch.Tensor,
    input_ptr: torch.Tensor,
    cu_num_tokens_ptr: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeat each request's value for each of its tokens, one value replaced by another.

    Shapes: input_ptr [N], cu_num_tokens_ptr [N], output_ptr [cu_num_tokens_ptr[-1]], written
    """
    tokens = cu_num_tokens_ptr.diff(prepend=cu_num_tokens_ptr.new_zeros(1))
    values = input_ptr.masked_fill(input_ptr == replace_from, replace_to)
    output_ptr.copy_(values.repeat_interleave(tokens))
