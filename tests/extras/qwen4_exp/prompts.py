"""Prompts and sizes for which an engine serves Qwen4-Exp (Qwen3.8-Flash-Next)."""

from checkpoints import random_prompt

# Sparse attention is past its budget of 64 tokens in most prompts.
PROMPTS = [random_prompt(length, seed=31) for length in (1, 2, 3, 63, 64, 65, 300, 1000)]
SLICE = 257  # tokens of a prompt that a step reads: its ends are within blocks of the indexer
OTHER_SIZES = {
    "hc_count": 3,
    "hidden_size": 96,
    "num_hidden_layers": 5,
    "num_key_value_heads": 1,
    "linear_num_value_heads": 2,
    "linear_value_head_dim": 48,
    "ple_layer_ids": [1],
    "ple_embed_dim": 36,
    "heads_per_ngram": 2,
    "ngram_size": 4,
    "indexer_compress_ratio": 8,
    "indexer_n_heads": 7,
    "output_gate_type": None,
    "split_ngram_parts": 3,
    "tie_word_embeddings": True,
}


def with_ends_of_text(end: int) -> list[tuple[int, ...]]:
    """Prompts with an end of text inside, at a slice's start, and twice in a row."""
    prompts = []
    for at in ((5,), (254, 255, 256, 257), (0, 1, 3, 5, 299)):
        ids = list(random_prompt(300, seed=32))
        for position in at:
            ids[position] = end
        prompts.append(tuple(ids))
    return prompts
