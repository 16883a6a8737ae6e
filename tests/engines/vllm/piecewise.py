"""Has vLLM compile pieces of a graph on a CPU, cut at its splitting ops, as it does on a GPU."""

import inspect
import re

import torch
from vllm.compilation.passes.utility import fix_functionalization
from vllm.config import CompilationConfig, CompilationMode, VllmConfig
from vllm.platforms import current_platform

from qwen3next_plugin.engines.vllm.names import OPAQUE_OP

platform = type(current_platform)
host = platform.check_and_update_config


def keep_mode(vllm_config: VllmConfig) -> None:
    """Around vLLM's choice: a CPU's platform turns pieces into one graph."""
    config = vllm_config.compilation_config
    mode, backend = config.mode, config.backend
    host(vllm_config)
    if mode == CompilationMode.VLLM_COMPILE:
        config.mode, config.backend = mode, backend or "inductor"


platform.check_and_update_config = staticmethod(keep_mode)
CompilationConfig._attention_ops.append(OPAQUE_OP)  # our patch does so on a GPU only

# A pass compares each op of a graph with those of vLLM's CUDA build by name, so they must be there.
compared = set(re.findall(r"torch\.ops\._C\.(\w+)", inspect.getsource(fix_functionalization)))
OF_CUDA = torch.library.Library("_C", "FRAGMENT")
for name in compared:
    if not hasattr(torch.ops._C, name):
        OF_CUDA.define(f"{name}() -> ()")
