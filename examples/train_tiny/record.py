"""Record how many drafts are right at each token, for simulating draft lengths: see --help."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor

from .acceptance import Drafter, until_end
from .architecture import TinyQwen3Next
from .corpus import documents, split
from .evaluate import chat_prompts, held_out_windows
from .export import load


@torch.inference_mode()
def runs(model: TinyQwen3Next, ids: Tensor, prompt: int, num_drafts: int) -> str:
    """For each token of ids [L] after the prompt, how many drafts are right, as a digit."""
    hidden = model.hidden(ids[None])[0]
    drafter, digits = Drafter(model), ""
    for known in range(prompt, len(ids)):
        tokens = drafter.draft(ids[:known], hidden[: known - 1], num_drafts)
        truth = ids[known : known + num_drafts].tolist()
        right = [a == b for a, b in zip(tokens, truth, strict=False)]
        digits += str([*right, False].index(False))
    return digits


@torch.inference_mode()
def continued(model: TinyQwen3Next, prompt: Tensor, tokens: int) -> Tensor:
    """prompt [T] and its greedy continuation by the trunk, up to the end token."""
    whole = model.trunk.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=tokens,
        do_sample=False,
    )
    return until_end(whole[0], len(prompt), model.config.eos_token_id)


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder that train.py wrote.")],
    out: Annotated[
        Path, typer.Option(help="JSON file to write: digits of each request, by kind of text.")
    ],
    requests: Annotated[int, typer.Option(help="Requests of each kind.")] = 16,
    tokens: Annotated[int, typer.Option(help="Most tokens of a request.")] = 240,
    draft: Annotated[int, typer.Option(help="Tokens that a draft proposes.")] = 4,
) -> None:
    """Count right drafts at each token of held-out texts, and of texts that the model writes.

    All in fp32 from the shipped bf16 weights, as evaluate.py measures acceptance.
    """
    torch.set_num_threads(1)
    model, tokenizer = load(checkpoint), Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    _, held_out = split(documents())
    windows = held_out_windows(tokenizer, held_out, requests * 512)
    questions = [ids[0] for ids in chat_prompts(tokenizer, held_out, requests)]
    recorded = {
        "text": [runs(model, ids[: 64 + tokens], 64, draft) for ids in windows],
        "written": [
            runs(model, continued(model, ids[:128], tokens), 128, draft) for ids in windows
        ],
        "chat": [runs(model, continued(model, ids, tokens), len(ids), draft) for ids in questions],
    }
    out.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
