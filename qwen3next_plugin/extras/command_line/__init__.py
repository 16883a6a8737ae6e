"""Commands of `qwen3next`: what runs here, what fits, GPU kernels ahead, a server's drafts."""
