"""Whether SGLang runs on a CPU, and the environment for it."""

import functools
import os

import torch

from qwen3next_plugin.engines.sglang.cpu.kernel_package import KernelPackage, provide

CPU_ENGINE = "SGLANG_USE_CPU_ENGINE"


def without_gpu() -> bool:
    """Whether SGLang runs on the CPU: by a flag, or because there is no accelerator."""
    asked = os.environ.get(CPU_ENGINE)
    return asked == "1" if asked is not None else not torch.accelerator.is_available()


def on_gpu() -> bool:
    """Whether SGLang runs on an NVIDIA or AMD GPU, the devices of our Triton kernels."""
    return not without_gpu() and torch.cuda.is_available()


@functools.cache
def use_cpu() -> KernelPackage:
    """Make SGLang run on the CPU in this process and in those it starts.

    Returns which `sgl_kernel` it uses there.
    """
    from sglang.srt.utils import common

    os.environ[CPU_ENGINE] = "1"
    common.is_cpu.cache_clear()  # importing SGLang's plugin loader has called it already
    return provide()
