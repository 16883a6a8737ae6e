"""What the Triton kernels share: rows, gates, faults, and the sizes they are built for."""
