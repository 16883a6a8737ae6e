"""Qwen4-Exp by transformers' own modules: its trunk, and an MTP head of the same parts."""

import sys
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from reference import Ids, Reference, quietly

sys.path.insert(0, str(Path(__file__).parents[3]))  # examples/ is not installed

from examples.qwen4_exp_tiny import write as write_qwen4_exp

__all__ = ["StreamsReference", "write_qwen4_exp"]


class StreamsReference(Reference):
    """As `Reference`; the MTP head reads the streams before the trunk's last mixer."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder, dtype)
        self._streams: dict[Ids, torch.Tensor] = {}

    @quietly()
    def fed(self, ids: Ids) -> torch.Tensor:
        if ids not in self._streams:
            seen: list[torch.Tensor] = []
            mixer = self.trunk.model.hyper_connection_mixer
            hook = mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
            try:
                self.trunk.model(input_ids=torch.tensor([ids]), use_cache=False)
            finally:
                hook.remove()
            self._streams[ids] = seen[0][0]
        return self._streams[ids]

    @cached_property
    def mtp(self) -> "StreamsMTPReference":
        return StreamsMTPReference(self)


class StreamsMTPReference(nn.Module):
    """A projection of the embedding and one of each stream, a sparse layer, a mixer, the head.

    Source: vLLM's `Qwen4ExpMultiTokenPredictor`.
    """

    def __init__(self, reference: StreamsReference) -> None:
        super().__init__()
        from transformers.models.qwen4_exp import modeling_qwen4_exp as theirs

        trunk, config = reference.trunk, reference.trunk.config
        D, self.hc_count, eps = config.hidden_size, config.hc_count, config.rms_norm_eps
        self.fc_embedding = nn.Linear(D, D, bias=False)
        self.fc_hidden = nn.Linear(D, D, bias=False)
        self.pre_fc_norm_embedding = theirs.Qwen4ExpTextRMSNorm(D, eps=eps)
        self.pre_fc_norm_hidden = theirs.Qwen4ExpTextRMSNorm(self.hc_count * D, eps=eps)
        index = config.layer_types.index("indexed_attention")
        self.layers = nn.ModuleList([theirs.Qwen4ExpTextDecoderLayer(config, index)])
        self.hyper_connection_mixer = theirs.Qwen4ExpTextGatedResidual(config, use_combine=False)
        tensors = load_file(reference.folder / "model.safetensors")
        own = {
            n.removeprefix("mtp."): t.float() for n, t in tensors.items() if n.startswith("mtp.")
        }
        self.load_state_dict(own)
        self.shared = (trunk.model.embed_tokens, trunk.lm_head, trunk.model.rotary_emb)

    @quietly()
    def drafts(self, ids: Ids, streams: torch.Tensor, num_drafts: int) -> list[int]:
        """k greedy drafts after `ids`, the head fed with its own streams from the second on.

        Shapes: streams [len(ids)-1, hc·D], the trunk's for all but the last token.
        """
        embed, head, _ = self.shared
        drafts: list[int] = []
        for _ in range(num_drafts):
            tokens = torch.tensor((*ids, *drafts)[1 : len(streams) + 1])
            hidden, out = self(embed(tokens), streams)
            drafts.append(int(head(hidden[-1]).argmax()))
            streams = torch.cat([streams, out[-1:]])
        return drafts

    @quietly()
    def forward(
        self, embeds: torch.Tensor, streams: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        T, D = embeds.shape
        embedded = self.fc_embedding(self.pre_fc_norm_embedding(embeds))
        hidden = self.fc_hidden(self.pre_fc_norm_hidden(streams).view(T, self.hc_count, D))
        x = (hidden + embedded[:, None]).flatten(1)[None]  # [1, T, hc·D]
        rope = self.shared[2](x, torch.arange(T).expand(3, 1, T))
        causal = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
        out = self.layers[0](x, position_embeddings=rope, attention_mask=causal)
        return self.hyper_connection_mixer(out)[0], out[0]
