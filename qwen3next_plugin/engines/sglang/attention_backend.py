"""SGLang's CPU attention under a name that it does not tie to AMX.

SGLang's backend asks `sgl_kernel` for its two kernels and plans extend, decode, verification and
drafts around them; on a processor without AMX it is not chosen, although the kernels that the
plugin brings run on any. Can go when SGLang has an attention backend for every CPU that drafts.
"""

from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.sglang.machine import ATTENTION_BACKEND, HOST_BACKEND


def register_attention_backend() -> None:
    """Add the name to SGLang's attention backends."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention import attention_registry

    choices.add_attention_backend_choices([ATTENTION_BACKEND])
    make = attention_registry.ATTENTION_BACKENDS[HOST_BACKEND]
    attention_registry.register_attention_backend(ATTENTION_BACKEND)(make)


def create_draft_backend(
    host: Callable[..., Any],
    factory: Any,
    backend_name: str,
    backend_map: dict[str, Callable[[], Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around `DraftBackendFactory._create_backend`: the name for drafts, too."""
    backend_map = {**backend_map, ATTENTION_BACKEND: backend_map[HOST_BACKEND]}
    return host(factory, backend_name, backend_map, *args, **kwargs)
