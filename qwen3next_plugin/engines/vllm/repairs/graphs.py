"""Graphs that an earlier start compiled, on a CPU."""

from collections.abc import Callable
from typing import Any

from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Graph

FINISH = "finalize_loading"


def load_graph(host: Callable[..., Any], model: Any, aot_compilation_path: str) -> Any:
    """Around the function that reads a graph from a file.

    It ends with a call of a method that only vLLM's own graphs have. Those of a CPU are torch's:
    the call would fail, and the model would be compiled again.
    """
    if not hasattr(Graph, FINISH):
        setattr(Graph, FINISH, lambda self, vllm_config: None)
    return host(model, aot_compilation_path)
