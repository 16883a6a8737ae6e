"""`python -m benchmarks.peers`: the quantised block model in other engines."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from benchmarks import report
from benchmarks.block_model import block_model
from benchmarks.engines.steps import flags, mean_difference
from benchmarks.peers.gguf_model import gguf_model
from benchmarks.peers.w8a8_model import w8a8_model
from benchmarks.report import OUT, Docs, Out, Quick, Record, Run, console
from benchmarks.worker import Worker, alternate, started

PEERS = Path(".peers")
LLAMA = "benchmarks.peers.llama_worker"
ZENTORCH = "benchmarks.peers.zentorch_worker"
GGUF_OF = {"int8": "Q8_0", "int4": "Q4_0"}
# Mean, nats, from the plugin's bf16, by format: see benchmarks/engines/quantised.py. Measured:
# bf16 in llama.cpp 0.078; zentorch 0.24, which quantises activations, too.
WEIGHTS = {"int8": 0.25, "int4": 0.8}
ACTIVATIONS = {"int8": 0.35}
BATCHES = (1, 8)


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
    peers = present()
    model = block_model(run.out / "block-model")
    rounds, steps = (2, 8) if run.quick else (5, 16)
    with started(plugin(run, model, "bf16")) as reference:
        wanted = reference.logprobs()
    rows = {}
    for kind in WEIGHTS:
        with workers(run, model, kind, peers) as engines:
            for name, engine in engines.items():
                bound = peers[name].formats[kind] if name in peers else WEIGHTS[kind]
                difference = mean_difference(wanted, engine.logprobs(), bound)
                console.print(f"check: {kind}, {name}: {difference:.4f} from bf16")
            for batch in BATCHES:
                times = alternate(engines, rounds, "decode", batch=batch, steps=steps)
                shortest = {name: min(map(min, found)) for name, found in times.items()}
                rows[f"{kind}, batch {batch}"] = with_ratios(shortest)
    yield run.record(
        "peers/decode",
        "How long do other engines take for a step?",
        f"the block model, eager; {versions(peers)}",
        {"plugin": "ms"} | dict.fromkeys(peers, "ms") | {f"{name} / plugin": "" for name in peers},
        rows,
    )


def present() -> dict[str, Peer]:
    """The peers that are built; says how to build the others."""
    for name, peer in THEIRS.items():
        if peer.missing:
            console.print(f"{name}: left out, needs `make {peer.installed}`")
    found = {name: peer for name, peer in THEIRS.items() if not peer.missing}
    if not found:
        raise SystemExit("no other engine is built: see --help")
    return found


def versions(peers: Mapping[str, Peer]) -> str:
    """Peers with the versions that `make` noted."""
    return ", ".join(f"{name} {peer.installed.read_text().strip()}" for name, peer in peers.items())


def plugin(run: Run, model: Path, kind: str) -> Worker:
    """vLLM with the plugin."""
    env = {} if kind == "bf16" else {"QWEN3NEXT_QUANTISE": kind}
    asked = flags(model, quick=True, enforce_eager=True)
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
    folder = THEIRS[name].installed.parent.resolve()
    env = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    if name == "zentorch":
        asked = flags(w8a8_model(model, run.out / "block-model-w8a8"), quick=True)
        asked |= {"enforce_eager": True}
        return Worker(name, asked, log, plugin=False, env=env, module=ZENTORCH)
    file = gguf_model(model, run.out / f"block-model-{GGUF_OF[kind]}.gguf", GGUF_OF[kind])
    asked = {"library": name, "model": str(file), "config": str(model)}
    return Worker(name, asked, log, env=env, module=LLAMA)


def with_ratios(times: Mapping[str, float]) -> dict[str, float]:
    """Times, and each peer's over the plugin's."""
    ratios = {f"{name} / plugin": t / times["plugin"] for name, t in times.items()}
    del ratios["plugin / plugin"]
    return {**times, **ratios}


def main(out: Out = OUT, quick: Quick = False, docs: Docs = False) -> None:
    """How fast is the quantised block model in other engines?

    Decode steps at batch 1 and 8 of vLLM with the plugin (QWEN3NEXT_QUANTISE), of llama.cpp and
    ik_llama.cpp (Q8_0 and Q4_0), and of vLLM without the plugin, with zentorch's W8A8 kernels.
    Each is built once, for this machine, into .peers/, which no other command uses:

    \b
      make .peers/llama.cpp/.installed                compiles for 4 minutes on two cores
      make .peers/ik_llama.cpp/.installed IK=<where>  10 minutes; IK: its repository, or a clone
      make .peers/zentorch/.installed

    What is not built is left out. All use as many threads as the machine has cores and are called
    in turn, each in a process of its own. A GGUF file has the formats of the plugin, tensor by
    tensor. First each engine's log-probabilities are compared with the plugin's in bf16: if one
    is further off than its format explains, the command exits with 1 and prints no figure.

    A run takes about six minutes, and writes 9 GB of models into the output folder once.
    """
    run = Run(__package__, out, quick)
    report.finish(run, lambda: measure(run), docs=docs)


if __name__ == "__main__":
    typer.run(main)
