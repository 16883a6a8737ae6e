"""Which requests are refused, and a time limit for patterns; without a server."""

import json
import pickle
import re
import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace as Bag

import numpy as np
import pytest
import torch

from qwen3next_plugin.extras.host_fixes import processes
from qwen3next_plugin.extras.host_fixes.sglang import grammars, image_names, patterns
from qwen3next_plugin.extras.host_fixes.sglang.image_names import name_with_its_shape
from qwen3next_plugin.extras.host_fixes.sglang.patterns import end_dear
from qwen3next_plugin.extras.host_fixes.sglang.requests import (
    check,
    check_bootstrap_host,
    check_request,
)
from qwen3next_plugin.extras.host_fixes.sglang.tokenised import (
    check_apart,
    check_bootstrap_room,
    check_min_p,
    check_positions,
    check_processor,
    check_tokens,
    check_tower,
)

V = 4096
OURS = Bag(hf_config=Bag(architectures=["Qwen3NextForCausalLM"]), vocab_size=V, is_multimodal=False)
OTHER = Bag(hf_config=Bag(architectures=["LlamaForCausalLM"]), vocab_size=V)


def request(**fields):
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not fields.keys() & {"text", "input_ids", "input_embeds"}:
        fields["text"] = "a"
    return GenerateReqInput(**fields)


ALLOWED = {
    "bounds": {
        "input_ids": [0, V - 1],
        "top_logprobs_num": 1000,
        "token_ids_logprob": [5] * 1000,
        "sampling_params": {
            "n": 128,
            "top_k": -1,
            "stop_token_ids": [0, V - 1],
            "logit_bias": {"5": -1e20},
            "repetition_penalty": 2,
            "stop_regex": "\n+(User|Human):",
        },
    },
    "batch": {
        "input_ids": [[1]] * 4096,
        "top_logprobs_num": [0, 1000],
        "token_ids_logprob": [[5], None],
        "sampling_params": [{"n": 1, "top_k": 2**31 - 1}, {}],
    },
    "nothing": {"sampling_params": None},
    "unset": {"sampling_params": {"n": None, "stop_regex": None, "logit_bias": None}},
    "pages of text": {"text": "a" * 100_000},
}


