"""What the machine has, and what of it this process may use. Nothing here knows a model."""
