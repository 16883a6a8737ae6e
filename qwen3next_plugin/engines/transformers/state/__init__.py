"""The cache that can go back, and the step that reads and writes it."""
