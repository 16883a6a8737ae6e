"""Structured outputs by more than one backend at a time."""

from collections.abc import Callable
from copy import copy
from typing import Any

from qwen3next_plugin.engines.vllm.names import is_ours

VIEWS = "qwen3next_views"  # of vLLM's manager, by the name of the backend that is in each


def compile_by_request(host: Callable[..., None], manager: Any, request: Any) -> None:
    """Around `grammar_init`: compile each request's grammar by the backend that checked it.

    vLLM compiles all by the backend of the first one. It gives a JSON schema to guidance or
    outlines if xgrammar lacks a part of it. After such a first request, other grammars that are
    right fail with an error 500 until the server ends; and so does the schema, if it is not first.
    """
    asked = request.structured_output_request is not None
    if not asked or not is_ours(manager.vllm_config.model_config):
        host(manager, request)
        return
    views = vars(manager).setdefault(VIEWS, {})
    name = request.sampling_params.structured_outputs._backend
    if name not in views:
        views[name] = copy(manager)
        views[name].backend = None  # the host makes it
    host(views[name], request)
    manager.backend = views[name].backend  # allocates the masks, which are alike
