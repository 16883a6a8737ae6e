"""Which backend runs an op: chosen by device, or by QWEN3NEXT_KERNELS."""

import functools
import importlib
from collections.abc import Callable

import torch

from qwen3next_plugin import env


def backend(op: str, device: torch.device) -> str:
    """Name of the backend that runs `op` on `device`: `cpu` (native) or `reference`.

    Raises: NotImplementedError where no backend runs on the device. Never falls back.
    """
    asked = env.kernels()
    if asked == "reference":
        return asked
    if device.type != "cpu":
        raise NotImplementedError(
            f"{op}: the native kernels run on cpu, not on {device.type};"
            " QWEN3NEXT_KERNELS=reference runs anywhere, slowly"
        )
    return "cpu"


@torch.compiler.assume_constant_result
def implementation(op: str, device: torch.device) -> Callable:
    """The function that runs `op` on `device`."""
    return _load(op, backend(op, device))


@functools.cache
def _load(op: str, name: str) -> Callable:
    module = importlib.import_module(f"qwen3next_plugin.kernels.{op}.{name}")
    return getattr(module, op)
