"""Which backend runs an op: chosen by device, or by QWEN3NEXT_KERNELS."""

import importlib
from collections.abc import Callable

import torch

from qwen3next_plugin import env

OPS = (
    "causal_conv1d",
    "draft_head",
    "fused_moe",
    "gated_delta_rule",
    "output_gate",
    "paged_attention",
    "qk_norm_rope",
    "rms_norm",
    "rms_norm_gated",
)


def backend(op: str, device_type: str) -> str:
    """Name of the backend that runs `op` on such a device: `cpu` (native) or `reference`.

    Raises: NotImplementedError where no backend runs on the device. Never falls back.
    """
    asked = env.kernels()
    if asked == "reference":
        return asked
    if device_type != "cpu":
        raise NotImplementedError(
            f"{op}: the native kernels run on cpu, not on {device_type};"
            " QWEN3NEXT_KERNELS=reference runs anywhere, slowly"
        )
    return "cpu"


def implementation(op: str, device: torch.device) -> Callable:
    """The function that runs `op` on `device`."""
    return _LOADED[_loaded(op, device.type), op]


_LOADED: dict[tuple[str, str], Callable] = {}


@torch.compiler.assume_constant_result  # traced, the choice is made once: when the graph is made
def _loaded(op: str, device_type: str) -> str:
    """The backend of `op`, with all its ops loaded: a trace sees the table as it first was."""
    name = backend(op, device_type)
    if (name, op) not in _LOADED:
        for each in OPS:
            module = importlib.import_module(f"qwen3next_plugin.kernels.{each}.{name}")
            _LOADED[name, each] = getattr(module, each)
    return name
