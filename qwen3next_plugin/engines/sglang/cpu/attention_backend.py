"""SGLang's CPU attention backend under a second name, for processors without AMX.

SGLang's backend plans extend, decode, verification and drafts around two kernels of `sgl_kernel`.
SGLang chooses it with AMX only, but our versions of the two kernels run on any CPU. Remove when
SGLang has an attention backend that drafts on every CPU, chains of different lengths included.
"""

from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.sglang.names import ATTENTION_BACKEND, HOST_BACKEND


def register_attention_backend() -> None:
    """Add our name to SGLang's attention backends."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention import attention_registry

    choices.add_attention_backend_choices([ATTENTION_BACKEND])
    # Its kernels give a row the same bits in any batch, and after a cached prefix.
    choices.add_deterministic_attention_backend_choices([ATTENTION_BACKEND])
    choices.add_radix_supported_deterministic_attention_backend_choices([ATTENTION_BACKEND])
    attention_registry.register_attention_backend(ATTENTION_BACKEND)(_make)


def _make(runner: Any) -> Any:
    from qwen3next_plugin.engines.sglang.cpu.attention import AttentionBackend

    return AttentionBackend(runner)


def create_draft_backend(
    host: Callable[..., Any],
    factory: Any,
    backend_name: str,
    backend_map: dict[str, Callable[[], Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around `DraftBackendFactory._create_backend`: accept our name for drafts too."""
    backend_map = {**backend_map, ATTENTION_BACKEND: backend_map[HOST_BACKEND]}
    return host(factory, backend_name, backend_map, *args, **kwargs)
