"""`qwen3next watch` on recorded pages of metrics of both engines, in a pipe and in a terminal."""

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain, repeat
from pathlib import Path
from threading import Thread

import pytest
from rich.console import Console

from engines.dashboard import check_dashboard, queries
from patience import run
from qwen3next_plugin.extras.command_line.metrics_page import (
    ENGINES,
    MetricsError,
    Reading,
    parse,
    read,
)
from qwen3next_plugin.extras.command_line.watch import figures, table

PAGES = Path(__file__).with_name("metrics_pages")
NAMES = {engine.prefix.rstrip(":"): engine.name for engine in ENGINES}
COMMAND = [sys.executable, "-c", "from qwen3next_plugin.cli import app; app()", "watch"]


def pages(engine: str) -> tuple[str, str]:
    """What a server answered before and, two seconds later, after some requests."""
    before, after = ((PAGES / f"{engine}_{when}.txt").read_text() for when in ("before", "after"))
    return before, after


def readings(engine: str) -> list[Reading]:
    return [parse(text, "", seconds) for text, seconds in zip(pages(engine), (0, 2), strict=True)]


@contextmanager
def serving(*texts: str, status: int = 200) -> Iterator[str]:
    """The address of a server that answers with these texts in turn, with the last for ever."""
    answers = chain(texts, repeat(texts[-1]))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(next(answers).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("engine", NAMES)
def test_figures_of_a_recorded_page(engine):
    first, last = readings(engine)
    assert (last.engine.name, last.model) == (NAMES[engine], "examples/qwen3next-tiny")
    shown = {figure.name: figure for figure in figures((first, last))}
    assert list(shown) == [
        *(f"acceptance draft {n}" for n in (1, 2, 3)),
        *(f"draft length {n}" for n in range(4)),
        *("tokens a second answers", "tokens a second prompts", "decoding time in drafts"),
        *("longest step", "requests running", "requests waiting", "state pages"),
    ]
    assert shown["longest step"].now == "0.12 s"
    lengths = [shown[f"draft length {n}"].share for n in range(4)]
    assert sum(lengths) == pytest.approx(1)
    by = {
        name: [reading.by(f"drafts_{name}_total", "position")["1"] for reading in (first, last)]
        for name in ("accepted", "verified")
    }
    (a, b), (c, d) = by["accepted"], by["verified"]
    assert shown["acceptance draft 1"].share == (b - a) / (d - c)
    assert shown["acceptance draft 1"].total == f"{b / d:.0%}"


@pytest.mark.parametrize("engine", NAMES)
def test_what_is_not_known_is_shown_as_a_dash(engine):
    """Nothing was decoded between two readings; and the engine's own metrics are off."""
    _, last = readings(engine)
    ours = [sample for sample in last.samples if "qwen3next_" in sample.name]
    quiet = Reading(last.engine, ours, seconds=1)
    shown = {figure.name: figure.now for figure in figures((Reading(last.engine, ours, 0), quiet))}
    unknown = {name for name, now in shown.items() if now == "–"}
    assert unknown == shown.keys() - {"state pages", "longest step"}


@pytest.mark.parametrize("engine", NAMES)
def test_a_server_without_drafts(engine):
    _, last = readings(engine)
    always = ("qwen3next_state_pages", "qwen3next_longest_step_seconds")
    samples = [s for s in last.samples if "qwen3next_" not in s.name or s.name.endswith(always)]
    shown = [figure.name for figure in figures([Reading(last.engine, samples, 0)])]
    assert [name for name in shown if "draft" in name] == []
    assert shown[2:] == ["longest step", "requests running", "requests waiting", "state pages"]


@pytest.mark.parametrize("engine", NAMES)
def test_a_table_with_bars(engine):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table("http://there:1/metrics", readings(engine)[:1]))  # there are no rates yet
    assert "–" in console.export_text()
    console.print(table("http://there:1/metrics", readings(engine)))
    text = console.export_text()
    assert (
        text.splitlines()[0].strip() == f"{NAMES[engine]}, examples/qwen3next-tiny, http://there:1"
    )
    assert "█" in text


@pytest.mark.parametrize("engine", NAMES)
def test_a_servers_names_are_shown_as_they_are(engine):
    """Not as rich's markup, and without what controls a terminal."""
    text = pages(engine)[1].replace("examples/qwen3next-tiny", "[red]a[/b] :fire:\x1b[2J")
    text = text.replace('position="1"', 'position="[/]"')
    reading = parse(text, "", 0)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table("http://there:1/metrics", (reading, reading)))
    shown = console.export_text()
    assert f"{NAMES[engine]}, [red]a[/b] :fire: [2J, http://there:1" in shown
    assert "draft [/]" in shown


