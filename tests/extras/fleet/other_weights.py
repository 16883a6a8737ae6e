"""Weights that change while serving, for both engines: two checkpoints, and wrong ones."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from checkpoints import random_prompt, write_checkpoint
from engines.clients import eventually

PROMPTS = [random_prompt(length, seed=31) for length in (1, 3, 65, 300)]
FAULT = "NVFP4 with a scale that is not finite"  # is found as weights load
TIED = {"tie_word_embeddings": True}
INVARIANT = {"QWEN3NEXT_BATCH_INVARIANT": "1"}


class Case(NamedTuple):
    """How weights are stored and served."""

    dtype: str
    changes: Mapping[str, Any] = {}
    env: Mapping[str, str] = {}

    def write_two(self, folder: Path) -> list[Path]:
        """Checkpoints that differ in their weights only."""
        seeds = (1, 2)
        return [write(folder / str(seed), seed, self.dtype, **self.changes) for seed in seeds]


CASES: Mapping[str, Case] = {
    "float32": Case("float32"),
    "bfloat16": Case("bfloat16"),
    "bfloat16_tied": Case("bfloat16", TIED),
    "packed": Case("bfloat16", {}, INVARIANT),
    "int8": Case("bfloat16", {}, {"QWEN3NEXT_QUANTISE": "int8"}),
    "int8_tied": Case("bfloat16", TIED, {"QWEN3NEXT_QUANTISE": "int8"}),
    "int4": Case("bfloat16", {}, {"QWEN3NEXT_QUANTISE": "int4"}),
}
IN_MAKE_TEST = ("int8_tied",)


def write(folder: Path, seed: int, dtype: str = "float32", **changes: Any) -> Path:
    """A small checkpoint."""
    changes = {"num_hidden_layers": 4, "moe_intermediate_size": 64} | changes
    return write_checkpoint(folder, seed=seed, dtype=getattr(torch, dtype), **changes)


def answers_across(
    ask: Callable[[int], list[int]],
    running: Callable[[], object],
    change: Callable[[], None],
    back: Callable[[], None],
) -> tuple[list[int], list[int]]:
    """The answers to a request without a change of weights, and with one on the way.

    `ask` takes how many tokens. Where an answer was complete before the change, a longer one is
    asked for.
    """
    for tokens in (400, 1200, 3600):
        old = ask(tokens)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, tokens)
            assert eventually(lambda answer=answer: running() or answer.done())
            change()
            found = answer.result()
        if found != old:
            return old, found
        back()
    raise AssertionError("each answer was complete before the weights changed")


def _without_a_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.3.self_attn.q_proj.weight"]


def _with_another(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.9.input_layernorm.weight"] = torch.zeros(64)


def _of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mtp.fc.weight"] = torch.zeros(64, 64)


class Wrong(NamedTuple):
    """A change to a checkpoint's tensors, and what is said of them."""

    damage: Callable[[dict[str, torch.Tensor]], None]
    message: str

    def write(self, good: Path, out: Path) -> Path:
        """The tensors of a checkpoint, changed."""
        tensors = load_file(good / "model.safetensors")
        self.damage(tensors)
        save_file(tensors, out / "model.safetensors")
        return out


MISSING = "1 tensors are missing, the first is model.layers.3.self_attn.q_proj"
WRONG: Mapping[str, Wrong] = {
    "a tensor is missing": Wrong(_without_a_tensor, MISSING),
    "one is unexpected": Wrong(
        _with_another, "unexpected tensor model.layers.9.input_layernorm.weight"
    ),
    "one has another shape": Wrong(_of_another_shape, "tensor mtp.fc.weight has shape (64, 64)"),
}
