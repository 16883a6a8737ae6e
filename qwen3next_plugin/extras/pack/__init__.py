"""`qwen3next pack`: a checkpoint in the kernels' own layout, which the core reads."""
