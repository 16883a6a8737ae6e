"""Four layers of Qwen3.6's sizes: vLLM with the plugin and without, called in turn.

The vocabulary is cut as the layers are: the head has its released share of a step, and two engines
fit into 24 GB.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.block_model import four_layers
from benchmarks.engines.steps import RATIO, SIDES, Times, check, flags, timed, with_ratios
from benchmarks.report import Record, Run
from benchmarks.worker import FIXED, Worker, started

SIZES = ("Qwen3.6-35B-A3B", "Qwen3.6-27B")
DRAFTS = 3

# Mean, nats. With eight of 256 random experts, near ties decide which: at a smaller size the plugin
# was 0.14 from its fp32, upstream 0.13, and 0.13 from each other. Another model is 1 away.
MAX_DIFFERENCE = dict.fromkeys(("upstream", "drafting"), 0.2)


def measure(run: Run) -> Iterator[Record]:
    """Shortest steps and prompts of all rounds; verify steps in plain steps."""
    steps: Times = {}
    verify: Times = {}
    for size in SIZES:
        model = four_layers(run.out / size, size)
        with start(run, model, "plugin") as plugin:
            for other in ("upstream", "drafting"):
                with start(run, model, other) as engine:
                    engines = {other: engine, "plugin": plugin}
                    check(engines, MAX_DIFFERENCE)
                    if other == "upstream":
                        found = with_ratios(timed(engines, (1024,)))
                        steps |= {f"{size}: {what}": row for what, row in found.items()}
                    else:
                        verify |= {
                            f"{size}: {what}": {
                                "plugin": row["drafting"],
                                "in plain steps": row["drafting"] / row["plugin"],
                            }
                            for what, row in timed(engines).items()
                        }
    case = "vLLM, four layers of the released shapes, random weights, bf16, eager"
    yield run.record(
        "engines/family",
        "How fast is Qwen3.6?",
        case,
        dict.fromkeys(SIDES, "ms") | RATIO,
        steps,
    )
    yield run.record(
        "engines/family_verify",
        f"What does it cost to draft and verify {DRAFTS} tokens?",
        case,
        {"plugin": "ms", "in plain steps": ""},
        verify,
    )


def start(run: Run, model: Path, name: str) -> AbstractContextManager[Worker]:
    """One engine, in a context; drafts have a fixed length."""
    more: dict[str, Any] = {}
    if name == "drafting":
        more["speculative_config"] = {"method": "mtp", "num_speculative_tokens": DRAFTS}
    asked = flags(model, enforce_eager=True, **more)
    log = run.out / f"family-{model.name}-{name}.log"
    return started(Worker(name, asked, log, plugin=name != "upstream", env=FIXED))
