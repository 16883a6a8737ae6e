"""The first-ranked token of an output head: in int8, and in bf16 as upstream packs it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from benchmarks.kernels.timing import Case, record
from benchmarks.report import Record, Run
from qwen3next_plugin.kernels.draft_head import draft_head, quantise_channels

VOCABULARY, HIDDEN, DTYPE = 151_936, 2048, torch.bfloat16
KEPT = 32_768  # rows of a draft head over part of the vocabulary


def measure(run: Run) -> Iterator[Record]:
    yield record(run, "draft_head", "How fast is the first-ranked token found?", cases)


def cases() -> Iterator[Case]:
    """Every case. The rows kept are the larger ones: the whole head's first one is among them."""
    weight = torch.empty(VOCABULARY, HIDDEN, dtype=DTYPE).normal_()
    weight[KEPT:] *= 0.5
    int8, scale = quantise_channels(weight)
    kept, whole = packed(weight[:KEPT].clone()), packed(weight)
    for batch in (1, 8):
        x = torch.randn(batch, HIDDEN).to(DTYPE)
        for rows, name in ((VOCABULARY, "all rows"), (KEPT, f"{KEPT:,} rows")):
            ids = torch.arange(rows, dtype=torch.int32)
            head = {"weight": int8, "scale": scale, "token_ids": ids}
            yield greedy(f"{name}, batch {batch}", x, head, whole)
        yield greedy(f"{name} on both sides, batch {batch}", x, head, kept)


def greedy(name: str, x: Tensor, head: dict[str, Tensor], bf16: Any) -> Case:
    def plugin() -> Tensor:
        return draft_head(x=x, **head)[1]

    def argmax() -> Tensor:
        logits = bf16.cpu_linear(x, bf16.weight, None)
        return logits.gather(1, logits.argmax(-1, keepdim=True))

    return Case(name, plugin, argmax)


def packed(weight: Tensor) -> Any:
    """A head's weight, packed as upstream packs it."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer
