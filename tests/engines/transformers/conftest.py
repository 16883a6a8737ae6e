"""The plugin's classes in transformers' Auto class, for these tests alone."""

from collections.abc import Iterator

import pytest
import torch

import qwen3next_plugin


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Registered, with one thread, which is faster at these sizes; then the host's classes again.

    Importing anything of qwen3next_plugin.engines.transformers registers, so no test file does it.
    """
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    threads, mapping = torch.get_num_threads(), AutoModelForCausalLM._model_mapping
    before = dict(mapping._extra_content)
    qwen3next_plugin.register_transformers()
    torch.set_num_threads(1)
    yield
    from qwen3next_plugin.engines.transformers.plugin import register

    mapping._extra_content = before
    register.cache_clear()
    torch.set_num_threads(threads)
