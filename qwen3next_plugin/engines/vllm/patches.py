"""How the plugin changes vLLM: a patch stands beside its function; docs/patches.md lists all."""

from collections.abc import Callable, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path

from qwen3next_plugin.engines import patching
from qwen3next_plugin.engines.extras import modules_with_patches
from qwen3next_plugin.engines.patch_table import Table
from qwen3next_plugin.engines.patching import Function, Host
from qwen3next_plugin.engines.vllm.names import PACKAGE
from qwen3next_plugin.versions import check_host


class When(Enum):
    """A group of patches, by when it is applied."""

    REGISTERED = "at registration"
    ON_GPU = "at registration, on a GPU"
    NO_KERNELS = "at registration, on a platform without our kernels"
    CONFIGURED = "our model's flags are complete"
    WITH_DRAFTS = "they are, and ask for drafts"
    IN_SERVER = "they are, in a server"
    IN_ENGINE = "they are, or an engine's process starts, on a CPU"
    GRAMMARS = "they are, or an engine's process starts"
    IN_WORKER = "our worker is made"
    PAGE_COPIES = "our worker is made; by vLLM's registry of kernels"
    WITH_LORA = "our model is built, with adapters"


# The modules with patches that are put in place; those with overrides are imported where they act.
MODULES = (
    *("checking", "metrics", "model.config", "model.opaque"),
    *("speculation.drafts_flags", "cpu.cgroups", "cpu.exchange", "cpu.graphs"),
    "cpu.page_copy",
)

VERSIONS = ">=0.32,<0.34"  # that need these patches
TABLE = Table(VERSIONS, Path(__file__).with_name("signatures.json"))
patch = TABLE.patch


def apply(*groups: Enum, put: Callable[[Sequence[Function]], None] = patching.wrap) -> None:
    """Check and apply groups, each once in a process."""
    for module in (*(f"{PACKAGE}.{name}" for name in MODULES), *modules_with_patches("vllm")):
        import_module(module)
    TABLE.apply(groups, Host("vLLM", check_host("vllm")), put)
