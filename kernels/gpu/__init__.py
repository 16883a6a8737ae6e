"""Shared by the Triton kernels: rows of a step, gates, faults, launch sizes."""
