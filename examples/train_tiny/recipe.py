"""The training recipe: a function or class for each part, with its source."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNorm,
    Qwen3NextRMSNormGated,
    Qwen3NextTopKRouter,
)

from .architecture import TinyQwen3Next

NOT_LEARNT = -1


@dataclass(frozen=True)
class Recipe:
    """Every number of the recipe; the ablations change the last three."""

    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.04  # share of the whole run, like decay
    decay: float = 0.3
    clip: float = 1.0
    mtp_weight: float = 0.3
    mtp_depths: int = 3
    # Depths above 1 on every second micro-batch: they cost as much as the trunk.
    deep_every: int = 2
    balance_weight: float = 0.01
    global_balance: bool = True
    norm_decay: bool = True


def normalise_router_rows(model: nn.Module) -> None:
    """Give every expert's router row the same norm, so that no expert is favoured at the start.

    Source: Qwen3-Next's announcement, on initialising the MoE router.
    """
    for module in model.modules():
        if isinstance(module, Qwen3NextTopKRouter):
            module.weight.data = normalize(module.weight.data, dim=-1)


class RouterTap:
    """Collects the router logits of every MoE layer that runs, in order."""

    def __init__(self, model: TinyQwen3Next):
        self.layers = model.config.num_hidden_layers
        self.logits: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, Qwen3NextTopKRouter):
                module.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: tuple, outputs: tuple) -> None:
        self.logits.append(outputs[0])

    def take(self) -> list[Tensor]:
        """Logits since the last call, one [T, E] per layer; all MTP depths count as one layer."""
        trunk, mtp = self.logits[: self.layers], self.logits[self.layers :]
        self.logits.clear()
        return [*trunk, torch.cat(mtp)]


class Balance:
    """Load-balancing loss E·Σ_e f_e·p_e in which f counts the whole global batch.

    f_e is the share of the step's tokens routed to expert e so far, summed over its micro-batches;
    p_e is the mean probability in this one. With `across=False` f counts the micro-batch only, the
    usual loss. Source: Qiu et al., "Demons in the Detail" (2025), section 3 and its buffer of
    counts.
    """

    def __init__(self, across: bool):
        self.across = across
        self.counts: list[Tensor] = []

    def reset(self) -> None:
        """Clear the counts at the beginning of a step."""
        self.counts = []

    def loss(self, logits: list[Tensor], top_k: int) -> Tensor:
        """Mean over the layers for one micro-batch; logits has one [T, E] per layer."""
        counts = [expert_counts(x, top_k) for x in logits]
        if self.across:
            if self.counts:
                counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
            self.counts = counts
        pairs = zip(counts, logits, strict=True)
        return torch.stack([balance_term(c, x, top_k) for c, x in pairs]).mean()


def expert_counts(logits: Tensor, top_k: int) -> Tensor:
    """Number of tokens routed to each expert: [T, E] → [E]."""
    chosen = logits.detach().topk(top_k, dim=-1).indices
    return torch.bincount(chosen.flatten(), minlength=logits.shape[-1]).float()


def balance_term(counts: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """E·Σ_e f_e·p_e of one layer; 1 when the experts share the tokens evenly."""
    f = counts / counts.sum()
    return logits.shape[-1] * (f * logits.float().softmax(-1).mean(0)).sum()


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the shared head: hidden [B, T, D], head [E, D], targets [B, T].

    The mean over the tokens that are learnt; a negative target is a token that is only read.
    """
    logits = linear(hidden, head).float().flatten(0, 1)
    targets = targets.clamp(min=NOT_LEARNT).flatten()
    total = cross_entropy(logits, targets, ignore_index=NOT_LEARNT, reduction="sum")
    return total / (targets != NOT_LEARNT).sum().clamp(min=1)


def read(ids: Tensor) -> Tensor:
    """The tokens themselves, where batches.py marks those that are only read as ~id."""
    return torch.where(ids < 0, ~ids, ids)


def mtp_losses(
    model: TinyQwen3Next, ids: Tensor, hidden: Tensor, depths: int, loss
) -> list[Tensor]:
    """The joint multi-step loss: the same layer on its own output, as a server drafts.

    Depth d at position i predicts token i+d+1. Source: Qwen3-Next's announcement (multi-step
    training, consistent with inference) and DeepSeek-V3, section 2.2.
    """
    T, head = hidden.shape[1], model.trunk.lm_head.weight
    drafts = model.drafts(read(ids), hidden, depths)
    return [loss(h, head, ids[:, d + 1 : d + 1 + T]) for d, h in enumerate(drafts, start=1)]


def decay_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """AdamW's groups: matrices and zero-centred norm weights decay; per-head gate scalars do not.

    Source: Qwen3-Next's announcement, on zero-centred RMSNorm with weight decay on its weights.
    The gated norm of the linear layers is not zero-centred: decay would pull its scale to zero.
    """
    norms = Qwen3NextRMSNorm if recipe.norm_decay else ()
    decayed, kept = [], []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            matrix = parameter.dim() > 1
            centred = isinstance(module, norms) and not isinstance(module, Qwen3NextRMSNormGated)
            (decayed if matrix or centred else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Warm-up, stable, cosine decay to a fiftieth; progress runs from 0 to 1."""
    if progress < recipe.warmup:
        return recipe.learning_rate * (progress + 1e-3) / (recipe.warmup + 1e-3)
    into_decay = max(0.0, (progress - 1 + recipe.decay) / recipe.decay)
    return recipe.learning_rate * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, into_decay))))
