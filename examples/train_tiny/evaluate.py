"""Measure a checkpoint on held-out files and write measured.json: see --help."""

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from .acceptance import Tally, measure
from .architecture import TinyQwen3Next
from .batches import encode
from .call_tools import rates
from .corpus import IM_START, Document, documents, split
from .export import load
from .kept import keep
from .recipe import Qwen3NextRMSNorm, RouterTap, expert_counts

WINDOW = 512
KINDS = ("source", "chat", "topic")
DRAFT = 3  # tokens a draft proposes


def held_out_windows(tokenizer: Tokenizer, docs: list[Document], limit: int) -> torch.Tensor:
    """Windows [N, WINDOW+1] over the shuffled documents, at most `limit` tokens."""
    order = np.random.default_rng(0).permutation(len(docs))
    stream = np.concatenate(encode(tokenizer, [docs[i] for i in order]))
    count = min((len(stream) - 1) // WINDOW, limit // WINDOW)
    starts = np.arange(count)[:, None] * WINDOW
    return torch.from_numpy(stream[starts + np.arange(WINDOW + 1)])


@torch.inference_mode()
def perplexity(model: TinyQwen3Next, windows: torch.Tensor, tokenizer: Tokenizer) -> dict:
    """Per-token perplexity and bits per byte of the trunk."""
    total = 0.0
    for ids in windows.split(8):
        logits = model.trunk.lm_head(model.hidden(ids[:, :-1]))
        total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    tokens = windows[:, 1:].numel()
    texts = tokenizer.decode_batch(windows[:, 1:].tolist(), skip_special_tokens=False)
    size = sum(len(text.encode()) for text in texts)
    return {
        "tokens": tokens,
        "perplexity": math.exp(total / tokens),
        "bits_per_byte": total / math.log(2) / size,
    }


@torch.inference_mode()
def expert_shares(model: TinyQwen3Next, tap: RouterTap, windows: torch.Tensor) -> list[list[float]]:
    """Each layer's share of routed tokens per expert; the MTP layer, at depth 1, comes last."""
    counts: list[torch.Tensor] = []
    tap.logits.clear()  # left by other measurements
    for ids in windows.split(8):
        model.drafts(ids, model.hidden(ids[:, :-1]), depths=1)
        logits = tap.take()
        new = [expert_counts(x, model.config.num_experts_per_tok) for x in logits]
        counts = [a + b for a, b in zip(counts, new, strict=True)] if counts else new
    return [(c / c.sum()).tolist() for c in counts]


def norm_weights(model: TinyQwen3Next) -> dict[str, float]:
    """Root mean square of all zero-centred norm weights, and the largest."""
    modules = [m for m in model.modules() if isinstance(m, Qwen3NextRMSNorm)]
    weights = torch.cat([m.weight.detach().flatten() for m in modules])
    return {"rms": weights.pow(2).mean().sqrt().item(), "max": weights.abs().max().item()}


def text_acceptance(model: TinyQwen3Next, windows: torch.Tensor) -> dict:
    """One draft after each true prefix: MTP drafts the last three of four greedy tokens."""
    tally = Tally(DRAFT)
    for length in (64, 192, 320, 448):
        for ids in windows.split(16):
            measure(model, ids[:, :length].contiguous(), DRAFT + 1, tally)
    return tally.summary()


def text_generation(model: TinyQwen3Next, windows: torch.Tensor) -> dict:
    """Drafts along 96 greedy tokens after 128 of each held-out window."""
    tally, written = Tally(DRAFT), []
    for ids in windows.split(16):
        written += measure(model, ids[:, :128].contiguous(), 96, tally)
    return tally.summary() | {"distinct_4_grams": distinct_4_grams(written)}


def chat_generation(model: TinyQwen3Next, prompts: list[torch.Tensor]) -> dict:
    """Drafts along at most 64 greedy tokens of the answer to each held-out question."""
    tally, written = Tally(DRAFT), []
    for ids in prompts:
        written += measure(model, ids, 64, tally)
    return tally.summary() | {"distinct_4_grams": distinct_4_grams(written)}


def distinct_4_grams(written: list[torch.Tensor]) -> float:
    """Share of 4-grams new to their text, averaged; low if greedy text repeats itself."""
    grams = [ids.unfold(0, 4, 1) for ids in written if len(ids) >= 4]
    return sum(len(g.unique(dim=0)) / len(g) for g in grams) / max(1, len(grams))


def chat_prompts(tokenizer: Tokenizer, docs: list[Document], count: int) -> list[torch.Tensor]:
    """Held-out questions, each up to the beginning of the answer."""
    marker = f"{IM_START}assistant\n"
    chats = [d.text.split(marker)[0] + marker for d in docs if d.kind == "chat"]
    picked = np.random.default_rng(0).permutation(len(chats))[:count]
    encoded = tokenizer.encode_batch([chats[i] for i in picked], add_special_tokens=False)
    return [torch.tensor([e.ids]) for e in encoded]


def samples(model: TinyQwen3Next, tokenizer: Tokenizer, prompts: list[torch.Tensor]) -> list[dict]:
    """A few greedy answers, for the reader to judge."""
    out = []
    for ids in prompts:
        whole = model.trunk.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
        )
        prompt, answer = (
            tokenizer.decode(x.tolist()) for x in whole[0].tensor_split([ids.shape[1]])
        )
        question = prompt.removeprefix("user\n").removesuffix("\nassistant\n")
        out.append({"question": question, "answer": answer})
    return out


