"""The state pages, and the step that reads and writes them."""
