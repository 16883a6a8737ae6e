"""Random checkpoints in Qwen3.5's layouts: sizes, MLPs, prefixes and forms of experts."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import write_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/ is not installed

from examples.qwen3_5_layout import rewrite

DENSE = {"num_experts": 0}


class Member(NamedTuple):
    """A checkpoint: how it differs from checkpoints.BASE, and its layout."""

    changes: Mapping[str, Any]
    wrapped: bool = False
    fused: bool = True  # experts in one tensor

    def write(self, folder: Path, *, seed: int = 0, mtp: bool = True) -> Path:
        """Write it; returns its folder. Its drafts are often right, as the MTP head is."""
        return self.pair(folder, seed=seed, mtp=mtp)[1]

    def pair(self, folder: Path, *, seed: int = 0, mtp: bool = True) -> tuple[Path, Path]:
        """Write the same weights as Qwen3-Next, and in this layout; returns both folders."""
        plain = write_checkpoint(folder / "qwen3-next", seed=seed, mtp=mtp, **self.changes)
        return plain, rewrite(plain, folder / "qwen3.5", wrapped=self.wrapped, fused=self.fused)


FAMILY: Mapping[str, Member] = {
    "dense_HV=H_tied_6-layers": Member(
        DENSE
        | {
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 64,
            "num_hidden_layers": 6,
            "tie_word_embeddings": True,
        }
    ),
    "dense_HV=3H_wrapped_7-layers": Member(
        DENSE
        | {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 48,
            "head_dim": 64,
            "hidden_size": 96,
            "num_hidden_layers": 7,
            "num_key_value_heads": 1,
        },
        wrapped=True,
    ),
    "moe_HV=4H_top-3-of-12_5-layers": Member(
        {
            "linear_num_value_heads": 8,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 5,
        }
    ),
    "moe_HV=2H_wrapped_split_6-layers": Member(
        {"full_attention_interval": 3, "num_hidden_layers": 6, "moe_intermediate_size": 48},
        wrapped=True,
        fused=False,
    ),
}
