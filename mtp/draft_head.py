"""Draft head: an int8 copy of the output head for the likelier tokens.

A draft needs the likeliest token and no distribution. Verification uses the full head, so an error
here costs acceptance and never changes the output.
"""

import torch
from torch import Tensor, nn

from qwen3next_plugin.kernels.draft_head import draft_head, quantise_channels
from qwen3next_plugin.kernels.linear import PackedWeight, take_channels
from qwen3next_plugin.mtp.ranks import Ranks
from qwen3next_plugin.mtp.vocabulary import DraftVocabulary

DRAFTED = 32768  # most tokens that a draft chooses from: docs/kernels.md says what they cover
CHANNELS = 1024  # read from the head at a time, to limit memory


def int8_channels(head: Tensor | PackedWeight, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens' weights in int8, and their scales: the same bits from a plain head and a packed one.

    Shapes: head [V, D], in int8 or bf16 if packed; channels [R], returns [R, D] int8, [R] fp32
    """
    if isinstance(head, Tensor):
        return quantise_channels(head[channels])
    values, scale = take_channels(head, channels)
    return (values, scale.squeeze(1)) if head.encoding == "int8" else quantise_channels(values)


class DraftHead(nn.Module):
    """One rank's share of the head that drafts are chosen by.

    It holds the weights of the draft vocabulary, and reads those of new tokens from the output
    head; it copies a head that will be dropped, or that is smaller than the vocabulary.
    """

    def __init__(
        self,
        head: Tensor | PackedWeight,
        *,
        stays: bool,
        first: int,
        end: int,
        vocab_size: int,
        ranks: Ranks,
    ) -> None:
        """Shapes: head [>= end - first, D] of tokens `first` to `end`, then padding."""
        super().__init__()
        self.first, self.end, self.ranks = first, end, ranks
        self.vocabulary = DraftVocabulary(vocab_size, DRAFTED)
        self.head: Tensor | PackedWeight | None = head if stays and end - first > DRAFTED else None
        ids = self.vocabulary.ids
        if self.head is None:
            self.weight, self.scale = int8_channels(head, torch.arange(end - first))
            self.tokens = torch.arange(first, end)  # of each channel of weight
        else:
            self.weight = torch.empty(len(ids), head.shape[1], dtype=torch.int8)
            self.scale = torch.ones(len(ids), dtype=torch.float32)
            self.tokens = ids
            self._read(torch.arange(len(ids)))
        self.drafted = self._drafted()

    def _here(self, places: Tensor) -> Tensor:
        """The places in the vocabulary whose token is on this rank. Shapes: [R]"""
        ids = self.vocabulary.ids[places]
        return places[(ids >= self.first) & (ids < self.end)]

    def _read(self, places: Tensor) -> None:
        """Read the weights of the tokens at these places in the vocabulary. Shapes: places [R]"""
        assert self.head is not None
        for here in self._here(places).split(CHANNELS):
            channels = self.vocabulary.ids[here].long() - self.first
            self.weight[here], self.scale[here] = int8_channels(self.head, channels)

    def _drafted(self) -> Tensor:
        """The channels of weight that this rank drafts from [R] int32."""
        here = self._here(torch.arange(len(self.vocabulary.ids)))
        return here.int() if self.head is not None else self.vocabulary.ids[here] - self.first

    def see(self, token_ids: Tensor) -> None:
        """Let the draft vocabulary follow these tokens. Shapes: token_ids [T]."""
        if not len(changed := self.vocabulary.see(token_ids)):
            return
        if self.head is not None:
            self._read(changed)
        if self.head is None or self.ranks.world_size > 1:  # else it has all places, always
            self.drafted = self._drafted()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The likeliest token for each. Shapes: hidden_states [N, D], returns [N]."""
        if len(self.drafted):
            channels, values = draft_head(
                x=hidden_states,
                weight=self.weight,
                scale=self.scale,
                token_ids=self.drafted,
            )
            tokens = self.tokens[channels].long()
        else:  # this rank holds no drafted token
            values = hidden_states.new_full((len(hidden_states),), -torch.inf, dtype=torch.float32)
            tokens = torch.zeros(len(hidden_states), dtype=torch.int64)
        if self.ranks.world_size == 1:
            return tokens
        # Ids below 2^24 are exact in fp32; vLLM's gather in shared memory does not support fp64.
        pairs = torch.stack([values.float(), tokens.float()], dim=-1)[:, None]
        pairs = self.ranks.all_gather(pairs, dim=1)  # [N, ranks, 2]
        best = pairs[..., 0].argmax(dim=1, keepdim=True)
        return pairs[..., 1].gather(1, best).squeeze(1).long()
