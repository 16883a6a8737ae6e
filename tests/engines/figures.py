"""What any engine's metrics must show of a server of the shipped checkpoint with MTP."""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from checkpoints import SHIPPED
from engines.clients import PROMPTS, complete, eventually
from engines.dashboard import check_dashboard
from engines.process import Process
from engines.server import Server

CONFIG = json.loads((SHIPPED / "config.json").read_text())
LINEAR_LAYERS = CONFIG["layer_types"].count("linear_attention")
QWEN3NEXT = str(Path(sys.executable).with_name("qwen3next"))
LINE = re.compile(
    r"MTP: mean draft length \d\.\d\d \(\d: \d+%(, \d: \d+%)*\)"
    r"(, \d+% of decoding time in drafts)?(, verify step \d+\.\d\d × plain step)?"
    r", \d+ state pages in use"
)


def check_pages(server: Server, engine: str) -> None:
    """One page a request and linear layer while it runs, none after it or its client has gone."""
    name = f"{engine}:qwen3next_state_pages"
    stream = server.client.completions.create(  # long enough to be still running at the check
        model=server.model, prompt=PROMPTS[0], max_tokens=2000, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    chunks = iter(stream)
    for _ in range(10):
        next(chunks)
    assert server.metrics()[name] == LINEAR_LAYERS
    stream.close()
    assert eventually(lambda: server.metrics()[name] == 0)
    complete(server, PROMPTS[0])
    # SGLang counts just after the last token has left.
    assert eventually(lambda: server.metrics()[name] == 0)


def check_drafts(server: Server, engine: str, num_drafts: int) -> None:
    """Counts of drafts agree with each other and with how many tokens were answered."""
    before = drafts(server, engine)
    for prompt in PROMPTS:
        complete(server, prompt, extra_body={"ignore_eos": True})

    def gained() -> Iterator[dict[str, float]]:
        """Of lengths, verified and accepted drafts."""
        for name, counts in drafts(server, engine).items():
            yield {value: count - before[name][value] for value, count in counts.items()}

    def committed() -> float:
        lengths, _, accepted = gained()
        return sum(lengths.values()) + sum(accepted.values())

    # SGLang may count a step after its answer has left.
    assert eventually(lambda: committed() >= 47 * len(PROMPTS))
    lengths, verified, accepted = gained()
    assert list(lengths) == [*map(str, range(num_drafts + 1))]
    assert list(verified) == list(accepted) == [*map(str, range(1, num_drafts + 1))]
    rows, right = sum(lengths.values()), sum(accepted.values())
    # The first token of an answer is the prompt's; its last step may accept more than has room.
    assert 0 <= rows + right - 47 * len(PROMPTS) <= num_drafts * len(PROMPTS)
    assert verified["1"] == rows - lengths["0"] > 0
    for position in range(1, num_drafts):
        assert accepted[str(position)] >= verified[str(position + 1)]
    assert all(accepted[position] <= verified[position] for position in verified)


def drafts(server: Server, engine: str) -> dict[str, dict[str, float]]:
    """Rows by draft length, verified and accepted drafts by position."""
    prefix = f"{engine}:qwen3next"
    buckets = server.by_label(f"{prefix}_draft_length_bucket", "le")
    assert list(buckets.values()) == sorted(buckets.values())
    assert list(buckets)[-1] == "+Inf"
    bounds = list(buckets)[:-1]
    counts = [buckets[bound] for bound in bounds]
    lengths = [now - before for now, before in zip(counts, [0, *counts], strict=False)]
    assert sum(lengths) == buckets["+Inf"]
    return {
        "lengths": dict(zip((bound.removesuffix(".0") for bound in bounds), lengths, strict=True)),
        "verified": server.by_label(f"{prefix}_drafts_verified_total", "position"),
        "accepted": server.by_label(f"{prefix}_drafts_accepted_total", "position"),
    }


def first_drafts(server: Server, engine: str) -> tuple[float, float]:
    """How many first drafts were right and how many wrong, since the start."""
    counts = drafts(server, engine)
    right = counts["accepted"]["1"]
    return right, counts["verified"]["1"] - right


def watch(address: str) -> dict[str, tuple[str, str]]:
    """What `qwen3next watch` prints into a pipe: now and since the start, by name."""
    child = Process([QWEN3NEXT, "watch", address], {**os.environ, "PYTHONFAULTHANDLER": "1"})
    try:
        child.wait(300)
        if child.code() is None:
            os.kill(child.child.pid, signal.SIGABRT)  # it prints where it stands, then ends
            child.wait(60)
            raise TimeoutError(f"it does not end:\n{child.text()}")
        assert child.code() == 0, child.text()
        rows = [line.split("\t") for line in child.text().splitlines()]
    finally:
        child.stop()
    return {name: (now, total) for name, now, total in rows}


def check_shown(server: Server, engine: str, num_drafts: int) -> None:
    """The dashboard's queries and `qwen3next watch` find everything that they show."""
    check_dashboard(engine, server.get("/metrics"))
    watched = threading.Event()

    def ask() -> None:
        while not watched.is_set():
            complete(server, PROMPTS[0], 24)  # SGLang counts the tokens of whole answers

    complete(server, PROMPTS[0], 24)
    right, wrong = first_drafts(server, engine)
    client = threading.Thread(target=ask)
    client.start()
    try:
        shown = watch(server.address)
    finally:
        watched.set()
        client.join()
    assert all(total.endswith("%") for name, (_, total) in shown.items() if "draft" in name)
    assert sum(name.startswith("acceptance") for name in shown) == num_drafts
    assert sum(name.startswith("draft length") for name in shown) == num_drafts + 1
    right_now, wrong_now = first_drafts(server, engine)
    share = int(shown["acceptance draft 1"][1].rstrip("%")) / 100  # of a moment between the two
    assert right / (right + wrong_now) - 0.01 < share < right_now / (right_now + wrong) + 0.01
    assert int(shown["tokens a second answers"][0]) > 0
    assert shown["requests waiting"] == ("0", "")


def check_log(server: Server) -> None:
    """The line on drafts is there, and says what it may say."""
    lines: list[str] = []

    def logged() -> bool:
        complete(server, PROMPTS[0], extra_body={"ignore_eos": True})
        lines[:] = re.findall(r"MTP: mean.*", server.process.text())
        return bool(lines)

    assert eventually(logged)
    assert all(LINE.fullmatch(line) for line in lines)
