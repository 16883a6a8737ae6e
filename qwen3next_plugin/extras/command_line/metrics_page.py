"""The metrics page of a running server, and each engine's names of metrics."""

import http.client
import ipaddress
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

TIMEOUT_S = 15  # a busy machine may need some


class MetricsError(RuntimeError):
    """There is nothing to watch; says what is missing and the fix."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine's names of its own metrics, and the flags that ours need."""

    name: str
    prefix: str
    generated: tuple[str, str]  # sample, value of its label `mode`
    prompt: tuple[str, str]
    running: str
    waiting: str
    fix: str


ENGINES = (
    Engine(
        name="vLLM",
        prefix="vllm:",
        generated=("generation_tokens_total", ""),
        prompt=("prompt_tokens_total", ""),
        running="num_requests_running",
        waiting="num_requests_waiting",
        fix="start it with one API server, on a CPU",
    ),
    Engine(
        name="SGLang",
        prefix="sglang:",
        # Its other token counters grow only when a request ends.
        generated=("realtime_tokens_total", "decode"),
        prompt=("realtime_tokens_total", "prefill_compute"),
        running="num_running_reqs",
        waiting="num_queue_reqs",
        fix="start it with --enable-metrics, on a CPU",
    ),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """The metrics of a server at one moment."""

    engine: Engine
    samples: list["Sample"]
    seconds: float

    def value(self, name: str, **labels: str) -> float | None:
        """The sum of an engine's samples that have these labels; None if there is none."""
        name = self.engine.prefix + name
        found = [
            s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()
        ]
        return sum(found) if found else None

    def most(self, name: str) -> float | None:
        """The largest of an engine's samples of this name; None if there is none."""
        name = self.engine.prefix + name
        return max((s.value for s in self.samples if s.name == name), default=None)

    def by(self, name: str, label: str) -> dict[str, float]:
        """The values of one of our samples by one label."""
        name, sums = f"{self.engine.prefix}qwen3next_{name}", dict[str, float]()
        for s in self.samples:
            if s.name == name:
                sums[s.labels[label]] = sums.get(s.labels[label], 0) + s.value
        return sums

    @property
    def model(self) -> str:
        return next(s.labels["model_name"] for s in self.samples if "qwen3next_" in s.name)


def read(address: str) -> Reading:
    """Ask a server for its metrics.

    Raises:
        MetricsError: it cannot be reached, or has no metrics of ours.
    """
    try:
        proxies = (urllib.request.ProxyHandler({}),) if _is_local(address) else ()
        opener = urllib.request.build_opener(*proxies)
        with opener.open(address, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise MetricsError(
            f"{address} answers {error.code} {error.reason}; SGLang has metrics only with"
            " --enable-metrics"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise MetricsError(
            f"{address} cannot be read ({reason}): is the server up, and is this its address?"
        ) from error
    return parse(text, address, time.monotonic())


def _is_local(address: str) -> bool:
    """Whether an address is this machine's own, which no proxy can reach."""
    host = urlsplit(address).hostname or ""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return ip.is_loopback or ip.is_unspecified


def parse(text: str, address: str, seconds: float) -> Reading:
    """A reading from a page of metrics; raises MetricsError if ours are not there."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        families = text_string_to_metric_families(text)
        samples = [_printable(sample) for family in families for sample in family.samples]
    except ValueError as error:
        raise MetricsError(f"{address} is not a page of metrics") from error
    for engine in ENGINES:
        if any(s.name.startswith(f"{engine.prefix}qwen3next_") for s in samples):
            return Reading(engine, samples, seconds)
    for engine in ENGINES:
        if any(s.name.startswith(engine.prefix) for s in samples):
            raise MetricsError(f"{engine.name} has no qwen3next metrics there: {engine.fix}")
    raise MetricsError(f"{address} has metrics, but not those of vLLM or SGLang")


def _printable(sample: "Sample") -> "Sample":
    """The sample without what would control a terminal: the server chose its labels."""
    labels = {
        name: "".join(c if c.isprintable() else " " for c in value)
        for name, value in sample.labels.items()
    }
    return sample._replace(labels=labels)
