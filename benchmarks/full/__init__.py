"""A released size with all its layers: its model, its limits, and what is measured of it."""
