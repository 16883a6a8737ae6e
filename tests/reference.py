"""What the model computes, by transformers' own modules: log-probabilities, greedy text, drafts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

Ids = tuple[int, ...]


@contextmanager
def quietly() -> Iterator[None]:
    """No gradients, and one thread: threads only cost time at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


class Reference:
    """A checkpoint's trunk through transformers, and its MTP head of transformers' own parts."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM

        self.folder = folder
        self.trunk, info = AutoModelForCausalLM.from_pretrained(  # a wrapper's text model alone
            folder, dtype=dtype, output_loading_info=True
        )
        assert not info["missing_keys"], info
        assert all(k.startswith(("mtp.", "model.visual.")) for k in info["unexpected_keys"]), info
        self.trunk.eval()
        self._hidden: dict[Ids, torch.Tensor] = {}
        self._greedy: dict[tuple[Ids, int], Ids] = {}

    @quietly()
    def hidden(self, ids: Ids) -> torch.Tensor:
        """Final-norm hidden states [T, D]; cached."""
        if ids not in self._hidden:
            outputs = self.trunk.model(input_ids=torch.tensor([ids]), use_cache=False)
            self._hidden[ids] = outputs.last_hidden_state[0]
        return self._hidden[ids]

    def fed(self, ids: Ids) -> torch.Tensor:
        """What the MTP head reads of the trunk [T, …]."""
        return self.hidden(ids)

    @quietly()
    def logprobs(self, ids: Ids) -> torch.Tensor:
        """Log-probabilities [T, vocab] of the token after each position, in fp32."""
        return self.trunk.lm_head(self.hidden(ids)).float().log_softmax(-1)

    def prompt_logprobs(self, ids: Ids) -> torch.Tensor:
        """Log-probability [T-1] of each prompt token but the first, given those before it."""
        return self.greedy_logprobs(ids)[1]

    def greedy_logprobs(self, ids: Ids) -> tuple[Ids, torch.Tensor]:
        """The likeliest token [T-1] after each but the last, and `prompt_logprobs`."""
        logprobs = self.logprobs(ids)[:-1]
        chosen = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return tuple(logprobs.argmax(-1).tolist()), chosen

    @quietly()
    def greedy(self, prompt: Ids, tokens: int) -> Ids:
        """The greedy continuation, decoded step by step with transformers' own cache."""
        if (prompt, tokens) not in self._greedy:
            output = self.trunk.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            self._greedy[prompt, tokens] = tuple(output[0, len(prompt) :].tolist())
        return self._greedy[prompt, tokens]

    @cached_property
    def mtp(self) -> "MTPReference":
        return MTPReference(self)

    def accepted(self, prompt: Ids, truth: Ids, num_drafts: int) -> tuple[int, int]:
        """Drafts made and accepted while the greedy answer `truth` is decoded, k at a time."""
        tokens = len(truth)
        hidden = self.fed(prompt + truth)  # causal: every prefix's is a prefix of it
        made = accepted = 0
        known = min(2, tokens)  # the prompt's step and the one after it have no drafts
        while known < tokens:
            ids = prompt + truth[:known]
            drafts = self.mtp.drafts(ids, hidden[: len(ids) - 1], num_drafts)
            right = 0
            while (
                right < num_drafts
                and known + right < tokens
                and drafts[right] == truth[known + right]
            ):
                right += 1
            made, accepted = made + num_drafts, accepted + right
            known += right + 1
        return made, accepted


class MTPReference(nn.Module):
    """The MTP head: fc over [embedding; hidden], one full-attention layer, a norm, the lm_head."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.reference = reference
        trunk, config = reference.trunk, reference.trunk.config
        model = type(trunk).__name__.removesuffix("ForCausalLM")
        modeling = sys.modules[type(trunk.model).__module__]  # the plugin's class may be registered
        norm = getattr(modeling, f"{model}RMSNorm")
        D, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * D, D, bias=False)
        self.pre_fc_norm_embedding = norm(D, eps)
        self.pre_fc_norm_hidden = norm(D, eps)
        self.norm = norm(D, eps)
        index = next(
            i
            for i, kind in enumerate(config.layer_types)
            if kind == "full_attention" and i not in getattr(config, "mlp_only_layers", ())
        )
        self.layers = nn.ModuleList([getattr(modeling, f"{model}DecoderLayer")(config, index)])
        self.load_state_dict(fused_mtp(reference.folder))
        self.trunk_embed, self.head = trunk.model.embed_tokens, trunk.lm_head

    def load_state_dict(self, state: dict[str, torch.Tensor], **_) -> None:
        """Every tensor must fit; called before the trunk's modules hang on this one."""
        super().load_state_dict({name: tensor.float() for name, tensor in state.items()})

    @quietly()
    def drafts(self, ids: Ids, hidden: torch.Tensor, num_drafts: int) -> list[int]:
        """k greedy drafts after `ids`, the head fed with its own output from the second on.

        Shapes: hidden [len(ids)-1, D], the trunk's for all but the last token.
        """
        drafts: list[int] = []
        for _ in range(num_drafts):
            tokens = torch.tensor((*ids, *drafts)[1 : len(hidden) + 1])
            out = self(self.trunk_embed(tokens), hidden)
            drafts.append(int(self.head(out[-1]).argmax()))
            hidden = torch.cat([hidden, out[-1:]])
        return drafts

    @quietly()
    def forward(self, embeds: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        both = self.pre_fc_norm_embedding(embeds), self.pre_fc_norm_hidden(hidden)
        x = self.fc(torch.cat(both, dim=-1))[None]  # [1, T, D]
        T = x.shape[1]
        rope = self.reference.trunk.model.rotary_emb(x, torch.arange(T)[None])
        causal = torch.full((1, 1, T, T), float("-inf")).triu(1)
        return self.norm(self.layers[0](x, position_embeddings=rope, attention_mask=causal))[0]


def fused_mtp(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's `mtp.*` as transformers' layers hold them: experts in one tensor."""
    tensors = load_file(folder / "model.safetensors")
    mtp = {n.removeprefix("mtp."): t for n, t in tensors.items() if n.startswith("mtp.")}
    prefix = "layers.0.mlp.experts."
    count = sum(n.startswith(prefix) and n.endswith("down_proj.weight") for n in mtp)
    if not count:  # a dense layer, or experts that are one tensor already
        return mtp
    fused = {name: t for name, t in mtp.items() if not name.startswith(prefix)}

    def stack(kind: str) -> torch.Tensor:
        return torch.stack([mtp[f"{prefix}{e}.{kind}.weight"] for e in range(count)])

    fused[f"{prefix}gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
    fused[f"{prefix}down_proj"] = stack("down_proj")
    return fused
