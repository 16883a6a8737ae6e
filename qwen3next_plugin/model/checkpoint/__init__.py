"""A checkpoint: its files, its tensors, and how they are read."""
