"""Compile kernels for a GPU architecture on a machine without that GPU.

The results go into Triton's cache (TRITON_CACHE_DIR) under the keys that such a GPU looks up.
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
    """The part of a Triton driver that compiling needs."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> int:
        return 1 + list(TARGETS).index(self.arch)  # Triton caches kernels by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(arch: str) -> Iterator[list[CompiledKernel]]:
    """Within this context ops on CPU tensors compile their kernels and launch nothing.

    Yields the list of kernels compiled so far.
    """
    compiled: list[CompiledKernel] = []
    run, active = JITFunction.run, driver._active  # reset_active fails without a GPU

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
