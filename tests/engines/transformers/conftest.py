"""The plugin's classes in transformers' Auto class, for these tests alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import qwen3next_plugin


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Registered, with one thread, which is faster at these sizes; then the host's classes again.

    Importing anything of qwen3next_plugin.engines.transformers registers, so no test file does it.
    """
    from transformers import AutoModelForCausalLM

    threads, mapping = torch.get_num_threads(), AutoModelForCausalLM._model_mapping
    before = dict(mapping._extra_content)
    assert not any("qwen3next_plugin" in model.__module__ for model in before.values()), before
    qwen3next_plugin.register_transformers()
    torch.set_num_threads(1)
    yield
    from qwen3next_plugin.engines.transformers.plugin import register

    mapping._extra_content = before
    register.cache_clear()
    torch.set_num_threads(threads)


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """How many tokens of a row the trunk reads, pass by pass."""
    from qwen3next_plugin.engines.transformers.speculation.worker import Worker

    seen: list[int] = []
    trunk = Worker._trunk

    def counting(self: Worker, tokens: torch.Tensor, *rest: Any) -> Any:
        seen.append(tokens.shape[1])
        return trunk(self, tokens, *rest)

    monkeypatch.setattr(Worker, "_trunk", counting)
    return seen


@pytest.fixture
def made(monkeypatch) -> list[torch.Tensor]:
    """The drafts, step by step."""
    from qwen3next_plugin.engines.transformers.speculation.drafter import Drafter

    seen: list[torch.Tensor] = []
    draft = Drafter.draft

    def recording(self: Drafter, **given: Any) -> torch.Tensor:
        seen.append(draft(self, **given))
        return seen[-1]

    monkeypatch.setattr(Drafter, "draft", recording)
    return seen
