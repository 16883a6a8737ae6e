"""Compiled graphs on a CPU: complete cache keys, reading from files, faster lookup of sources."""

from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any

from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Graph
from torch._dynamo.package import InlinedSource, SourceInfo
from vllm.config import VllmConfig

from qwen3next_plugin import __version__, env
from qwen3next_plugin.engines.hub import READ_HERE, folder_here
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.vllm.patches import When, patch
from qwen3next_plugin.kernels.dispatch import described
from qwen3next_plugin.machine.processor import instructions
from qwen3next_plugin.model.checkpoint.fingerprint import State, states
from qwen3next_plugin.model.checkpoint.headers import read_index, weight_files
from qwen3next_plugin.model.quantisation.packing import packs_plain

FINISH = "finalize_loading"
AddCode = Callable[[SourceInfo, CodeType], None]


@override(
    "vllm.compilation.caching.VllmSerializableFunction.finalize_loading",
    reason="torch's graphs, which are whole when they are read, get a method of this name",
    remove_when="`load_graph` is removed",
)
@patch(
    When.IN_WORKER,
    "vllm.compilation.decorators._try_load_aot_compiled_fn",
    reason="on a CPU vLLM cannot read the graphs that it has kept, and compiles at each start",
    remove_when="vLLM reads them (`compat`)",
)
def load_graph(host: Callable[..., Any], model: Any, aot_compilation_path: str) -> Any:
    """Around the function that reads a graph from a file.

    It ends by calling a method that only vLLM's own graphs have. A CPU's graphs are torch's, so
    the call would fail, and the model would be compiled again.
    """
    if not hasattr(Graph, FINISH):
        setattr(Graph, FINISH, lambda self, vllm_config: None)
    return host(model, aot_compilation_path)


def keep_graphs_apart(vllm_config: VllmConfig) -> None:
    """Add missing dependencies to the key of vLLM's graphs, which are read without a check."""
    if vllm_config.model_config.enforce_eager:
        return
    depends = {
        "plugin": __version__,
        "weights": _known_weights(vllm_config),
        "quantise": (env.quantise(), env.head()),
        "batch_invariant": env.batch_invariant(),
        "packed": packs_plain(vllm_config.model_config.dtype),
        "kernels": described("cpu"),
        "processor": instructions(),
    }
    vllm_config.additional_config = {**vllm_config.additional_config, "qwen3next": depends}


@patch(
    When.IN_WORKER,
    "torch._dynamo.package.SourceInfo.add_code",
    reason="torch looks for a function's source at each of its calls in a graph: 8 s of a first "
    "start, with 40 layers",
    remove_when="torch looks once for each function (`compat`)",
)
def add_code(host: AddCode, info: SourceInfo, code: CodeType) -> None:
    """Around the function that adds a traced function's source; torch calls it for each call."""
    info.inlined_sources |= _sources(host, code, code.co_filename)


@cache
def _sources(host: AddCode, code: CodeType, file: str) -> set[InlinedSource]:
    """Sources of a function; `file` keeps equal code of another file apart in the cache."""
    found = SourceInfo(inlined_sources=set())
    host(found, code)
    return found.inlined_sources


def _known_weights(vllm_config: VllmConfig) -> list[State] | None:
    """State of the checkpoint's files; None before they are here, or if vLLM reads them."""
    model, load = vllm_config.model_config, vllm_config.load_config
    folder = folder_here(model.model, model.revision, load.download_dir)
    if folder is None or load.load_format not in READ_HERE:
        return None
    return states(weight_files(folder, read_index(folder))) or None
