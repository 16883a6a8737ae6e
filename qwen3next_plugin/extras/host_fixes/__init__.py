"""Repairs of the engines for any model, and requests that would end or stall them."""
