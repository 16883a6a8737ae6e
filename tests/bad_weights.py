"""Quantised checkpoints that cannot be served, and what must be said of each."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from quantised import write_quantised

# Two blocks of columns, the second one not full.
PLAIN = {"hidden_size": 160, "num_hidden_layers": 4, "num_experts": 3}
Q = "model.layers.3.self_attn.q_proj"


class Fault(NamedTuple):
    """A kind of `quantised.KINDS`, what is done to its tensors, and the error behind the name."""

    kind: str
    damage: Callable[[dict[str, torch.Tensor]], object]
    error: str
    by_headers: bool = True  # else it is found only as the tensors are read

    @property
    def message(self) -> str:
        return f"{Q}: .*{self.error}"


FAULTS = {
    "no scales": Fault(
        "fp8-blocks",
        lambda t: t.pop(f"{Q}.weight_scale_inv"),
        "weight_scale.* is missing; download",
    ),
    "no zeros": Fault(
        "awq",
        lambda t: t.pop(f"{Q}.qzeros"),
        "quantised, and qzeros is missing; download",
    ),
    "other blocks": Fault(
        "fp8-blocks",
        lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(1, 1)}),
        r"shape \(1, 1\), and blocks of 128 by 128 need \(2, 2\)",
    ),
    "FP8 in groups of 32": Fault(
        "fp8-rows",
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(256, 5)}),
        r"shape \(256, 5\), .* nor of blocks or groups of 128 columns; use a checkpoint with",
    ),
    "group does not divide": Fault(
        "packed_4-bit",
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(256, 7)}),
        r"7 groups for 160 columns, which they do not divide; quantise with a group size",
    ),
    "desc_act": Fault(
        "gptq",
        lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"].flip(0)}),
        r"g_idx reorders columns \(desc_act",
        by_headers=False,
    ),
    "unknown": Fault(
        "fp8-rows",
        lambda t: t.update({f"{Q}.weight_scale_2": torch.ones(1)}),
        r"not known here, with the tensors weight float8_e4m3fn, .*; use a checkpoint in",
    ),
    "NVFP4 without its scale": Fault(
        "nvfp4",
        lambda t: t.pop(f"{Q}.weight_scale_2"),
        "quantised, and weight_scale_2 is missing; download",
    ),
    "NVFP4 with a scale that is not finite": Fault(
        "nvfp4_compressed",
        lambda t: t.update({f"{Q}.weight_global_scale": torch.zeros(1)}),
        "the scale of the whole module is inf; download",
        by_headers=False,
    ),
    "MXFP4 with scales of blocks": Fault(
        "mxfp4",
        lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:8]}),
        r"weight_scale has shape \(8, 5\), which is no scale of each 32 of 160 columns of 256",
    ),
    "MXFP4 with scales in fp32": Fault(
        "mxfp4_compressed",
        lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].float()}),
        "weight_scale has the dtype float32; use a checkpoint with scales in uint8 or float8_e8m0",
    ),
    "NVFP4 with zero points": Fault(
        "nvfp4_compressed",
        lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(256, 10, dtype=torch.uint8)}),
        "not known here, with the tensors input_global_scale float32, .*, weight_zero_point uint8",
    ),
    "3 bits": Fault(
        "gptq",
        lambda t: t.update({f"{Q}.qweight": torch.zeros(15, 256, dtype=torch.int32)}),
        "neither 4 nor 8 bits",
    ),
    "AWQ in 8 bits": Fault(
        "awq",
        lambda t: t.update({f"{Q}.qweight": torch.zeros(160, 64, dtype=torch.int32)}),
        "is AWQ in 8 bits; use a checkpoint in 4 bits",
    ),
    "8 bits with zeros": Fault(
        "gptq_8-bit",
        lambda t: t.update({f"{Q}.qzeros": torch.zeros_like(t[f"{Q}.qzeros"])}),
        "zero points other than 128; use symmetric",
        by_headers=False,
    ),
}
BY_HEADERS = [name for name, fault in FAULTS.items() if fault.by_headers]
AS_READ = [name for name in FAULTS if name not in BY_HEADERS]


def write_faulty(plain: Path, folder: Path, fault: str) -> Path:
    """A checkpoint of PLAIN, quantised with a fault."""
    kind, damage, *_ = FAULTS[fault]
    quantised, _ = write_quantised(plain, folder, kind)
    path = quantised / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    return quantised


def write_good_and_faulty(folder: Path, fault: str) -> tuple[Path, Path]:
    """Two checkpoints of PLAIN, quantised alike, the second with a fault."""
    plain = write_checkpoint(folder / "plain", **PLAIN)
    good, _ = write_quantised(plain, folder / "good", FAULTS[fault].kind)
    return good, write_faulty(plain, folder / "bad", fault)
