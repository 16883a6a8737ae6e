"""What SGLang has to be told where there is no GPU, before its modules are imported."""

import functools
import os
from typing import Any

import torch

from qwen3next_plugin import env
from qwen3next_plugin.engines.sglang.cpu.kernel_package import KernelPackage, provide

PLATFORM = "qwen3next_plugin.engines.sglang.cpu.platform:CpuPlatform"
ARCHITECTURES = ("Qwen3NextForCausalLM", "Qwen3NextForCausalLMMTP")
DRAFTS = ("NEXTN", "EAGLE")  # SGLang's names for drafts of the checkpoint's own head
ATTENTION_BACKEND = "qwen3next_cpu"
HOST_BACKEND = "intel_amx"  # SGLang's own choice on a CPU, which it leaves where there is no AMX
TORCH_BACKEND = "torch_native"  # what it then takes, which drafts nothing


def is_ours(model_config: Any) -> bool:
    """Whether a model of SGLang's is one that ours takes the place of."""
    architectures = model_config.hf_config.architectures
    return bool(architectures) and architectures[0] in ARCHITECTURES


def without_gpu() -> bool:
    """Whether SGLang is to run on the CPU: asked for, or because there is nothing else."""
    asked = os.environ.get("SGLANG_USE_CPU_ENGINE")
    return asked == "1" if asked is not None else not torch.accelerator.is_available()


def on_gpu() -> bool:
    """Whether SGLang is to run on a GPU of NVIDIA's or AMD's, which our Triton kernels are for."""
    return not without_gpu() and torch.cuda.is_available()


def activate() -> str | None:
    """Entry point `sglang.srt.platforms`: our CPU, unless there is something better."""
    return PLATFORM if without_gpu() and not env.disabled() else None


@functools.cache
def use_cpu() -> KernelPackage:
    """Have SGLang, here and in the processes it starts, take itself for a CPU engine.

    Returns which `sgl_kernel` that is with.
    """
    from sglang.srt.utils import common

    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    common.is_cpu.cache_clear()  # asked once already, while SGLang's plugin loader was imported
    return provide()
