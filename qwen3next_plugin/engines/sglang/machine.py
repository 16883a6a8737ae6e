"""What SGLang has to be told where there is no GPU, before its modules are imported."""

import os

import torch

from qwen3next_plugin.engines.sglang.kernel_package import KernelPackage, provide

ATTENTION_BACKEND = "qwen3next_cpu"
HOST_BACKEND = "intel_amx"  # SGLang's own choice on a CPU, which it leaves where there is no AMX


def without_gpu() -> bool:
    """Whether SGLang is to run on the CPU: asked for, or because there is nothing else."""
    asked = os.environ.get("SGLANG_USE_CPU_ENGINE")
    return asked == "1" if asked is not None else not torch.accelerator.is_available()


def use_cpu() -> KernelPackage:
    """Have SGLang, here and in the processes it starts, take itself for a CPU engine.

    Returns what `sgl_kernel` is served by.
    """
    from sglang.srt.utils import common

    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    common.is_cpu.cache_clear()  # asked once already, while SGLang's plugin loader was imported
    return provide()