@pytest.mark.parametrize("case", ALLOWED)
def test_allowed(case):
    check(request(**ALLOWED[case]), V, over_http=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": [[1]] * 4097}, "the number of prompts is 4097; allowed are 0 to"),
        ({"text": ["a"] * 33, "sampling_params": {"n": 128}}, "prompts times n is 4224"),
        (
            {"input_embeds": [[[0.5, 1.0]]] * 33, "sampling_params": {"n": 128}},
            "prompts times n is 4224",
        ),
        ({"sampling_params": [{"n": 2}, {"n": 129}]}, "n is 129; allowed are 1 to 128"),
    ],
)
def test_too_many_answers_over_http(fields, message):
    """Who calls the engine in Python may ask for as many as they like."""
    check(request(**fields), V, over_http=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(request(**fields), V, over_http=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_logprobs_num": 1001}, "(top_logprobs_num, logprobs) is 1001; allowed are 0 to 1000"),
        (
            {"token_ids_logprob": [1] * 1001},
            "length of token_ids_logprob is 1001; allowed are 0 to",
        ),
        ({"token_ids_logprob": [None, [1] * 1001]}, "length of token_ids_logprob is 1001"),
        ({"sampling_params": {"repetition_penalty": float("nan")}}, "repetition_penalty is nan"),
        ({"sampling_params": {"logit_bias": {"5": float("inf")}}}, "logit_bias is inf"),
        ({"sampling_params": {"top_k": 2**31}}, "top_k is 2147483648; allowed are -1 to"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(request(**fields), V, over_http=False)


def scored(*positions, tokens=0, start=0):
    """A request, tokenised, whose label tokens are scored at positions of five tokens."""
    params, pool = Bag(max_new_tokens=tokens), list(positions)
    given = {"input_ids": range(5), "sampling_params": params, "logprob_start_len": start}
    return Bag(token_indices_to_pool=pool, **given)


@pytest.fixture
def scoring(monkeypatch):
    """A server's flags."""
    from sglang.srt import runtime_context

    flags = Bag(disable_radix_cache=True, chunked_prefill_size=-1, speculative_algorithm=None)
    for name in ("get_memory", "get_schedule", "get_spec"):
        monkeypatch.setattr(runtime_context, name, lambda: flags)
    return flags


@pytest.mark.parametrize("host", ["2.2.2.2", ["10.0.0.1", "2.2.2.2"], "10.0.0.1", None], ids=str)
@pytest.mark.parametrize("path", ["/generate", "/health"])
@pytest.mark.parametrize("status", ["Starting", "Up"])
def test_only_the_server_itself_asks_without_a_prefill_server(host, path, status):
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    manager = Bag(server_status=ServerStatus[status])
    others = "2.2.2.2" in (host or ()) and (path, status) == ("/generate", "Up")
    with pytest.raises(ValueError, match=r"^bootstrap_host 2") if others else nullcontext():
        check_bootstrap_host(host, manager, path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("disable_radix_cache", False),
        ("chunked_prefill_size", 4096),
        ("speculative_algorithm", "EAGLE"),
    ],
)
def test_positions_need_a_prompt_that_one_step_reads(scoring, name, value):
    check_positions(scored(0, 4))
    setattr(scoring, name, value)
    needs = "size -1 and without --speculative-algorithm: "
    with pytest.raises(ValueError, match=f"pool needs a server with --disable-.*{needs}"):
        check_positions(scored(0, 4))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (scored(), "token_indices_to_pool is empty; it needs at least one position"),
        (scored(0, 5), "token_indices_to_pool is 5; allowed are 0 to 4"),
        (scored(4, -1), "token_indices_to_pool is -1; allowed are 0 to 4"),
        (scored(3, tokens=4), "max_new_tokens is 4; with token_indices_to_pool allowed is 0"),
        (
            scored(2, 3, start=3),
            "logprob_start_len with token_indices_to_pool is 3; allowed are -1 to 2",
        ),
    ],
)
def test_positions_are_of_a_prompt_that_is_scored_only(scoring, request_, message):
    for start in (-1, 0, 2):
        check_positions(scored(2, 3, start=start))
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_positions(request_)


def test_a_text_without_a_token_is_refused():
    """A session's turn without one may go on with an answer."""
    none = {"input_ids": [], "input_embeds": None, "session_params": None}
    for given in ({"input_ids": [7]}, {"input_embeds": [[0.5]]}, {"session_params": Bag()}):
        check_tokens(Bag(**none | given))
    with pytest.raises(ValueError, match="no token: the tokenizer makes none of its text"):
        check_tokens(Bag(**none))


@pytest.mark.parametrize("deterministic", [False, True])
def test_seeds_do_not_go_with_min_p(monkeypatch, deterministic):
    from sglang.srt import runtime_context

    flags = Bag(deterministic=Bag(enable_deterministic_inference=deterministic))
    monkeypatch.setattr(runtime_context, "get_exec", lambda: flags)
    check_min_p(0.0)
    refused = pytest.raises(ValueError, match=r"^min_p is 0\.1; with --enable-deterministic-inf")
    with refused if deterministic else nullcontext():
        check_min_p(0.1)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_custom_logit_processor_is_one(monkeypatch, enabled):
    from sglang.srt import runtime_context
    from sglang.srt.sampling.custom_logit_processor import (
        CustomLogitProcessor,
        DisallowedTokensLogitsProcessor,
    )

    flags = Bag(features=Bag(enable_custom_logit_processor=enabled))
    monkeypatch.setattr(runtime_context, "get_exec", lambda: flags)
    for processor in (None, DisallowedTokensLogitsProcessor.to_str()):
        check_processor(processor)
    number = json.dumps({"callable": pickle.dumps(int).hex()})
    strings = ("", "{}", '{"callable": "zz"}', '{"callable": "80"}', number)
    says = re.escape("which is no CustomLogitProcessor's to_str(): ")
    for bad in (*strings, CustomLogitProcessor.to_str()):
        with pytest.raises(ValueError, match=says) if enabled else nullcontext():
            check_processor(bad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_hashes": [["f"]]}, "mm_hashes is SGLang's own over HTTP"),
        ({"image_data": [{"format": "processor_output"}]}, "image_data has what a processor made"),
        ({"video_data": [["a.mp4", {"format": "x"}]]}, "video_data has what a processor made"),
    ],
    ids=str,
)
def test_images_that_a_client_has_processed(fields, message):
    check(request(**fields), V, over_http=False)
    with pytest.raises(ValueError, match=message):
        check(request(**fields), V, over_http=True)


