"""A verification's tokens end an answer where tokens that come one by one do."""

from array import array
from types import SimpleNamespace as Bag

import pytest

from qwen3next_plugin.engines.sglang.speculation.stops import stop_at_first

LETTERS = "abcdefgh$"
EOS = LETTERS.index("$")
MOST = 6


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """For what another test may have put around the host's search for patterns."""
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups import model_override_base

    other = Bag(hf_config=Bag(architectures=["LlamaForCausalLM"]))
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: None)
    monkeypatch.setattr(model_override_base, "model_config_of", lambda _: other)


def host(req, new_accepted_len):
    """What the plugin wraps. Imported here: SGLang looks at the platform when it is imported."""
    from sglang.srt.managers.schedule_batch import Req

    return Req.update_finish_state(req, new_accepted_len)


def request(grammar=None, **params):
    """What the host reads of a request to see whether it has finished."""
    from sglang.srt.managers.schedule_batch import Req

    made = Req.__new__(Req)
    defaults = {
        "stop_strs": [],
        "stop_regex_strs": [],
        "stop_str_max_len": 3,
        "stop_regex_max_len": 3,
        "stop_token_ids": None,
        "ignore_eos": False,
        "max_new_tokens": MOST,
    }
    vars(made).update(
        rid="a",
        output_ids=array("q"),
        sampling_params=Bag(**(defaults | params)),
        tokenizer=Bag(
            decode=lambda ids: "".join(LETTERS[i] for i in ids),
            eos_token_id=EOS,
            additional_stop_token_ids=None,
        ),
        eos_token_ids={EOS},
        vocab_size=len(LETTERS),
        decoded_text="",
        grammar=grammar,
        finished_reason=None,
        finished_len=None,
        to_finish=None,
    )
    return made


def end(req):
    """The answer that a client gets, and why it ended."""
    text = req.tokenizer.decode(req.output_ids_through_stop)
    return text, req.finished_reason and req.finished_reason.to_json()


def ends(text, sizes, grammar=None, **params):
    """`end` of an answer that comes in steps of these sizes, and its tokens in all."""
    req, tokens = request(grammar, **params), array("q", map(LETTERS.index, text))
    for size in sizes:
        req.output_ids.extend(tokens[:size])
        tokens = tokens[size:]
        stop_at_first(host, req, size)
        if req.finished():
            break
    return *end(req), len(req.output_ids)


CASES = {
    "the later first": ("abcd", {"stop_strs": ["c", "b"]}, "ab"),
    "over two tokens": ("abcd", {"stop_strs": ["d", "bc"]}, "abc"),
    "the end before": ("ab$cd", {"stop_strs": ["d"]}, "ab$"),
    "a stop token before": ("abcd", {"stop_strs": ["d"], "stop_token_ids": {1}}, "ab"),
    "a stop token behind": ("abcd", {"stop_strs": ["b"], "stop_token_ids": {2}}, "ab"),
    "a pattern that a later token breaks": ("abcd", {"stop_regex_strs": ["b$", "d"]}, "ab"),
    "most tokens before": ("abcdefgh", {"stop_strs": ["h"]}, "abcdef"),
    "none": ("abcd", {"stop_strs": ["x"]}, "abcd"),
    "no string": ("ab$c", {}, "ab$"),
}


@pytest.mark.parametrize("case", CASES)
def test_drafts_change_no_end(case):
    text, params, wanted = CASES[case]
    found, reason, _ = ends(text, [1] * len(text), **params)
    assert found == wanted
    for sizes in ([len(text)], [1, len(text) - 1], [2, len(text) - 2]):
        assert ends(text, sizes, **params)[:2] == (found, reason)


def test_what_is_accepted_behind_the_end_stays():
    """The scheduler counts it, and frees its memory."""
    assert ends("abcd", [4], stop_strs=["b"])[2] == 4


@pytest.mark.parametrize("terminated", [False, True])
def test_a_grammar_that_has_read_all_ends_behind_all(terminated):
    text, reason, _ = ends("abc", [3], Bag(is_terminated=lambda: terminated), stop_strs=["x"])
    assert (text, reason is not None) == ("abc", terminated)
    assert ends("abc", [3], Bag(is_terminated=lambda: terminated), stop_strs=["b"])[0] == "ab"


def test_a_request_that_is_aborted_ends_as_it_is():
    req = request(stop_strs=["a"])
    req.to_finish = Bag(to_json=lambda: "aborted")
    req.output_ids.extend([0, 1])
    stop_at_first(host, req, 2)
    assert end(req) == ("ab", "aborted")
