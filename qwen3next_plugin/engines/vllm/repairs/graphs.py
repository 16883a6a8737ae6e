"""Graphs that an earlier start compiled, on a CPU."""

from collections.abc import Callable
from typing import Any

from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Graph

FINISH = "finalize_loading"


def load_graph(host: Callable[..., Any], model: Any, aot_compilation_path: str) -> Any:
    """Around the function that reads one; where torch compiles without vLLM's passes it is whole.

    vLLM would call a method of its own class, fail, and compile again.
    """
    if not hasattr(Graph, FINISH):
        setattr(Graph, FINISH, lambda self, vllm_config: None)
    return host(model, aot_compilation_path)
