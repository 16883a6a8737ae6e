"""MTP acceptance as a server measures it: draft from the cache, verify against the greedy trunk."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from .architecture import TinyQwen3Next


@dataclass
class Tally:
    """Drafts made, and how many of them had their first 1, 2, … k tokens accepted."""

    k: int
    drafts: int = 0
    accepted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accepted = self.accepted or [0] * self.k

    def add(self, run: int) -> None:
        """Count one draft of which `run` tokens were accepted."""
        self.drafts += 1
        for position in range(run):
            self.accepted[position] += 1

    def summary(self) -> dict:
        """Rates: of each position given that the one before was accepted, and of all drafts."""
        reached = [self.drafts, *self.accepted[:-1]]
        return {
            "drafts": self.drafts,
            "given_previous": [a / max(1, r) for a, r in zip(self.accepted, reached, strict=True)],
            "of_all_drafts": [a / max(1, self.drafts) for a in self.accepted],
            "tokens_per_step": 1 + sum(self.accepted) / max(1, self.drafts),
        }


class Drafter:
    """The MTP layer over one sequence, with a key-value cache of the verified tokens."""

    def __init__(self, model: TinyQwen3Next):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.filled = 0

    def _forward(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Append n positions: ids [n] of the tokens after them, hidden [n, D] → [n, D]."""
        model, n = self.model, len(ids)
        positions = torch.arange(self.filled, self.filled + n)[None]
        rope = model.trunk.model.rotary_emb(hidden[None], positions)
        embeds = model.trunk.model.embed_tokens(ids)[None]
        mask = torch.ones(n, self.filled + n, dtype=torch.bool).tril(self.filled)[None, None]
        out = model.mtp(embeds, hidden[None], rope, past_key_values=self.cache, attention_mask=mask)
        self.filled += n
        return out[0]

    def draft(self, ids: Tensor, hidden: Tensor, k: int) -> list[int]:
        """k greedy tokens after ids [c], given the trunk's hidden [c-1, D] of all but the last."""
        start, verified = self.filled, len(ids) - 1
        h = self._forward(ids[start + 1 :], hidden[start:verified])[-1:]
        tokens = [self.model.trunk.lm_head(h).argmax(-1)]
        for _ in range(k - 1):
            h = self._forward(tokens[-1], h)
            tokens.append(self.model.trunk.lm_head(h).argmax(-1))
        self.cache.crop(verified)
        self.filled = verified
        return torch.cat(tokens).tolist()


def replay(model: TinyQwen3Next, ids: Tensor, hidden: Tensor, prompt: int, tally: Tally) -> None:
    """Serve one finished greedy sequence again, speculatively: ids [L], hidden [L, D].

    The trunk's choice after any accepted prefix is the sequence itself.
    """
    drafter, known = Drafter(model), prompt + 1
    while known + tally.k <= len(ids):
        tokens = drafter.draft(ids[:known], hidden[: known - 1], tally.k)
        truth = ids[known : known + tally.k].tolist()
        run = next((n for n, (a, b) in enumerate(zip(tokens, truth)) if a != b), tally.k)
        tally.add(run)
        known += run + 1


@torch.inference_mode()
def measure(model: TinyQwen3Next, prompts: Tensor, new_tokens: int, tally: Tally) -> Tensor:
    """Add the drafts made while the trunk continues prompts [B, T] greedily; the sequences [B, L]."""
    whole = model.trunk.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    for ids, hidden in zip(whole, model.hidden(whole), strict=True):
        replay(model, ids, hidden, prompts.shape[1], tally)
    return whole
