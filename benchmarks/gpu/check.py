"""Compare the layer's kernels with the reference in fp32, on prefill, verify and decode rows."""

import os
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.layer import Layer, Work, step_of
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.model.state import PageLayout

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # on |out - ref| / |ref|
PROMPTS = (70, 17, 1, 3)
ROUNDS = 2  # of drafts; some of each are rejected


def agree(what: str, out: Tensor, ref: Tensor, dtype: torch.dtype) -> None:
    """Raise AssertionError unless both agree within the bound of `dtype`."""
    out, ref = out.double().flatten(), ref.double().flatten()
    error = ((out - ref).norm() / ref.norm()).item()
    if not error <= BOUNDS[dtype]:
        raise AssertionError(f"{what}: differs by {error:.1e}")


def check_layer(name: str, layout: PageLayout, device: torch.device) -> None:
    """Raise AssertionError unless outputs and S agree with the reference."""
    dtype, drafts = layout.activation_dtype, layout.num_drafts
    exact = replace(layout, activation_dtype=torch.float32, state_dtype=torch.float32)
    ours = Layer(Work(name, layout, PROMPTS), device)
    theirs = Layer(Work(name, exact, PROMPTS), device)
    theirs.weights = theirs.weights._make(
        x.float() if isinstance(x, torch.Tensor) else x for x in ours.weights
    )
    context_len = torch.zeros(len(PROMPTS), dtype=torch.int32, device=device)
    for lengths in (PROMPTS, *[(drafts + 1,) * len(PROMPTS)] * ROUNDS):
        step = step_of(lengths, context_len)
        qkvz, ba = ours.projections(step.num_tokens, dtype, device)
        out = ours.run(qkvz, ba, step)
        faults.check(device)
        with patch.dict(os.environ, QWEN3NEXT_KERNELS="reference"):
            ref = theirs.run(qkvz.float(), ba.float(), step)
        agree(f"{name}, rows of {lengths}", out, ref, dtype)
        context_len = committed(context_len, lengths, drafts)
    agree(f"{name}, S", ours.settled(context_len), theirs.settled(context_len), dtype)


def committed(context_len: Tensor, lengths: tuple[int, ...], drafts: int) -> Tensor:
    """Context lengths after a step: all tokens of a long row, at least one of a short row."""
    kept = [n if n > drafts + 1 else int(torch.randint(1, n + 1, ())) for n in lengths]
    return context_len + torch.tensor(kept, dtype=torch.int32, device=context_len.device)
