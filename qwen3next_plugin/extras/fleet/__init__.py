"""Several machines and servers, what they hand over and keep, and weights that change."""
