"""Launches turned into compilations for an architecture, on a machine that need not have one.

What is compiled goes into Triton's own cache (TRITON_CACHE_DIR), under the keys by which a GPU of
that architecture looks for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from qwen3next_plugin.kernels.gpu import configs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _NoDevice:
    """As much of a Triton driver as a compilation asks for."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> int:
        return 1 + list(TARGETS).index(self.arch)  # kernels are kept by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(arch: str) -> Iterator[list[CompiledKernel]]:
    """In here the ops, given tensors on a CPU, compile what they would launch; yields it."""
    compiled: list[CompiledKernel] = []
    run, active = JITFunction.run, driver._active  # reset_active fails where there is no GPU

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    driver.set_active(_NoDevice(arch))
    configs.compile_for(arch)
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active
        configs.compile_for(None)
