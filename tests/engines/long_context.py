"""Checkpoints of few positions, the ways to ask an engine for YaRN, and what it must then read."""

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints import random_prompt, write_checkpoint
from engines.server import Server
from family import FAMILY
from plans import flags
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.engines.plan import P, make_plan

ORIGINAL = 512
REACH = 4 * ORIGINAL
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
CASES = (  # the checkpoint's layout, and where YaRN is asked for
    ("qwen3-next", "file"),
    ("qwen3-next", "rope_scaling"),
    ("qwen3-next", "rope_parameters"),
    ("text", "short"),
    ("wrapped", "file"),
    ("wrapped", "rope_scaling"),
    ("wrapped", "nested"),
)
LINEAR_LAYERS = 3  # of `write_small`
DEPTHS, NEEDLE = (0.1, 0.5, 0.9), 64  # where a prompt has the tokens of its end, and how many
OVERRIDES: Mapping[str, dict[str, Any]] = {
    "file": {},
    "rope_scaling": {"rope_scaling": YARN},
    "rope_parameters": {"rope_parameters": YARN},
    "short": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "nested": {"text_config": {"rope_parameters": YARN}},
}


def write_layouts(folder: Path) -> dict[str, Path]:
    """The same weights in each layout, of 512 positions, without YaRN."""
    member = FAMILY["moe_HV=4H_top-3-of-12_5-layers"]
    member = member._replace(changes={**member.changes, "max_position_embeddings": ORIGINAL})
    plain, text = member.pair(folder / "text")
    wrapped = member._replace(wrapped=True).write(folder / "wrapped")
    return {"qwen3-next": plain, "text": text, "wrapped": wrapped}


def write_small(folder: Path, length: int) -> Path:
    """A checkpoint of so many positions, with one attention layer of one narrow head."""
    few = {"num_hidden_layers": 4, "num_attention_heads": 1, "num_key_value_heads": 1}
    return write_checkpoint(folder, max_position_embeddings=length, **few)


def with_yarn(folder: Path, out: Path, given: Mapping[str, Any] = YARN) -> Path:
    """A copy whose config.json has YaRN in the spelling that the layout has; returns it."""
    shutil.copytree(folder, out)
    raw = read_config(out)
    text = raw.get("text_config", raw)
    name = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    text[name] = (text[name] or {}) | given
    (out / "config.json").write_text(json.dumps(raw))
    return out


def ask(folder: Path, way: str, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to serve, and the overrides of its config, that ask for YaRN in this way."""
    return (with_yarn(folder, tmp_path / "yarn") if way == "file" else folder), OVERRIDES[way]


def check_read(hf_config: Any, folder: Path, tmp_path: Path) -> None:
    """An engine reads of the config what it would of a file that has YaRN."""
    wanted = Qwen3NextConfig.from_hf(read_config(with_yarn(folder, tmp_path / "wanted")))
    found = Qwen3NextConfig.from_hf(hf_config)
    assert _numbers(found) == _numbers(wanted)
    assert found.max_length == found.max_position_embeddings == REACH
    if found.mrope_section:
        assert found.mrope_section == wanted.mrope_section


def _numbers(config: Qwen3NextConfig) -> dict[str, Any]:
    parameters = config.rope_parameters.items()
    return {name: value for name, value in parameters if not name.startswith("mrope_")}


def planned(engine: type[P], folder: Path, tokens: int, drafts: int, dtype: str = "float32") -> P:
    """What a request of so many tokens takes."""
    config = Qwen3NextConfig.from_hf(read_config(folder))
    asked = flags(max_model_len=tokens, num_speculative_tokens=drafts, dtype=dtype)
    return make_plan(engine, config, {}, asked)


def needle_prompt(length: int) -> tuple[int, ...]:
    """Random tokens, the last ones of which are at three depths, too."""
    prompt = list(random_prompt(length))
    for depth in DEPTHS:
        at = int(depth * length)
        prompt[at : at + NEEDLE] = prompt[-NEEDLE:]
    return tuple(prompt)


def at_needles(logprobs: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """Those of a prompt's log-probabilities [T-1] at its needles and its end [4, NEEDLE]."""
    whole = torch.as_tensor(logprobs)
    length = len(whole) + 1
    starts = [*(int(depth * length) for depth in DEPTHS), length - NEEDLE]
    return torch.stack([whole[start - 1 : start - 1 + NEEDLE] for start in starts])


class Gauge:
    """Every value that a server's metric has while the block runs."""

    def __init__(self, server: Server, *names: str) -> None:
        self.server, self.names = server, names
        self.seen: dict[str, list[float]] = {name: [] for name in names}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Gauge":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.over.wait(0.05):
            metrics = self.server.metrics()
            for name in self.names:
                self.seen[name].append(metrics.get(name, 0.0))
