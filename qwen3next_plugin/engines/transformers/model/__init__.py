"""The layers, around transformers' own."""
