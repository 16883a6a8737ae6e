"""Qwen4-Exp (Qwen3.8-Flash-Next): residual streams, embeddings of n-grams, sparse attention."""
