"""A checkpoint: its files, its tensors, and what of it is quantised."""
