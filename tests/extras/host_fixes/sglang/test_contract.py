"""What the repairs of SGLang rely on; its sources are read, not imported."""

import ast

import pytest

from engines.contract import Sources, definition, host, other_hosts
from qwen3next_plugin.extras.host_fixes.sglang.controls import PROMPTS
from qwen3next_plugin.extras.host_fixes.sglang.tokenised import MAX_LOGPROBS_APART

HOST = "sglang"


@pytest.fixture(scope="module", params=["installed", *other_hosts(HOST)])
def sources(request) -> Sources:
    return host(HOST, request.param)


def test_control_messages_are_those_that_are_no_prompts(sources):
    """All are dispatched by their type, and answered in one whose name follows from it."""
    scheduler = definition(sources.tree("srt/managers/scheduler.py"), "Scheduler")
    dispatcher = ast.unparse(definition(scheduler, "init_request_dispatcher"))
    assert "self._request_dispatcher = TypeBasedDispatcher([" in dispatcher
    own = definition(sources.tree("utils.py"), "TypeBasedDispatcher")
    assert "self._mapping = OrderedDict(mapping)" in ast.unparse(definition(own, "__init__"))
    prompts = [name for name in dispatcher.split("(") if name.startswith(PROMPTS)]
    assert len(prompts) == 4
    assert "rid: Optional[str] = None" in ast.unparse(
        definition(sources.tree("srt/managers/io_struct.py"), "BaseReq")
    )


def test_so_many_logprobs_of_a_token_are_handed_over(sources):
    buffers = definition(sources.tree("srt/disaggregation/utils.py"), "MetadataBuffers")
    assert f"max_top_logprobs_num: int={MAX_LOGPROBS_APART}" in ast.unparse(buffers)
