"""Turns of streaming sessions: which are refused, and how they are scheduled."""

from array import array
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace as Bag

import pytest

from checkpoints import SHIPPED, random_prompt
from engines.hostile import ask
from engines.sglang.server import FIXED, NEXTN, Forked
from qwen3next_plugin.extras.host_fixes.sglang.sessions import (
    add_turn,
    continue_in_session,
    make_room,
)


class Asked:
    """What a client asks of a session; most of it is nothing."""

    def __init__(self, ids):
        self.rid, self.input_ids = f"turn of {ids}", array("q", ids)
        self.session_params = Bag(rid=None, offset=0, replace=False, drop_previous_output=False)

    def __getattr__(self, name):
        return None


class Turn:
    """What the host makes of it."""

    def __init__(self, **given):
        vars(self).update(given)
        self.to_finish, self.output_ids = None, array("q")
        self.full_untruncated_fill_ids, self.multimodal_inputs = array("q"), None

    def set_finish_with_abort(self, message):
        self.to_finish = message

    def inherit_mm_token_counts(self, before):
        pass


@pytest.fixture
def take():
    """A streaming session, and a function that begins a turn of it."""
    from sglang.srt.session.session_controller import Session

    session = Session(100, "a session", streaming=True)

    def begin(*ids):
        create = getattr(Session.create_req, "__wrapped__", Session.create_req)
        made = continue_in_session(create, session, Asked(ids), None, 100, req_factory=Turn)
        assert (made.session is None) == (made.to_finish is not None)
        return made

    return session, begin


@pytest.mark.parametrize(("offset", "cut"), [(0, False), (5, False), (3, True)])
def test_an_offset_may_not_cut_an_image(offset, cut):
    """Of a session whose image ends at its fourth token."""
    from sglang.srt.session.session_controller import Session

    session, create = Session(100, "a session"), Session.create_req
    create = getattr(create, "__wrapped__", create)
    first = continue_in_session(
        create, session, Asked([5, 6, 6, 6, 7]), None, 100, req_factory=Turn
    )
    first.sampling_params, first.finished = Bag(max_new_tokens=0), lambda: True
    first.output_ids_through_stop = first.output_ids
    first.multimodal_inputs = Bag(mm_items=[Bag(offsets=[(1, 3)])])
    asked = Asked([8, 9])
    asked.session_params.rid, asked.session_params.offset = first.rid, offset
    made = continue_in_session(create, session, asked, None, 100, req_factory=Turn)
    assert ("cuts an image" in (made.to_finish or "")) == cut


@pytest.mark.parametrize("answer", [[], [7]])
def test_a_turn_without_a_token_continues_an_answer_only(take, answer):
    session, begin = take
    before = begin(5, 6)
    before.sampling_params = Bag(max_new_tokens=len(answer))
    before.output_ids.extend(answer)
    session.finish_req(before)
    made = begin()
    if answer:
        assert (made.to_finish, [*made.origin_input_ids]) == (None, [5, 6, 7])
    else:
        assert "no answer to continue" in made.to_finish
        made = begin(8)
        assert (made.to_finish, [*made.origin_input_ids]) == (None, [5, 6, 8])


def test_a_refused_turn_leaves_the_one_that_runs(take):
    session, begin = take
    assert begin(5, 6).to_finish is None
    for _ in range(3):
        assert "already has an active request" in begin(7).to_finish
        assert session._inflight


@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("before", [0, 7])
def test_a_turn_is_scheduled_as_one_that_may_end(ignores, before):
    req = Bag(sampling_params=Bag(ignore_eos=ignores), prefix_len=before)
    seen = []

    def host(adder, one, has_chunked, truncation_align_size):
        seen.append(
            (adder, one, has_chunked, truncation_align_size, one.sampling_params.ignore_eos)
        )
        return "added"

    assert add_turn(host, "adder", req, True, truncation_align_size=None) == "added"
    assert seen == [("adder", req, True, None, ignores and not before)]
    assert req.sampling_params.ignore_eos == ignores


def test_a_turn_ignores_the_end_also_if_scheduling_fails():
    req = Bag(sampling_params=Bag(ignore_eos=True), prefix_len=1)
    with pytest.raises(ZeroDivisionError):
        add_turn(lambda *_: 1 / 0, None, req)
    assert req.sampling_params.ignore_eos


def test_the_memory_of_the_session_idle_longest_is_taken_first():
    """Two requests wait for a row each: one turn of a session, and one of none."""
    used = {"running": 1, "oldest": 2, "waits": 3, "newest": 9, "older": 5}
    sessions = {
        name: Bag(session_id=name, last_active_time=at, _inflight=name == "running")
        for name, at in used.items()
    }
    taken: list[str] = []
    plan = Bag(
        batch_to_run=None,
        running_batch=Bag(is_empty=lambda: False, check_decode_mem=lambda: True, reqs=[1]),
    )
    scheduler = Bag(
        session_controller=Bag(sessions=sessions),
        tree_cache=Bag(
            session_records=lambda: dict.fromkeys(set(used) - set(taken)),
            release_session=taken.append,
        ),
        waiting_queue=[Bag(session=sessions["waits"]), Bag(session=None)],
        max_running_requests=4,
    )

    def host(scheduler, running):
        running.batch_is_full = len(taken) < 2
        return plan

    assert make_room(host, scheduler, plan.running_batch) is plan
    assert taken == ["oldest", "older"]


PARAMS = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 12}


@pytest.fixture(scope="module", params=[(), (*NEXTN, "3")], ids=["plain", "drafts"])
def server(request):
    """Of four rows."""
    flags = ("--dtype", "float32", "--max-total-tokens", "8192", "--disable-radix-cache")
    more = ("--enable-streaming-session", "--chunked-prefill-size", "64")
    rows = ("--max-running-requests", "4")
    server = Forked(SHIPPED, *flags, *more, *rows, *request.param, env=FIXED).wait()
    yield server
    server.close()


def generate(server, ids, **more):
    return server.post("/generate", input_ids=ids, sampling_params=PARAMS, **more)["output_ids"]


class Talk:
    """A streaming session, and all that was said in it."""

    def __init__(self, server):
        self.server, self.text = server, []
        self.name = server.post("/open_session", capacity_of_str_len=10_000, streaming=True)

    def turn(self, length, seed):
        """Ask for an answer; return it, and the whole text before it."""
        asked = list(random_prompt(length, seed=seed))
        answer = generate(self.server, asked, session_params={"id": self.name})
        before, self.text = self.text + asked, self.text + asked + answer
        return answer, before


@pytest.mark.serve
def test_a_turn_longer_than_a_chunk(server):
    talk = Talk(server)
    for seed, length in enumerate((20, 150, 10, 300)):
        answer, before = talk.turn(length, seed)
        assert answer == generate(server, before)


@pytest.mark.serve
@pytest.mark.parametrize("length", [10, 1700], ids=["rows", "tokens"])
def test_idle_sessions_keep_nobody_waiting(server, length):
    """Neither other clients nor each other; and each goes on as if it had kept its memory."""
    talks = [Talk(server) for _ in range(5)]
    for turn in range(3):
        with ThreadPoolExecutor() as pool:
            asked = [(talk, length // (1 + turn), 5 * turn + i) for i, talk in enumerate(talks)]
            said = list(pool.map(lambda each: Talk.turn(*each), asked))
            alone = list(pool.map(lambda each: generate(server, each[1]), said))
        assert [answer for answer, _ in said] == alone
    for talk in talks:
        assert ask(server, "/close_session", {"session_id": talk.name})[0] == 200
