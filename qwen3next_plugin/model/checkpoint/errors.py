"""The error about a checkpoint."""

MIXED = "config.json and the safetensors files do not belong together; take both from one release"


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; names the tensor or the file, and the fix."""
