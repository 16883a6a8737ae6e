"""The variable that leaves the check out."""

from qwen3next_plugin.env import Variable, read

NAME = "QWEN3NEXT_SELF_CHECK"
VARIABLES = {
    NAME: Variable(
        ("0", "1"),
        "1",
        "0 starts without comparing kernels with their references, once for a machine and model",
    )
}


def self_check() -> bool:
    """Whether kernels are compared with their references before they serve."""
    return read(NAME, VARIABLES[NAME]) != "0"
