"""What tests of `generate` share: both answers to a batch of prompts, and its drafts."""

from typing import Any

import torch

from reference import Ids, Reference

TOKENS = 20


def left_padded(prompts: tuple[Ids, ...], pad: int = 0) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    rows = [(*[pad] * (longest - len(prompt)), *prompt) for prompt in prompts]
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def both(model: Any, prompts: tuple[Ids, ...], **given: Any) -> tuple[Any, Any]:
    """What the host's loop answers, and what ours does."""
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0} | given
    inputs = left_padded(prompts)
    plain = model.generate(**inputs, **settings)
    return plain, model.generate(**inputs, **settings, use_mtp=True)


def check_drafts(
    reference: Reference, prompt: Ids, answer: torch.Tensor, made: list[torch.Tensor]
) -> None:
    """They are those of transformers' own modules, run on the whole text each time."""
    text, known = tuple(answer[0].tolist()), len(prompt) + 1
    fed = reference.fed(text)
    for drafts in made:
        (found,) = drafts.tolist()
        assert found == reference.mtp.drafts(text[:known], fed[: known - 1], len(found))
        right = [a == b for a, b in zip(found, text[known:], strict=False)]
        known += (*right, False).index(False) + 1
    assert made
    assert known >= len(text) - 1