@pytest.mark.parametrize("named", [False, True])
def test_an_image_on_its_side_is_another_one(monkeypatch, named):
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    monkeypatch.setattr(image_names, "serves_ours", lambda: True)
    host = getattr(
        MultimodalDataItem.set_pad_value, "__wrapped__", MultimodalDataItem.set_pad_value
    )

    def name(*grid: int) -> int:
        item = MultimodalDataItem(modality=Modality.IMAGE, feature=torch.zeros(8, 4))
        item.image_grid_thw = torch.tensor([grid])
        if named:
            item.hash = 5
        name_with_its_shape(host, item)
        return item.pad_value

    assert name(1, 2, 4) == name(1, 2, 4)
    assert (name(1, 2, 4) == name(1, 4, 2)) == named


def test_a_vision_tower_has_no_place_for_embeddings():
    check_tower(request())
    for name in ("input_embeds", "positional_embed_overrides"):
        with pytest.raises(ValueError, match=f"^{name}: a model with a vision tower takes token"):
            check_tower(request(**{name: [[0.5]]}))


def test_a_room_is_of_two_servers_or_sglangs_own():
    for host, room in (("10.0.0.1", 1), ("10.0.0.1", 2**63 - 1), ("2.2.2.2", 0), (None, None)):
        check_bootstrap_room(host, room)
    for host, room in (("10.0.0.1", 0), ("10.0.0.1", 2**63), ("2.2.2.2", -1), (None, 0)):
        message = f"bootstrap_room is {room}; allowed are [01] to {2**63 - 1}$"
        with pytest.raises(ValueError, match=message):
            check_bootstrap_room(host, room)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bootstrap_host": None}, "bootstrap_host is None and bootstrap_room 1; a decode server"),
        ({"bootstrap_host": ""}, "bootstrap_host is '' and bootstrap_room 1; a decode server"),
        ({"bootstrap_room": None}, "bootstrap_room None; a decode server needs both: ask the"),
        ({"sampling_params": Bag(n=2)}, "n is 2; allowed are 1 to 1"),
        ({"top_logprobs_num": 129}, "(top_logprobs_num, logprobs) is 129; allowed are 0 to 128"),
    ],
    ids=str,
)
def test_what_two_servers_need_of_a_request(monkeypatch, fields, message):
    from sglang.srt import runtime_context

    disagg = Bag(disaggregation_mode="decode")
    monkeypatch.setattr(runtime_context, "get_disagg", lambda: disagg)
    where = {"bootstrap_host": "10.0.0.1", "bootstrap_room": 1}
    made = where | {"sampling_params": Bag(n=1), "top_logprobs_num": 128}
    check_apart(Bag(**made))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_apart(Bag(**(made | fields)))
    disagg.disaggregation_mode = "null"
    check_apart(Bag(**(made | fields)))