def report(folder: Path, tokens: int, prompts: int, dialogues: int) -> dict:
    """Every measurement of one checkpoint."""
    model, tokenizer = load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    tap = RouterTap(model)
    training, held_out = split(documents())
    by_kind = {k: [d for d in held_out if d.kind == k] for k in KINDS}
    windows = {k: held_out_windows(tokenizer, docs, tokens) for k, docs in by_kind.items()}
    everything = held_out_windows(tokenizer, held_out, tokens)
    questions = chat_prompts(tokenizer, held_out, prompts)
    return {
        "parameters": {
            "trunk": sum(p.numel() for p in model.trunk.parameters()),
            "mtp": sum(p.numel() for p in model.mtp.parameters()),
        },
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "documents": {"training": len(training), "held_out": len(held_out)},
        "perplexity": {k: perplexity(model, w, tokenizer) for k, w in windows.items()}
        | {"all": perplexity(model, everything, tokenizer)},
        "experts": {k: expert_shares(model, tap, w[:32]) for k, w in windows.items()}
        | {"all": expert_shares(model, tap, everything[:64])},
        "norm_weights": norm_weights(model),
        "acceptance": {
            "text": text_acceptance(model, everything[:prompts]),
            "generated_text": text_generation(model, everything[:prompts]),
            "generated_chat": chat_generation(model, questions),
        },
        "tools": rates(folder, dialogues),
        "samples": samples(model, tokenizer, questions[:3]),
    }


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder that train.py wrote.")],
    tokens: Annotated[int, typer.Option(help="Held-out tokens of each kind to score.")] = 32_768,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to measure acceptance on.")] = 64,
    dialogues: Annotated[int, typer.Option(help="Dialogues that need a tool.")] = 100,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Perplexity, expert use, norm weights, MTP acceptance and tool calls, into measured.json.

    All in fp32, from the shipped bf16 weights. Acceptance is measured as in a server: MTP drafts
    three tokens from its key-value cache of verified tokens, and a token counts if the greedy trunk
    agrees.
    """
    torch.set_num_threads(threads)
    measured = report(checkpoint, tokens, prompts, dialogues)
    keep(checkpoint / "measured.json", measured)


if __name__ == "__main__":
    typer.run(main)
