"""What is mended in SGLang for any model: nothing here is needed to see how ours is served."""
