"""What a machine without a GPU needs."""