@pytest.mark.parametrize("engine", NAMES)
def test_a_pipe_gets_one_second_as_lines(engine):
    with serving(*pages(engine)) as url:
        done = run([*COMMAND, url])
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert {len(line) for line in lines} == {3}
    assert [line[0] for line in lines] == [figure.name for figure in figures(readings(engine))]


def test_a_terminal_gets_a_table_until_it_is_interrupted():
    terminal, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with serving(*pages("vllm")) as url:
        process = subprocess.Popen(
            [*COMMAND, url],
            stdout=child,
            stderr=child,
            env=environment,
            # a shell starts what runs in the background with SIGINT ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(child)
        text = ""
        while text.count("since start") < 3:  # drawn anew every second
            text += _read(terminal)
            assert process.poll() is None, text
        process.send_signal(signal.SIGINT)
        while rest := _read(terminal):
            text += rest
    os.close(terminal)
    assert process.wait(30) == 0
    assert "█" in text
    assert "Traceback" not in text


def test_a_terminal_without_a_cursor_gets_lines():
    terminal, child = pty.openpty()
    with serving(*pages("vllm")) as url:
        environment = os.environ | {"TERM": "dumb"}
        done = run([*COMMAND, url], stdout=child, env=environment)
    os.close(child)
    text = ""
    while rest := _read(terminal):
        text += rest
    os.close(terminal)
    lines = text.splitlines()
    assert done.returncode == 0
    assert [line.split("\t")[0] for line in lines] == [f.name for f in figures(readings("vllm"))]


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # the other side is closed
        return ""


def test_no_engine_and_no_torch_is_imported():
    code = (
        "import sys; from qwen3next_plugin.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'vllm', 'sglang'} & sys.modules.keys()"
    )
    with serving(*pages("sglang")) as url:
        command = [sys.executable, "-c", code, "watch", url]
        done = run(command)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/metrics", "{}/metrics/"])
def test_forms_of_an_address(form):
    with serving(*pages("vllm")) as url:
        address = form.format(url.removeprefix("http://"))
        done = run([*COMMAND, address])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "status", "error"),
    [
        ("vllm:num_requests_running 0", 200, "vLLM has no qwen3next metrics there: start it with"),
        ("sglang:num_running_reqs 0", 200, "there: start it with --enable-metrics"),
        ("up 1", 200, "has metrics, but not those of vLLM or SGLang"),
        ("<html>", 200, "is not a page of metrics"),
        ("", 404, "answers 404 Not Found; SGLang has metrics only with --enable-metrics"),
    ],
)
def test_what_is_missing_is_said_with_the_fix(text, status, error):
    with serving(f"{text}\n", status=status) as url, pytest.raises(MetricsError, match=error):
        read(f"{url}/metrics")


@pytest.fixture
def proxy(monkeypatch) -> Iterator[None]:
    """A proxy that finds nothing."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving("", status=404) as url:
        monkeypatch.setenv("http_proxy", url)
        yield


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_no_proxy_is_asked_for_this_machine(proxy, host):
    with serving(*pages("vllm")) as url:
        assert read(f"{url.replace('127.0.0.1', host)}/metrics").engine.name == "vLLM"


def test_a_proxy_is_asked_for_another_machine(proxy):
    with pytest.raises(MetricsError, match="answers 404"):
        read("http://there.invalid/metrics")


def test_a_server_that_is_not_there():
    done = run([*COMMAND, "localhost:9"])
    assert done.returncode == 1
    assert done.stderr.startswith("qwen3next: http://localhost:9/metrics cannot be read")
    assert "is the server up" in done.stderr


def test_the_dashboard_asks_both_engines_for_the_same():
    for title, exprs in queries().items():
        vllm, sglang = (
            [expr.replace(prefix, "") for expr in exprs if f"{prefix}qwen3next" in expr]
            for prefix in ("vllm:", "sglang:")
        )
        assert vllm == sglang, title


@pytest.mark.parametrize("engine", NAMES)
def test_the_dashboard_finds_what_it_asks_for_on_a_recorded_page(engine):
    check_dashboard(engine, pages(engine)[1])
