"""Every example runs as its README says: as a script, on the shipped checkpoint."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.agents import PYTHON
from engines.process import Fork, script
from engines.vllm.offline import IN_PROCESS, environment, preload
from engines.vllm.server import Forked
from needs import needs
from patience import run

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = "examples/qwen3next-tiny"
TIMEOUT_S = 600
APART = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # the engine in a process, as a user has it
LOGGED = re.compile(r"INFO|WARNING|Warning|Traceback|leaked")

pytestmark = pytest.mark.serve


def run_example(name: str, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run an example to its end, and fail with what it printed if it fails."""
    done = run([sys.executable, f"examples/{name}", *args], cwd=ROOT, input=stdin)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def forked_example(name: str, *args: str, **own: str) -> str:
    """Run an example to its end in a fork of a process that has vLLM loaded; what it printed."""
    preload()
    where = ("--model", str(ROOT / CHECKPOINT))
    env = environment() | IN_PROCESS | own
    process = Fork(script, str(ROOT / "examples" / name), *where, *args, env=env)
    try:
        process.wait(TIMEOUT_S)
        assert process.code() == 0, process.text()[-6000:]
        return process.text()
    finally:
        process.stop()


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """A server on the shipped checkpoint, with MTP as `make serve` has it, and YaRN.

    As if it had been trained on 1,024 positions.
    """
    drafts = '{"method": "qwen3_next_mtp", "num_speculative_tokens": 2}'
    yarn = '{"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":1024}'
    long = ("--rope-scaling", yarn, "--max-model-len", "4096")
    small = ("--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30))
    server = Forked(ROOT / CHECKPOINT, *long, *small, "--speculative-config", drafts).wait()
    yield f"{server.address}/v1"
    server.close()


HELPFUL = ["offline.py", "chat.py", "compare_mtp.py", "long_context.py", "agent.py"]


@pytest.mark.parametrize("name", HELPFUL)
def test_help_teaches(name):
    text = run_example(name, "--help").stdout
    assert "Usage" in text
    assert "--model" in text


def test_the_agent_names_its_packages():
    """Which no engine's environment has."""
    assert "make .qwen-agent/.installed" in run_example("agent.py", "--help").stdout
    command = [sys.executable, "examples/agent.py", "What is 2 times 3?"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "'qwen_agent': see --help" in done.stderr


def test_offline_continues_the_prompts_it_is_given():
    prompts = ("import os\n", "def add(a, b):\n")
    said = forked_example("offline.py", "--max-tokens", "16", *prompts, **APART)
    assert "--- 'import os\\n'" in said
    assert "--- 'def add(a, b):\\n'" in said
    tokens = int(re.search(r"(\d+) tokens in [\d.]+ s\n$", said)[1])  # nothing follows
    assert 2 <= tokens <= 32
    assert "qwen3next_plugin" in said  # the log line: it is in use


def test_chat_holds_a_conversation(base_url):
    questions = "What does `os.walk` do?\nAnd `os.listdir`?\n"
    done = run_example("chat.py", "--base-url", base_url, "--max-tokens", "24", stdin=questions)
    answers = done.stdout.split("you> ")[1:]
    assert len(answers) == 3  # two turns, and the prompt at which the input ended
    assert all(answer.strip() for answer in answers[:2])


def test_long_context_reads_beyond_the_original_length(base_url):
    said = run_example("long_context.py", "--base-url", base_url, "--tokens", "3000").stdout
    lengths = [int(n) for n in re.findall(r"found +at \d+% of (\d+) tokens", said)]
    assert len(lengths) == 3
    assert all(2500 < length < 3500 for length in lengths)


@pytest.mark.parametrize(
    ("name", "python", "more"),
    [
        ("chat.py", sys.executable, ()),
        ("long_context.py", sys.executable, ()),
        pytest.param(
            *("agent.py", PYTHON, ("a question",)), marks=[needs("qwen-agent"), pytest.mark.long]
        ),
    ],
    ids=lambda value: value if str(value).endswith(".py") else "",
)
@pytest.mark.parametrize("model", [(), ("--model", "given")], ids=["any", "given"])
def test_without_a_server_one_line_says_where_it_looked(name, python, more, model):
    command = [python, f"examples/{name}", "--base-url", "http://127.0.0.1:9/v1", *model, *more]
    done = subprocess.run(command, cwd=ROOT, input="hello\n", capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("http://127.0.0.1:9/v1: Connection error.")
    assert "Traceback" not in done.stderr


def test_compare_mtp_shows_equal_texts_and_acceptance():
    fixed = {"QWEN3NEXT_DRAFTS": "fixed"}  # else what is drafted depends on how fast steps are
    said = forked_example("compare_mtp.py", "--max-tokens", "24", **fixed)
    assert "with MTP" in said
    assert "up to token" not in said
    rates = re.search(r"with MTP\s*│\s*[\d.]+\s*│\s*([\d.]+)\s+([\d.]+)\s*│", said)
    first, second = map(float, rates.groups())
    assert 0 < first <= 1
    assert 0 <= second <= first


def test_roll_outs():
    text = forked_example("roll_outs.py", "--updates", "1", **APART)
    before, after = (
        re.findall(rf"--- after {n} updates: .*\n((?:(?!---).*\n)+)", text) for n in (0, 1)
    )
    assert not LOGGED.search(text, text.index("--- after"))
    assert len(before) == len(after) == 2
    assert before != after
