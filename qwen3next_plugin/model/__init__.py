"""The engine-neutral model: what a Qwen3-Next layer computes, given a step and its state."""
