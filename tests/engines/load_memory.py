"""The memory that loading a model takes, measured where it is loaded, and what it may take."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from checkpoints import write_checkpoint
from quantised import pack_checkpoint, write_quantised

R = TypeVar("R")
PACKED = "packed before"
KINDS = ("bf16", "int8", "int4", "fp8-blocks", "packed_4-bit", PACKED)
MOST, MOST_PACKED = 1.15, 1.05  # of the packed weights' bytes
# 1 GB in bf16; a layer, which is packed beside the others, has 2.5 % of it.
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 40,
    "num_experts": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}


# 200 MB of experts in the MTP layer, once that is int8; the trunk has none.
LARGE_MTP = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "mlp_only_layers": [0, 1, 2, 3],
    "num_experts": 128,
    "moe_intermediate_size": 512,
}


class Loaded(NamedTuple):
    """Bytes."""

    peak: int  # of loading, over what there was before
    weights: int  # as they are served


def write_large(folder: Path) -> Path:
    """A checkpoint in bf16, without an MTP layer."""
    return write_checkpoint(folder, mtp=False, dtype=torch.bfloat16, **LARGE)


def write_large_mtp(folder: Path) -> Path:
    """A checkpoint in bf16, of which most is the MTP layer."""
    return write_checkpoint(folder, dtype=torch.bfloat16, **LARGE_MTP)


def prepared(plain: Path, folder: Path, kind: str) -> tuple[Path, dict[str, str]]:
    """A checkpoint of this kind, and the environment to serve it in; kind: one of KINDS."""
    env = {"QWEN3NEXT_BATCH_INVARIANT": "1"}  # which packs bf16, too
    if kind == PACKED:
        plain = pack_checkpoint(plain, folder / "out", "int8")
    elif kind.startswith("int"):
        env["QWEN3NEXT_QUANTISE"] = kind
    elif kind != "bf16":
        plain = write_quantised(plain, folder, kind)[0]
    os.sync()  # pages that are not on disk yet cannot be given back
    return plain, env


def check(kind: str, loaded: Loaded) -> None:
    """There is never a second whole copy of the weights."""
    ratio = loaded.peak / loaded.weights
    print(f"{kind}: {loaded.weights / 2**20:.0f} MiB of weights, peak {ratio:.3f} of that")
    assert loaded.weights > 100 << 20
    assert ratio <= (MOST_PACKED if kind == PACKED else MOST)


def measured(
    load_model: Callable[..., torch.nn.Module], found: Callable[[Loaded], object]
) -> Callable[..., torch.nn.Module]:
    """An engine's function that loads a model, which calls `found` with what that took."""

    def load(*args: Any, **options: Any) -> torch.nn.Module:
        model, taken = peak_of(lambda: load_model(*args, **options))
        tensors = [*model.parameters(), *model.buffers()]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        found(Loaded(taken, sum(sizes.values())))
        return model

    return load


def peak_of(call: Callable[[], R]) -> tuple[R, int]:
    """What a call returns, and the most memory that it took, over what there was before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = _status("VmRSS") - _libraries()
    return call(), _status("VmHWM") - _libraries() - before


def _libraries() -> int:
    """Bytes of libraries' files in this process: code that is called for the first time.

    A fork starts without them, whatever the process had read that it was forked from.
    """
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(":", 1)[0].split(" ", 1)[0]:  # a mapping: addresses, …, its file
            inside = ".so" in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def _status(field: str) -> int:
    """Bytes that the system counts for this process."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) << 10
