"""The two layouts of the family's checkpoints, and their conversion to that of our parameters.

Our parameters, and the kernels that read what they project to, are laid out as Qwen3-Next's
checkpoints are: [q | k | values | gates] of one key head after the other, so that a rank's share
is one range. Qwen3.5 and later have all of q, then all of k, and so on, in four tensors. The
channels are the same, so the same weights in both layouts give the same parameters, bit for bit.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch

from qwen3next_plugin.config import Layout, Qwen3NextConfig
from qwen3next_plugin.model.checkpoint.errors import MIXED, CheckpointError
from qwen3next_plugin.model.kinds import kind_of

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name, in an order that is always the same
Tensors = Iterable[tuple[str, torch.Tensor]]

# Prefix of the checkpoint's names → prefix of ours; None: a vision tower, which the host loads.
PREFIXES: Mapping[Layout, Mapping[str, str | None]] = {
    "grouped": {},
    "flat": {
        "model.language_model.": "model.",
        "model.mtp.": "mtp.",
        "model.visual.": None,
        "visual.": None,
    },
}
EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)$")
FUSED_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_\w*(packed|scale)\w*)?$")
# A part of the table of an n-gram embedding, which is no parameter.
SHARD = re.compile(r"\.ngram_embedding\.shard_(\d+)\.weight$")
# Tensors of an output head, except those that `qwen3next pack` writes.
TIED_HEAD = re.compile(r"lm_head\.(?!(packed|scale|zero)$)")
FLAT_PROJECTION = re.compile(r"(.*\.linear_attn\.in_proj)_(qkv|z|b|a)\.(\w+)$")
# A checkpoint's projection → the stacked projection that holds it, and as which part.
STACKED_PROJECTIONS: Mapping[str, tuple[str, str | int]] = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
    ".mlp.up_proj": (".mlp.gate_up_proj", 1),
    ".shared_expert.gate_proj": (".shared_expert.gate_up_proj", 0),
    ".shared_expert.up_proj": (".shared_expert.gate_up_proj", 1),
}
FIX = "Use a checkpoint that leaves linear_attn.in_proj_* unquantised"


def projections(config: Qwen3NextConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our two input projections: the flat layout's tensors in each, and their parts' channels.

    Each key head has an equal share of every part's channels.
    """
    key, value, HV = config.key_dim, config.value_dim, config.linear_num_value_heads
    return {
        "qkvz": {"qkv": (key, key, value), "z": (value,)},
        "ba": {"b": (HV,), "a": (HV,)},
    }


def output_sizes(config: Qwen3NextConfig, name: str, layout: Layout) -> list[int]:
    """Output channels of our projection `qkvz` or `ba`: per part if flat, else in all."""
    sizes = [channels for parts in projections(config)[name].values() for channels in parts]
    return sizes if layout == "flat" else [sum(sizes)]


def in_projections(config: Qwen3NextConfig) -> Shapes:
    """Name within the layer and shape of a linear layer's input projections in the checkpoint."""
    shapes: Shapes = {}
    for ours, tensors in projections(config).items():
        channels = {name: sum(parts) for name, parts in tensors.items()}
        if config.layout == "grouped":
            channels = {ours: sum(channels.values())}
        shapes |= {
            f"linear_attn.in_proj_{name}.weight": (n, config.hidden_size)
            for name, n in channels.items()
        }
    return shapes


def holder(module: str, config: Qwen3NextConfig) -> str:
    """The name of our module that holds a module of the checkpoint."""
    if expert := EXPERT.match(module):
        return expert[1]
    if flat := FLAT_PROJECTION.match(f"{module}.weight"):
        whole = next(whole for whole, parts in projections(config).items() if flat[2] in parts)
        return f"{flat[1]}_{whole}"
    for part, (whole, _) in STACKED_PROJECTIONS.items():
        if module.endswith(part):
            return module.removesuffix(part) + whole
    return module


def our_name(name: str, config: Qwen3NextConfig) -> str | None:
    """A tensor's name without the checkpoint's prefix; None if the text model does not load it."""
    ours = without_prefix(name, config)
    if ours is None or is_tied_head(ours, config):
        return None
    kind = kind_of(config)
    return None if kind is not None and kind.unread.search(ours) else ours


def is_tied_head(name: str, config: Qwen3NextConfig) -> bool:
    """Whether a tensor belongs to a stored but tied head; the embeddings are used instead."""
    return config.tie_word_embeddings and TIED_HEAD.match(name) is not None


