"""The quantised block model in other engines, each built once, for this machine, into .peers/:

    make .peers/llama.cpp/.installed                compiles for 4 minutes on two cores
    make .peers/ik_llama.cpp/.installed IK=<where>  10 minutes; IK: its repository, or a clone
    make .peers/zentorch/.installed

All use as many threads as the machine has cores and are called in turn. A GGUF file has the formats
of the plugin, tensor by tensor. It writes 9 GB of models into the output folder once.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.block_model import block_model
from benchmarks.engines.steps import flags, mean_difference, timed
from benchmarks.peers.gguf_model import gguf_model
from benchmarks.peers.w8a8_model import w8a8_model
from benchmarks.report import Record, Run, console
from benchmarks.worker import Worker, started

PEERS = Path(".peers")
LLAMA = "benchmarks.peers.llama_worker"
ZENTORCH = "benchmarks.peers.zentorch_worker"
GGUF_OF = {"int8": "Q8_0", "int4": "Q4_0"}
# Mean, nats, from the plugin's bf16, by format: see benchmarks/engines/quantised.py. Measured:
# bf16 in llama.cpp 0.078; zentorch 0.24, which quantises activations, too.
WEIGHTS = {"int8": 0.25, "int4": 0.8}
ACTIVATIONS = {"int8": 0.35}


@dataclass(frozen=True, slots=True)
class Peer:
    """Another engine: what `make` builds of it, its formats, and how far they are from bf16."""

    installed: Path
    formats: Mapping[str, float]

    @property
    def missing(self) -> bool:
        return not self.installed.exists()


THEIRS = {
    "llama.cpp": Peer(PEERS / "llama.cpp" / ".installed", WEIGHTS),
    "ik_llama.cpp": Peer(PEERS / "ik_llama.cpp" / ".installed", WEIGHTS),
    "zentorch": Peer(PEERS / "zentorch" / ".installed", ACTIVATIONS),
}


def measure(run: Run) -> Iterator[Record]:
    """Shortest decode steps of all rounds, all engines of a format called in turn."""
    peers = {name: peer for name, peer in THEIRS.items() if not peer.missing}
    model = block_model(run.out / "block-model")
    with started(plugin(run, model, "bf16")) as exact:
        wanted = exact.logprobs()
    rows = {}
    for kind, bound in WEIGHTS.items():
        with workers(run, model, kind, peers) as engines:
            for name, engine in engines.items():
                within = peers[name].formats[kind] if name in peers else bound
                difference = mean_difference(wanted, engine.logprobs(), within)
                console.print(f"check: {kind}, {name}: {difference:.4f} from bf16")
            found = timed(engines)
            rows |= {f"{kind}, {what}": with_ratios(row) for what, row in found.items()}
    yield run.record(
        "peers/decode",
        "How long do other engines take for a step?",
        f"the block model, eager; {versions(peers)}",
        {"plugin": "ms"} | dict.fromkeys(peers, "ms") | {f"{name} / plugin": "" for name in peers},
        rows,
    )


def missing() -> str:
    """What to build, if none of them is there."""
    needed = [f"`make {peer.installed}`" for peer in THEIRS.values()]
    return "" if any(not p.missing for p in THEIRS.values()) else f"needs {' or '.join(needed)}"


def versions(peers: Mapping[str, Peer]) -> str:
    """Peers with the versions that `make` noted."""
    return ", ".join(f"{name} {peer.installed.read_text().strip()}" for name, peer in peers.items())


def plugin(run: Run, model: Path, kind: str) -> Worker:
    """vLLM with the plugin."""
    env = {} if kind == "bf16" else {"QWEN3NEXT_QUANTISE": kind}
    asked = flags(model, enforce_eager=True)
    return Worker("plugin", asked, run.out / f"peers-{kind}-plugin.log", env=env)


@contextmanager
def workers(
    run: Run, model: Path, kind: str, peers: Mapping[str, Peer]
) -> Iterator[dict[str, Worker]]:
    """The plugin and all peers that have a format, one started after the other."""
    with ExitStack() as stack:
        yield {
            "plugin": stack.enter_context(started(plugin(run, model, kind))),
            **{
                name: stack.enter_context(started(their_worker(run, model, kind, name)))
                for name, peer in peers.items()
                if kind in peer.formats
            },
        }


def their_worker(run: Run, model: Path, kind: str, name: str) -> Worker:
    """A peer with its own file of the model."""
    log = run.out / f"peers-{kind}-{name}.log"
    if name == "zentorch":
        asked = flags(w8a8_model(model, run.out / "block-model-w8a8"), enforce_eager=True)
        return Worker(name, asked, log, plugin=False, env=path_of(name), module=ZENTORCH)
    file = gguf_model(model, run.out / f"block-model-{GGUF_OF[kind]}.gguf", GGUF_OF[kind])
    return llama_worker(name, file, model, log)


def llama_worker(name: str, file: Path, model: Path, log: Path) -> Worker:
    """llama.cpp or ik_llama.cpp with a GGUF file of a model."""
    asked = {"library": name, "model": str(file), "config": str(model)}
    return Worker(name, asked, log, env=path_of(name), module=LLAMA)


def path_of(name: str) -> dict[str, str]:
    """The environment variable by which a worker finds a peer's modules."""
    folder = THEIRS[name].installed.parent.resolve()
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def with_ratios(times: Mapping[str, float]) -> dict[str, float]:
    """Times, and each peer's over the plugin's."""
    ratios = {f"{name} / plugin": t / times["plugin"] for name, t in times.items()}
    del ratios["plugin / plugin"]
    return {**times, **ratios}
