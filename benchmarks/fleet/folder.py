"""A prefix cache in a folder: what a restarted server gains by it, and what others pay for it."""

import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.progress import track

from benchmarks.block_model import CONFIG, block_model
from benchmarks.mtp.load import Load, Request
from benchmarks.report import Record, RedCheckError, Run, console
from benchmarks.server import Server
from benchmarks.worker import prompts, vocabulary

LONG, WRITTEN = 8192, 2600  # tokens of prompts: one that is found again; ones that are only written
PROMPTS = 2
ROUNDS, CLIENTS, SECONDS = 6, 2, 8.0
WITHOUT, WITH = "without", "with the folder"
CASE = "vLLM, eager, the block model, bf16"


def measure(run: Run) -> Iterator[Record]:
    """First tokens after a restart, cold and found; then answers beside what is written."""
    model = block_model(run.out / "block-model")
    folder = run.out / "fleet-prefixes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield restart(run, model, folder)
        yield cost(run, model, folder)
    finally:
        shutil.rmtree(folder)


def restart(run: Run, model: Path, folder: Path) -> Record:
    """The first token of prompts that an earlier server has read, and of as many that none has."""
    texts = prompts([LONG] * 2 * PROMPTS, vocabulary(str(model)))
    requests = [Request(prompt, 1) for prompt in texts]
    known, cold = requests[::2], requests[1::2]
    with served(run, model, folder) as server:
        before = [Load(server).first_token(request)[0] for request in known]
        settle(folder)
    with served(run, model, folder) as server:
        load = Load(server)
        load.first_token(Request([1, 2, 3], 1))
        found = min(load.first_token(request)[0] for request in known)
        again = min(load.first_token(request)[0] for request in cold)
    seconds = min(*before, again)
    return run.record(
        "fleet/restart",
        "How long is the first token of a prompt of 8,192?",
        CASE,
        {"cold": "s", "found in the folder": "s", "found / cold": ""},
        {"after a restart": {
            "cold": seconds, "found in the folder": found, "found / cold": found / seconds,
        }},
    )  # fmt: skip


def cost(run: Run, model: Path, folder: Path) -> Record:
    """Answers' tokens a second, of servers with the folder and without it, in turn.

    Before each turn the server reads a prompt, whose pages are written while it answers others.
    """
    rates: dict[str, list[float]] = {WITHOUT: [], WITH: []}
    chance = random.Random(2)
    with ExitStack() as stack:
        servers = {
            side: stack.enter_context(served(run, model, folder if side == WITH else None))
            for side in rates
        }
        for _ in track(range(ROUNDS), "answers beside the folder", console=console):
            for side, server in servers.items():
                prompt = chance.choices(range(2, CONFIG["vocab_size"]), k=WRITTEN)
                load = Load(server)
                load.first_token(Request(prompt, 1))
                endless = itertools.count()
                short = (Request(chance.choices(range(2, 999), k=32), 512) for _ in endless)
                rates[side].append(load.rate(short, CLIENTS, SECONDS, whole=False)[0])
    best = {side: max(found) for side, found in rates.items()}
    return run.record(
        "fleet/folder_cost",
        "What does writing prefixes cost others?",
        CASE,
        dict.fromkeys(best, "tokens a second") | {f"{WITH} / {WITHOUT}": ""},
        {f"{CLIENTS} clients": {**best, f"{WITH} / {WITHOUT}": best[WITH] / best[WITHOUT]}},
    )


@contextmanager
def served(run: Run, model: Path, folder: Path | None) -> Iterator[Server]:
    """A healthy server; `folder`: of its prefixes."""
    flags = ["--max-model-len", "9000", "--kv-cache-memory-bytes", str(3 << 29)]
    if folder is not None:
        flags += ["--kv-transfer-config", json.dumps(connector(folder))]
    log = run.out / f"fleet-{'with' if folder else 'no'}-folder.log"
    with Server(model, log, os.environ, *flags) as server:
        with console.status("starting vllm serve"):
            server.wait()
        yield server


def connector(folder: Path) -> dict[str, object]:
    """As docs/fleet.md has it."""
    own = {
        "spec_name": "FolderSpec",
        "spec_module_path": "qwen3next_plugin.extras.fleet.vllm.folder",
        "folder": str(folder.absolute()),
        "folder_bytes": 8 << 30,
    }
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": own,
    }


def settle(folder: Path) -> None:
    """Return when files have been written, and no more come."""
    before: set[Path] = set()
    deadline = time.monotonic() + 120
    while (files := {path for path in folder.rglob("*") if path.is_file()}) != before or not files:
        if time.monotonic() > deadline:
            raise RedCheckError("the server writes no prefixes")
        before = files
        time.sleep(2)
