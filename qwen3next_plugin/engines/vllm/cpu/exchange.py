"""The exchange of tokens between CPU ranks that share the experts, which vLLM's CPUs lack.

Both functions replace methods of vLLM's communicator. Ranks may have different numbers of tokens,
one at least.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_to_all_single

from qwen3next_plugin.engines.patching import Replacement
from qwen3next_plugin.engines.vllm.patches import When, patch


@patch(
    When.IN_WORKER,
    "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase."
    "all_gatherv",
    kind=Replacement,
    reason="data-parallel ranks share experts by this method, which a CPU's communicator lacks: "
    "the engine would end at its first request",
    remove_when="vLLM's CPU communicator has it (`compat`)",
    upstream="https://github.com/vllm-project/vllm/issues/57837",
)
def gather(
    communicator: Any, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
) -> Tensor | list[Tensor]:
    """Each tensor's rows of all ranks. Shapes: [sizes[rank], …], returns [sum(sizes), …]."""
    assert dim == 0
    assert sizes is not None
    tensors = [input_] if isinstance(input_, Tensor) else input_
    parts = [tensor.contiguous().flatten(1).view(torch.uint8) for tensor in tensors]
    widths = [part.shape[1] for part in parts]
    own = torch.cat(parts, 1).repeat(len(sizes), 1)  # in one message to each rank
    found = own.new_empty(sum(sizes), sum(widths))
    counts = [sizes[communicator.rank_in_group]] * len(sizes)
    all_to_all_single(found, own, sizes, counts, group=communicator.device_group)
    gathered = [
        part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
        for part, tensor in zip(found.split(widths, 1), tensors, strict=True)
    ]
    return gathered[0] if isinstance(input_, Tensor) else gathered


@patch(
    When.IN_WORKER,
    "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase."
    "reduce_scatterv",
    kind=Replacement,
    reason="data-parallel ranks share experts by this method, too",
    remove_when="vLLM's CPU communicator has it (`compat`)",
    upstream="https://github.com/vllm-project/vllm/issues/57837",
)
def sum_own(
    communicator: Any, input_: Tensor, dim: int = -1, sizes: list[int] | None = None
) -> Tensor:
    """The sum over ranks of this rank's rows. Shapes: [sum(sizes), D], returns [sizes[rank], D].

    Summed in rank order and in fp32, so that a row's bits do not depend on other rows.
    """
    assert dim == 0
    assert sizes is not None
    counts = [sizes[communicator.rank_in_group]] * len(sizes)
    parts = input_.new_empty(sum(counts), *input_.shape[1:]).view(torch.uint8)
    whole = input_.contiguous().view(torch.uint8)
    all_to_all_single(parts, whole, counts, sizes, group=communicator.device_group)
    by_rank = parts.view(input_.dtype).view(len(sizes), -1, *input_.shape[1:])
    return by_rank.sum(0, dtype=torch.float32).to(input_.dtype)
