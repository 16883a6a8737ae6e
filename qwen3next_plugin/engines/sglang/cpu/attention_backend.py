"""SGLang's CPU attention backend under a second name, for processors without AMX.

SGLang's backend plans extend, decode, verification and drafts around two kernels of `sgl_kernel`.
SGLang chooses it with AMX only, but our versions of the two kernels run on any CPU. Remove when
SGLang has an attention backend that drafts on every CPU.
"""

from collections.abc import Callable
from functools import partial
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
    """Around `DraftBackendFactory._create_backend`: accept our name for drafts too."""
    make = backend_map[HOST_BACKEND]
    if factory.topk == 1 and backend_name == "decode_attention_backend":
        make = partial(_make_chain, factory)
    return host(factory, backend_name, {**backend_map, ATTENTION_BACKEND: make}, *args, **kwargs)


def _make_chain(factory: Any) -> tuple[str, Any]:
    runner, steps = factory.draft_model_runner, factory.speculative_num_steps
    return ATTENTION_BACKEND, ChainDraftBackend(runner, steps)


class ChainDraftBackend:
    """The attention backends of a chain's second and later drafts, one for each.

    SGLang's version copies each request's row of the slot table, as wide as the longest context.
    The drafts of a chain are in the table already, so nothing is copied.
    """

    def __init__(self, runner: Any, steps: int) -> None:
        from sglang.srt.layers.attention.intel_amx_backend import IntelAMXAttnBackend

        self.attn_backends = [IntelAMXAttnBackend(runner) for _ in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Step i sees the context and i + 1 drafts."""
        for i, backend in enumerate(self.attn_backends):
            backend.init_forward_metadata(forward_batch)
            backend.draft_decode_metadata = (
                backend.req_to_token_pool.req_to_token,
                forward_batch.seq_lens + i + 1,
                forward_batch.req_pool_indices,
            )
