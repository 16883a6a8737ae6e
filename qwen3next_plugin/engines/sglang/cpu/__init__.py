"""For machines without a GPU."""