def without_prefix(name: str, config: Qwen3NextConfig) -> str | None:
    """A tensor's name without the checkpoint's prefix; None if it is not the text model's."""
    for prefix, ours in PREFIXES[config.layout].items():
        if name.startswith(prefix):
            return None if ours is None else ours + name.removeprefix(prefix)
    return name


def tower_shapes(tensors: Tensors) -> Shapes:
    """Shapes of a vision tower's tensors, by name without the `model.` of some checkpoints."""
    return {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in tensors}


def check_tower(missing: Collection[str]) -> None:
    """Refuse a vision tower if the files lack some of its tensors.

    Args: missing: names of these tensors.

    Raises: CheckpointError, naming the first.
    """
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors of the vision tower are missing, the first is {min(missing)}: "
            f"the checkpoint is incomplete; download it again, or add --language-model-only to "
            f"serve text"
        )


def our_names(stored: Tensors, config: Qwen3NextConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Rename the tensors, leave the vision tower out, and split experts that are in one tensor."""
    for original, tensor in stored:
        if (name := our_name(original, config)) is None:
            continue
        if config.layout == "flat" and (fused := FUSED_EXPERTS.match(name)):
            if fused[3] or tensor.dtype.itemsize == 1:
                raise CheckpointError(
                    f"tensor {original}: experts that are quantised in one tensor are not served; "
                    f"use a checkpoint with tensors of each expert"
                )
            yield from _split_experts(original, fused[1], fused[2], tensor, config)
        else:
            yield name, tensor


def _split_experts(
    original: str, experts: str, kind: str, tensor: torch.Tensor, config: Qwen3NextConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of each expert's matrices, from [E, 2I, D] (gate, then up) or [E, D, I]."""
    E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shape = (E, 2 * width, D) if kind == "gate_up_proj" else (E, D, width)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"tensor {original} has shape {tuple(tensor.shape)}, the config asks for {shape}: "
            f"{MIXED}"
        )
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    for e, expert in enumerate(tensor):
        for name, part in zip(names, expert.chunk(len(names)), strict=True):
            yield f"{experts}.{e}.{name}.weight", part


def group_projections(
    tensors: Tensors, config: Qwen3NextConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Join the flat layout's projections, each as soon as its last tensor has arrived.

    Raises:
        CheckpointError: a quantised tensor that cannot be joined, or whose counterpart is missing.
    """
    flat = {
        tensor: (ours, parts) for ours, parts in projections(config).items() for tensor in parts
    }
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        if (found := FLAT_PROJECTION.match(name)) is None:
            yield name, tensor
            continue
        prefix, kind, suffix = found.groups()
        ours, parts = flat[kind]
        joined = f"{prefix}_{ours}.{suffix}"
        group = waiting.setdefault(joined, {})
        group[kind] = _by_head(name, tensor, parts[kind], config.linear_num_key_heads)
        if len(group) == len(parts):
            if not _fit(group.values()):
                raise CheckpointError(f"{joined} cannot be joined: its parts differ. {FIX}")
            yield joined, torch.cat([group[kind] for kind in parts], dim=1).flatten(0, 1)
            del waiting[joined]
    if waiting:
        raise CheckpointError(f"{min(waiting)} cannot be joined: some of its parts lack it. {FIX}")


def _fit(parts: Collection[torch.Tensor]) -> bool:
    """Whether torch can join them: equal columns, and no mix of FP8 with another dtype."""
    columns, dtypes = {part.shape[2:] for part in parts}, {part.dtype for part in parts}
    return len(columns) == 1 and (len(dtypes) == 1 or all(d.itemsize > 1 for d in dtypes))


def _by_head(name: str, tensor: torch.Tensor, parts: Sequence[int], heads: int) -> torch.Tensor:
    """One entry for each head, with its share of every part.

    A quantised tensor may have one entry for several channels of the weight: a scale of a block.

    Shapes:
        tensor [sum(parts)/n, ...] for any n, returns [heads, sum(parts)/n/heads, ...]
    """
    entries = len(tensor) if tensor.ndim else 0
    n = sum(parts) // entries if entries else 0
    if n * entries != sum(parts) or any(part % (n * heads) for part in parts):
        raise CheckpointError(
            f"{name} {tuple(tensor.shape)} cannot be split among {heads} key heads. {FIX}"
        )
    split = tensor.split([part // n for part in parts])
    return torch.cat([part.unflatten(0, (heads, -1)) for part in split], dim=1)
