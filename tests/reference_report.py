"""What the imported transformers says of checkpoints, as JSON: run under another version of it."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

from checkpoints import random_prompt
from qwen3next_plugin.config import Qwen3NextConfig
from reference import Reference

PROMPT, TOKENS, DRAFTS = 40, 12, 3


def report(folders: list[str]) -> dict[str, Any]:
    """Of each checkpoint: its config as we read it, and what the reference computes."""
    return {"version": transformers.__version__} | {name: _of(Path(name)) for name in folders}


def _of(folder: Path) -> dict[str, Any]:
    prompt, reference = random_prompt(PROMPT), Reference(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    answer = reference.greedy(prompt, TOKENS)
    return {
        "config": json.loads(json.dumps(asdict(Qwen3NextConfig.from_hf(config)))),
        "logprobs": reference.prompt_logprobs(prompt).tolist(),
        "greedy": list(answer),
        "accepted": list(reference.accepted(prompt, answer, DRAFTS)),
    }


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1:])))
