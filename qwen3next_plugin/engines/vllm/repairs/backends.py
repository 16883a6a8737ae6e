"""Structured outputs by more than one backend at a time."""

from copy import copy
from typing import Any


def compile_by_request(manager: Any) -> None:
    """Override `grammar_init`: compile each request's grammar by the backend that checked it.

    vLLM compiles all by the backend of the first one. It gives a JSON schema to guidance or
    outlines if xgrammar lacks a part of it. After such a first request, other grammars that are
    right fail with an error 500 until the server ends; and so does the schema, if it is not first.

    Args:
        manager: vLLM's StructuredOutputManager.
    """
    host = type(manager).grammar_init
    views: dict[str, Any] = {}  # of the manager, by the name of the backend that is in it

    def grammar_init(request: Any) -> None:
        if request.structured_output_request is None:
            return
        name = request.sampling_params.structured_outputs._backend
        if name not in views:
            views[name] = copy(manager)
            views[name].backend = None  # the host makes it
        host(views[name], request)
        manager.backend = views[name].backend  # allocates the masks, which are alike

    manager.grammar_init = grammar_init
