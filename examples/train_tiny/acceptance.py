"""MTP acceptance as in a server: draft from the cache, verify against the greedy trunk."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .architecture import TinyQwen3Next


@dataclass
class Tally:
    """The number of drafts, and of those whose first 1, 2, … tokens were accepted."""

    num_drafts: int
    drafts: int = 0
    accepted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accepted = self.accepted or [0] * self.num_drafts

    def add(self, run: int) -> None:
        """Count one draft with `run` accepted tokens."""
        self.drafts += 1
        for position in range(run):
            self.accepted[position] += 1

    def summary(self) -> dict:
        """Acceptance of each position: given the one before it, and as a share of all drafts."""
        reached = [self.drafts, *self.accepted[:-1]]
        return {
            "drafts": self.drafts,
            "given_previous": [a / max(1, r) for a, r in zip(self.accepted, reached, strict=True)],
            "of_all_drafts": [a / max(1, self.drafts) for a in self.accepted],
            "tokens_per_step": 1 + sum(self.accepted) / max(1, self.drafts),
        }


class KeyValues:
    """Keys and values [1, H, T, K] of one attention layer, with the methods attention calls."""

    def __init__(self) -> None:
        self.keys, self.values = torch.empty(0), torch.empty(0)
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, _layer: int) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all of them."""
        if self.length:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values, self.length = keys, values, keys.shape[2]
        return keys, values

    def crop(self, length: int) -> None:
        """Drop everything after the first `length` tokens."""
        self.keys, self.values = (
            self.keys[:, :, :length],
            self.values[:, :, :length],
        )
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

    def draft(self, ids: Tensor, hidden: Tensor, num_drafts: int) -> list[int]:
        """Greedy tokens after ids [c], given the trunk's hidden [c-1, D] of all but the last."""
        start, verified = self.cache.length, len(ids) - 1
        h = self._forward(ids[start + 1 :], hidden[start:verified])[-1:]
        tokens = [self.model.trunk.lm_head(h).argmax(-1)]
        for _ in range(num_drafts - 1):
            h = self._forward(tokens[-1], h)
            tokens.append(self.model.trunk.lm_head(h).argmax(-1))
        self.cache.crop(verified)
        return torch.cat(tokens).tolist()


def replay(model: TinyQwen3Next, ids: Tensor, hidden: Tensor, prompt: int, tally: Tally) -> None:
    """Draft along one finished greedy sequence: ids [L], hidden [L, D].

    After any accepted prefix the trunk would choose the sequence's own next token.
    """
    drafter, known = Drafter(model), prompt + 1
    while known + tally.num_drafts <= len(ids):
        tokens = drafter.draft(ids[:known], hidden[: known - 1], tally.num_drafts)
        truth = ids[known : known + tally.num_drafts].tolist()
        run = next(
            (n for n, (a, b) in enumerate(zip(tokens, truth, strict=True)) if a != b),
            tally.num_drafts,
        )
        tally.add(run)
        known += run + 1


def until_end(ids: Tensor, prompt: int, end: int) -> Tensor:
    """The sequence up to its first end token after the prompt; the rest is padding."""
    ends = (ids[prompt:] == end).nonzero()
    return ids[: prompt + int(ends[0]) + 1] if len(ends) else ids


@torch.inference_mode()
def measure(model: TinyQwen3Next, prompts: Tensor, new_tokens: int, tally: Tally) -> list[Tensor]:
    """Tally drafts while the trunk continues prompts [B, T] greedily; returns its text."""
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
