"""Our attention backend for any CPU: SGLang chooses its own with AMX only.

Our models get attention.py. Others get SGLang's backend, whose two kernels of `sgl_kernel` the
stand-in has for any CPU. Remove when SGLang has an attention backend that drafts on every CPU, with
chains of different lengths.
"""

from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.sglang.names import ATTENTION_BACKEND, HOST_BACKEND, is_ours
from qwen3next_plugin.engines.sglang.patches import When, patch


def register_attention_backend() -> None:
    """Add our name to SGLang's attention backends."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention import attention_registry

    choices.add_attention_backend_choices([ATTENTION_BACKEND])
    # A row's bits are the same in any batch, and after a cached prefix.
    choices.add_deterministic_attention_backend_choices([ATTENTION_BACKEND])
    choices.add_radix_supported_deterministic_attention_backend_choices([ATTENTION_BACKEND])
    attention_registry.register_attention_backend(ATTENTION_BACKEND)(make_backend)


def make_backend(runner: Any) -> Any:
    """The backend of a model: ours, or SGLang's for models that our kernel does not cover."""
    if not is_ours(runner.model_config):
        from sglang.srt.layers.attention.intel_amx_backend import IntelAMXAttnBackend

        return IntelAMXAttnBackend(runner)
    from qwen3next_plugin.engines.sglang.cpu.attention import AttentionBackend

    return AttentionBackend(runner)


@patch(
    When.ON_CPU,
    "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend",
    reason="our attention backend must draft too; SGLang ties its own to AMX",
    remove_when="SGLang has an attention backend that drafts on every CPU",
)
def create_draft_backend(
    host: Callable[..., Any],
    factory: Any,
    backend_name: str,
    backend_map: dict[str, Callable[[], Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around `DraftBackendFactory._create_backend`: accept our name for drafts too.

    SGLang's own backend drafts trees, with one child for each depth (`stamps_children`).
    """

    def make() -> Any:
        return HOST_BACKEND, make_backend(factory.draft_model_runner)

    trees = kwargs.get("stamps_children")
    backend_map = {**backend_map, ATTENTION_BACKEND: backend_map[HOST_BACKEND] if trees else make}
    return host(factory, backend_name, backend_map, *args, **kwargs)
