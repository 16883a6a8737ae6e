"""Numbers of bytes as a reader wants them."""


def readable(nbytes: float) -> str:
    """Bytes in GiB, or in MiB if they are few, for a reader."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.2f} MiB"
