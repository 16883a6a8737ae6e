"""What Qwen4-Exp has that the family has not, for the layers below engines."""

from typing import Any

from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.extras.qwen4_exp.ple import page_parts
from qwen3next_plugin.extras.qwen4_exp.tensors import UNREAD, frame
from qwen3next_plugin.model.kinds import ModelKind


def sizes(c: Qwen4ExpConfig) -> str:
    """All that a case of the self-check depends on."""
    streams = f"{c.hc_count} {c.hc_lowrank} {c.output_gate_type}"
    ngrams = f"{c.ngram_size} {c.heads_per_ngram} {c.ple_embed_dim}"
    return f"{streams} {ngrams} {c.indexer_n_heads} {c.indexer_head_dim} {c.indexer_compress_ratio}"


def cases(served: Any, backend: str) -> dict[str, Any]:
    """The cases of its kernels."""
    from qwen3next_plugin.extras.qwen4_exp.cases import cases

    return cases(served, backend)


def use_packing(*model: Any, **how: Any) -> None:
    """Have its stream mixers packed."""
    from qwen3next_plugin.extras.qwen4_exp.mixing import use_packing

    use_packing(*model, **how)


KIND = ModelKind(
    config=Qwen4ExpConfig,
    frame=frame,
    unread=UNREAD,
    page_parts=page_parts,
    keeps="n-grams",
    sizes=sizes,
    cases=cases,
    use_packing=use_packing,
)
