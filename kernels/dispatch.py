"""Which backend runs an op: chosen by device, or by QWEN3NEXT_KERNELS."""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch

import qwen3next_plugin.kernels
from qwen3next_plugin import env
from qwen3next_plugin.kernels.gpu import configs


def _ops_with(module: str) -> tuple[str, ...]:
    """The ops whose folder has this file."""
    folders = map(Path, qwen3next_plugin.kernels.__path__)
    return tuple(sorted(f.parent.name for folder in folders for f in folder.glob(f"*/{module}.py")))


OPS = _ops_with("reference")  # an op is a folder with a reference
NOT_IN_TRITON = tuple(sorted({*OPS} - {*_ops_with("triton")}))  # engines bring theirs on GPUs
NOT_TRACED = ("copy_pages", "gated_delta_net")  # engines keep them out of their graphs
BACKEND_OF = {"cpu": "cpu", "cuda": "triton"}  # torch calls ROCm's devices cuda


def backend(op: str, device_type: str) -> str:
    """Name of the backend that runs `op` on such a device: `cpu` (native), `triton`, `reference`.

    Raises: NotImplementedError where no backend runs on the device. Never falls back.
    """
    choice = env.kernels()
    if choice == "reference":
        return choice
    triton_on_cpu = device_type == "cpu" and (
        configs.compiles() or (choice == "triton" and _interprets())
    )
    name = "triton" if triton_on_cpu else BACKEND_OF.get(device_type)
    if name is None or not (triton_on_cpu or choice in ("auto", name)):
        runs_on = {"cpu": "cpu", "triton": "cuda"}.get(choice, "cpu and cuda")
        raise NotImplementedError(
            f"{op}: the {'native' if choice == 'cpu' else choice} kernels run on {runs_on}, not on"
            f" {device_type}; QWEN3NEXT_KERNELS=reference runs anywhere, slowly"
        )
    if name == "triton" and op in NOT_IN_TRITON:
        raise NotImplementedError(
            f"{op}: there is no Triton kernel of it, so it does not run on {device_type};"
            " QWEN3NEXT_KERNELS=reference runs anywhere, slowly"
        )
    return name


def described(device_type: str) -> str:
    """What runs the ops on such a device, for the line that an engine logs at start."""
    if env.kernels() == "reference":
        return "slow reference"
    if backend(OPS[0], device_type) == "triton":
        return "Triton"
    from qwen3next_plugin.kernels import native

    return f"native {native.isa()}"


def _interprets() -> bool:
    """Whether Triton's interpreter, which runs kernels on a CPU, is on (TRITON_INTERPRET=1)."""
    import triton

    return triton.knobs.runtime.interpret


def implementation(op: str, device: torch.device) -> Callable:
    """The function that runs `op` on `device`."""
    return _CHOSEN.get((op, device.type)) or _LOADED[(*_loaded(op, device.type), op)]


def load(device_type: str) -> None:
    """Load all ops of such a device, and keep their backend until the next call.

    An engine calls it before it builds its model. A graph that it keeps from one start to the next
    calls ops without loading them. And reading QWEN3NEXT_KERNELS takes 20 to 50 us an op in a step
    of decode, between weights that leave nothing of Python's in the caches.
    """
    name, _ = _loaded(OPS[0], device_type)
    for op in OPS:
        _CHOSEN.pop((op, device_type), None)
        if run := _LOADED.get((name, device_type, op)):
            _CHOSEN[op, device_type] = run


_LOADED: dict[tuple[str, str, str], Callable] = {}  # by backend, device and op
_CHOSEN: dict[tuple[str, str], Callable] = {}  # by op and device


@torch.compiler.assume_constant_result  # chosen when the graph is traced
def _loaded(op: str, device_type: str) -> tuple[str, str]:
    """The backend of `op`. Loads all its ops, because a trace reads the table only once."""
    name = backend(op, device_type)
    if (name, device_type, op) not in _LOADED:
        for each in OPS:
            if name != "triton" or each not in NOT_IN_TRITON:
                _LOADED[name, device_type, each] = _function(each, name, device_type)
    return name, device_type


def _function(op: str, name: str, device_type: str) -> Callable:
    """A backend's `run`. On a GPU Triton's is a torch op, which a trace does not enter."""
    folder = f"qwen3next_plugin.kernels.{op}"
    run = importlib.import_module(f"{folder}.{name}").run
    if name != "triton" or device_type == "cpu" or op in NOT_TRACED:
        return run
    as_torch_op = importlib.import_module(f"{folder}.cpu")  # its schema and the result's shape
    kernel = _on_flat(run, as_torch_op.bundles) if hasattr(as_torch_op, "bundles") else run
    torch.library.register_kernel(f"qwen3next::{op}", device_type)(kernel)
    return as_torch_op.run


def _on_flat(run: Callable, bundles: Callable) -> Callable:
    """`run`, which takes bundles, on a torch op's flat arguments."""
    return lambda *arguments: run(*bundles(*arguments))
