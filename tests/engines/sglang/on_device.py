"""SGLang in this process runs on a CPU as the plugin runs on a GPU.

Steps and snapshots that are built without a look at them; SGLang's own worker for drafts; and with
QWEN3NEXT_KERNELS=triton the Triton kernels, in Triton's interpreter. What has no Triton kernel,
because a GPU's engine brings its own, stays native.
"""

import sys
from pathlib import Path

import torch
from sglang.srt.arg_groups import mamba_hook
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from qwen3next_plugin import env
from qwen3next_plugin.engines import patching
from qwen3next_plugin.engines.sglang import hooks, patches, served
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.versions import check_host

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

import interpreter

by_device = dispatch.backend


def native_where_there_is_no_other(op: str, device_type: str) -> str:
    return "cpu" if op in dispatch.NOT_IN_TRITON else by_device(op, device_type)


def switch() -> None:
    """Serve so from now on; the plugin has been registered for a CPU, and has served nothing."""
    hooks.on_gpu = lambda: True
    SpeculativeAlgorithm.create_worker = SpeculativeAlgorithm.create_worker.__wrapped__
    chosen = [entry for entry in patches.TABLE.entries if "AdaptiveController" in entry.target]
    patching.apply(chosen, patching.Host("SGLang", check_host("sglang")), patches.register_hooks)
    strategy = "mamba_radix_cache_strategy"
    served.SERVED_ON_CPU[strategy] = served.SERVED_ON_GPU[strategy]
    del served.SERVED_WITH_DRAFTS_ON_CPU["speculative_adaptive"]
    mamba_hook._platform_supports_mamba_cache_extra_buffer = lambda: True
    torch.Tensor.pin_memory = lambda self, *_: self  # there is no device to pin for
    if env.kernels() == "triton":
        interpreter.interpret()
        dispatch.backend = native_where_there_is_no_other
