"""MTP acceptance as a server measures it: draft from the cache, verify against the greedy trunk."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

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


class KeyValues:
    """Keys and values [1, H, T, K] of one attention layer, with what attention asks of a cache."""

    def __init__(self) -> None:
        self.keys, self.values = torch.empty(0), torch.empty(0)
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, _layer: int) -> tuple[Tensor, Tensor]:
        """Append, and return everything so far."""
        if self.length:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values, self.length = keys, values, keys.shape[2]
        return keys, values

    def crop(self, length: int) -> None:
        """Forget what lies beyond the verified tokens."""
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.length = length


class Drafter:
    """The MTP layer over one sequence, with a key-value cache of the verified tokens."""

    def __init__(self, model: TinyQwen3Next):
        self.model = model
        self.cache = KeyValues()

    def _forward(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Append n positions: ids [n] of the tokens after them, hidden [n, D] → [n, D]."""
        model, n, past = self.model, len(ids), self.cache.length
        positions = torch.arange(past, past + n)[None]
        rope = model.trunk.model.rotary_emb(hidden[None], positions)
        embeds = model.trunk.model.embed_tokens(ids)[None]
        mask = torch.ones(n, past + n, dtype=torch.bool).tril(past)[None, None]
        out = model.mtp(embeds, hidden[None], rope, past_key_values=self.cache, attention_mask=mask)
        return out[0]

    def draft(self, ids: Tensor, hidden: Tensor, k: int) -> list[int]:
        """k greedy tokens after ids [c], given the trunk's hidden [c-1, D] of all but the last."""
        start, verified = self.cache.length, len(ids) - 1
        h = self._forward(ids[start + 1 :], hidden[start:verified])[-1:]
        tokens = [self.model.trunk.lm_head(h).argmax(-1)]
        for _ in range(k - 1):
            h = self._forward(tokens[-1], h)
            tokens.append(self.model.trunk.lm_head(h).argmax(-1))
        self.cache.crop(verified)
        return torch.cat(tokens).tolist()


def replay(model: TinyQwen3Next, ids: Tensor, hidden: Tensor, prompt: int, tally: Tally) -> None:
    """Serve one finished greedy sequence again, speculatively: ids [L], hidden [L, D].

    The trunk's choice after any accepted prefix is the sequence itself.
    """
    drafter, known = Drafter(model), prompt + 1
    while known + tally.k <= len(ids):
        tokens = drafter.draft(ids[:known], hidden[: known - 1], tally.k)
        truth = ids[known : known + tally.k].tolist()
        run = next(
            (n for n, (a, b) in enumerate(zip(tokens, truth, strict=True)) if a != b), tally.k
        )
        tally.add(run)
        known += run + 1


def until_end(ids: Tensor, prompt: int, end: int) -> Tensor:
    """The sequence up to its first end token after the prompt; generate pads beyond it."""
    ends = (ids[prompt:] == end).nonzero()
    return ids[: prompt + int(ends[0]) + 1] if len(ends) else ids


@torch.inference_mode()
def measure(model: TinyQwen3Next, prompts: Tensor, new_tokens: int, tally: Tally) -> list[Tensor]:
    """Add the drafts made while the trunk continues prompts [B, T] greedily; what it wrote."""
    whole = model.trunk.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    written, T = [], prompts.shape[1]
    for row, hidden in zip(whole, model.hidden(whole), strict=True):
        ids = until_end(row, T, model.config.eos_token_id)
        replay(model, ids, hidden, T, tally)
        written.append(ids[T:])
    return written
