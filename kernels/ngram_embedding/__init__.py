"""Embeddings of a token's last n-grams, hashed into rows of a large table."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS
from qwen3next_plugin.kernels.ngram_embedding.hashing import NgramHash, ngram_hash
from qwen3next_plugin.kernels.ngram_embedding.table import NgramTable
from qwen3next_plugin.kernels.step import Step

__all__ = ["NgramHash", "NgramTable", "ngram_embedding", "ngram_hash"]


def ngram_embedding(
    *,
    token_ids: Tensor,
    table: NgramTable,
    hashing: NgramHash,
    tokens_: Tensor,
    span: Tensor,
    step: Step,
    out_dtype: torch.dtype,
) -> Tensor:
    """The rows of the table for the n-grams that end at each token; keeps each page's last tokens.

    row_h = offset_h + (XOR over i < n_h of multiplier_i token_{t - i}) mod size_h

    Heads of the shortest n-grams, of two tokens, come first. Before the sequence's first token, and
    before one that is `hashing.eos`, all tokens count as that one. The pages' rules, and those of
    rolling back, are `causal_conv1d`'s: it reads `span`, which the layer's delta rule advances
    later. FP8 and int8 are multiplied by their scale in fp32.

    Shapes:
        token_ids: [T] int32 or int64
        tokens_: [slots, n + num_drafts] int32, in place. The token at position p is at p modulo the
            ring's length.
        span: [slots, 2] int32 of the layer's pages
        returns [T, heads · d]; zero in rows without a page

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: a row's tokens, slot or context length out of range, or a head's part of the
            table; nothing is written.

    Source: `Qwen4ExpTextNGramEmbedding` of transformers.
    """
    op = "ngram_embedding"
    run = dispatch.implementation(op, token_ids.device)
    if out_dtype not in ACTIVATIONS:
        raise ValueError(f"{op}: out_dtype is {out_dtype}, not one of {ACTIVATIONS}")
    return run(token_ids, table, hashing, tokens_, span, step, out_dtype)
