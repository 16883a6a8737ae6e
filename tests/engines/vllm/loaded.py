"""vLLM, imported once where the engines and servers of tests are forked from.

For a CPU vLLM starts its processes as new interpreters, and looks at every model class in one.
Each would import vLLM again, which takes most of the time until it serves: here they are forks. The
library of the native kernels is loaded here, too, so QWEN3NEXT_ISA does nothing in a fork.

With --enforce-eager vLLM still compiles a few functions of its own at their first call, such as the
one that counts ranks for log-probabilities. That takes seconds in every engine, so forks call them
as they are; those of test_server.py and of compiled engines are compiled.
"""

import gc
import multiprocessing
from collections.abc import Callable
from importlib import import_module
from multiprocessing.context import BaseContext
from typing import TypeVar

T = TypeVar("T")
NAMES = (
    *("vllm.entrypoints.llm", "vllm.entrypoints.cli.serve", "vllm.v1.core.sched.scheduler"),
    *("vllm.compilation.backends", "compressed_tensors"),
)
CPU_WORKER = "vllm.v1.worker.cpu_worker"  # imported, it makes torch.cuda that of a CPU
gc.disable()  # for nothing is garbage yet
for name in NAMES:
    import_module(name)
on_cpu = import_module("vllm.platforms").current_platform.is_cpu()
if on_cpu:
    import_module(CPU_WORKER)
import_module("qwen3next_plugin.kernels.dispatch").load("cpu")
registry = import_module("vllm.model_executor.models.registry")
context = multiprocessing.get_context


def forking(method: str | None = None) -> BaseContext:
    return context("fork" if method == "spawn" else method)


def here(look: Callable[[], T]) -> T:
    return look()


if on_cpu:  # a process that has used CUDA cannot be forked
    multiprocessing.get_context = forking
registry._run_in_subprocess = here
gc.freeze()  # else each fork looks through all of that whenever vLLM collects garbage
gc.enable()
