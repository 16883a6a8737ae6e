"""What `qwen3next doctor` says of the last checks here."""

from collections.abc import Iterator
from typing import Literal

from qwen3next_plugin.extras.command_line.report import Finding
from qwen3next_plugin.extras.self_check.verdicts import kept


def findings() -> Iterator[Finding]:
    """What the last start of each kind found when it compared the kernels with their references."""
    latest = {(v.device, v.kernels): v for v in kept()}
    if not latest:
        said = "none yet: an engine makes one when it first loads a model"
        yield Finding("self-check", "kernels", said)
    for (device, kernels), verdict in latest.items():
        agree = "disagree" if verdict.error else "agree"
        found = f"{kernels} kernels {agree} with their references, checked {verdict.age}"
        status: Literal["ok", "broken"] = "broken" if verdict.error else "ok"
        yield Finding("self-check", device, found, status, verdict.error)
