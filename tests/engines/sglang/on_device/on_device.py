"""A plugin of SGLang's that a test's server loads: it runs on a CPU as ours runs on a GPU.

Steps and snapshots that are built without a look at them; SGLang's own worker for drafts; and with
TRITON_INTERPRET=1 the Triton kernels, in Triton's interpreter. What has no Triton kernel, because a
GPU's engine brings its own, stays native.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "kernels"))

import interpreter

from qwen3next_plugin.engines.sglang import plugin as registration
from qwen3next_plugin.engines.sglang.cpu import environment
from qwen3next_plugin.kernels import dispatch

by_device, register = dispatch.backend, registration._register
WORKER = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker"


def native_where_there_is_no_other(op: str, device_type: str) -> str:
    return "cpu" if op in dispatch.NOT_IN_TRITON else by_device(op, device_type)


def register_as_on_a_gpu() -> bool:
    """SGLang imports every plugin before it runs one; its modules only after ours is prepared."""
    environment.use_cpu()
    from sglang.srt.arg_groups import mamba_hook

    from qwen3next_plugin.engines.sglang import hooks, patches, served

    hooks.on_gpu = lambda: True
    patches.ON_CPU = tuple(entry for entry in patches.ON_CPU if entry.target != WORKER)
    strategy = "mamba_radix_cache_strategy"
    served.SERVED_ON_CPU[strategy] = served.SERVED_ON_GPU[strategy]
    del served.SERVED_WITH_DRAFTS_ON_CPU["speculative_adaptive"]
    mamba_hook._platform_supports_mamba_cache_extra_buffer = lambda: True
    return register()


def nothing() -> None:
    """What SGLang runs; importing this module did all."""


if os.environ.get("TRITON_INTERPRET"):
    interpreter.fix()
    dispatch.backend = native_where_there_is_no_other
registration._register = register_as_on_a_gpu
torch.Tensor.pin_memory = lambda self, *_: self  # there is no device to pin for