def test_types_of_numpy_are_allowed():
    """The engine in Python is given them."""
    check(request(logprob_start_len=np.int64(3), top_logprobs_num=np.int32(2)), V, over_http=True)
    params = {"temperature": np.float32(0.5), "top_k": np.int64(5), "stop_token_ids": [None, 3]}
    check(request(sampling_params=params), V, over_http=True)


def test_a_small_vocabulary_limits_logprobs():
    with pytest.raises(ValueError, match="is 101; allowed are 0 to 100"):
        check(request(top_logprobs_num=101), 100, over_http=False)


def test_other_models_are_left_alone():
    hostile = request(input_ids=[V])
    given = (Bag(model_config=OTHER), hostile, None)
    assert check_request(lambda *args: args, *given) == given
    with pytest.raises(ValueError, match="allowed"):
        check_request(lambda *args: args, Bag(model_config=OURS), hostile)


@pytest.fixture
def generating(monkeypatch):
    """A request with a pattern, in the process of a model."""
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups import model_override_base

    def make(config, *asked):
        monkeypatch.setattr(runtime_context, "get_server_args", lambda: None)
        monkeypatch.setattr(model_override_base, "model_config_of", lambda args: config)
        for module in (patterns, grammars):
            monkeypatch.setattr(module, "ranks", lambda: Bag(rank_in_group=0, world_size=1))
        monkeypatch.setattr(processes, "_shared", processes.Shared())
        params = Bag(stop_regex_strs=asked)
        return Bag(sampling_params=params, finished_reason=None, grammar=None)

    return make


def alarm_is_set() -> bool:
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def test_a_pattern_that_backtracks_aborts_its_request(generating):
    request = generating(OURS, "(x+)+y")
    assert end_dear(lambda *_: re.search("(x+)+y", "x" * 60), request)
    reason = request.finished_reason.to_json()
    assert reason["status_code"] == 400
    assert "stop_regex ('(x+)+y',) takes over 0.2 s of CPU time" in reason["message"]
    assert not alarm_is_set()


@pytest.mark.parametrize("late", [False, True])
def test_all_ranks_end_what_one_does(generating, monkeypatch, late):
    """The second of two, whose own time does not count."""
    request = generating(OURS, "x")
    monkeypatch.setattr(patterns, "ranks", lambda: Bag(rank_in_group=1, world_size=2))
    monkeypatch.setattr(patterns, "of_any_rank", lambda mine: mine or late)
    monkeypatch.setattr(processes.Budget, "take", lambda *_: 0.0)
    matched = []
    assert end_dear(lambda *_: matched.append(1) or True, request)
    assert bool(matched) == (request.finished_reason is None) == (not late)


def test_time_that_the_machine_does_not_compute_is_not_counted(generating):
    request = generating(OURS, "x")
    assert not end_dear(lambda *_: time.sleep(3 * processes.SECONDS), request)
    assert request.finished_reason is None
    assert not alarm_is_set()


def test_requests_with_the_same_patterns_share_their_time(generating, monkeypatch):
    """Each step takes less than it may, and all together more."""
    monkeypatch.setattr(processes, "SHARE", 1e9)

    def compute(*_) -> bool:
        end = time.thread_time() + 0.4 * processes.SECONDS
        while time.thread_time() < end:
            pass
        return False

    three = [generating(OURS, "x") for _ in range(3)]
    assert [end_dear(compute, request) for request in three] == [False, False, True]
    other = generating(OURS, "y")
    assert not end_dear(lambda *_: False, other)


@pytest.mark.parametrize(
    ("config", "given", "limited"),
    [(OURS, ["x"], True), (OURS, [], False), (OTHER, ["x"], False)],
    ids=["fast", "no pattern", "another model"],
)
def test_no_other_request_is_aborted(generating, monkeypatch, config, given, limited):
    monkeypatch.setattr(processes, "SECONDS", 600)
    request, alarms = generating(config, *given), []
    assert not end_dear(lambda *_: alarms.append(alarm_is_set()), request, 3)
    assert alarms == [limited]
    assert request.finished_reason is None
    assert not alarm_is_set()
