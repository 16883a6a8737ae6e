"""What is mended in vLLM for any model: nothing here is needed to see how ours is served."""
