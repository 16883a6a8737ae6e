"""The weights of our modules, and the checkpoint's modules that are stacked in each."""

from collections import defaultdict
from typing import NamedTuple

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.hyper_connection import takes_packed
from qwen3next_plugin.model.checkpoint.layouts import (
    EXPERT,
    FLAT_PROJECTION,
    STACKED_PROJECTIONS,
    holder,
)
from qwen3next_plugin.model.checkpoint.tensors import all_tensors
from qwen3next_plugin.model.quantisation.modules import (
    EXPERT_TENSORS,
    MIXING_WEIGHTS,
    PLAIN,
    matrices,
)

HEAD_MODULE = "lm_head"
ORDER = (*STACKED_PROJECTIONS, "_qkv", "_z", "_b", "_a")  # of modules that are stacked


class Stacked(NamedTuple):
    """A weight of ours.

    shape: (N, K), or (E, N, K) of experts.
    parts: output channels of each module in it, or of one expert's modules; those of linear
        attention's flat projections are mixed by head, so they are one part.
    modules: the checkpoint's, in the order of the channels, expert by expert.
    """

    shape: tuple[int, ...]
    parts: tuple[int, ...]
    modules: tuple[str, ...]


def stacked_weights(config: Qwen3NextConfig) -> dict[str, Stacked]:
    """Every weight that may be packed, by the name of our module; of experts `.w13` and `.w2`.

    The output head is one, also where it is tied to the embeddings; so are stream mixers, if
    their kernel takes them packed.
    """
    shapes = matrices(all_tensors(config))
    found: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        module = name.removesuffix(".weight")
        ours, expert = holder(module, config), EXPERT.match(module)
        mixes = MIXING_WEIGHTS.search(module) and takes_packed(config.hidden_size)
        if mixes or not PLAIN.search(ours):
            found[f"{ours}.{EXPERT_TENSORS[expert[2]]}" if expert else ours].append(module)
    weights = {}
    for ours, modules in found.items():
        modules.sort(key=_place)
        experts = config.num_experts if EXPERT.match(modules[0]) else 1
        sizes = [shapes[f"{m}.weight"] for m in modules[: len(modules) // experts]]
        parts, columns = tuple(channels for channels, _ in sizes), sizes[0][1]
        lead = (experts,) if EXPERT.match(modules[0]) else ()
        shape = (*lead, sum(parts), columns)
        if FLAT_PROJECTION.match(f"{modules[0]}.weight"):
            parts = (sum(parts),)
        weights[ours] = Stacked(shape, parts, tuple(modules))
    vocabulary = (config.vocab_size, config.hidden_size)
    head = "model.embed_tokens" if config.tie_word_embeddings else HEAD_MODULE
    weights[HEAD_MODULE] = Stacked(vocabulary, vocabulary[:1], (head,))
    return weights


def is_plain(name: str) -> bool:
    """Whether a weight of ours is the output head or a stream mixer.

    They have no format, and are int8 if `packed.plain_as_int8`.
    """
    return name == HEAD_MODULE or MIXING_WEIGHTS.search(name) is not None


def _place(module: str) -> tuple[int, int]:
    """A module's expert, and its place in the stack."""
    if expert := EXPERT.match(module):
        kinds = list(EXPERT_TENSORS)
        return int(module.removeprefix(expert[1]).split(".")[1]), kinds.index(expert[2])
    return 0, next((i for i, end in enumerate(ORDER) if module.endswith(end)), 0)
