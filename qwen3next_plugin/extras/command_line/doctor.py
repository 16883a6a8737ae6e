"""`qwen3next doctor`: what this machine and its packages can serve, and what is broken."""

import ctypes
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen3next_plugin import env
from qwen3next_plugin.engines.extras import FOLDER, PACKAGE
from qwen3next_plugin.extras.command_line.machine import FLAGS, machine
from qwen3next_plugin.extras.command_line.report import Finding, print_report
from qwen3next_plugin.versions import (
    TESTED,
    HostVersionError,
    check_host,
    installed,
    requirement,
)

HOSTS = {"vllm": "vLLM", "sglang": "SGLang"}
SERVED = ("cpu", "cuda")  # platforms; ROCm calls itself cuda
PROBE_TIMEOUT_S = 300
SHARED_MEMORY = Path("/dev/shm")
MESSAGES_MIB = 240  # that vLLM asks of it for the messages of its processes


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check versions, kernels and registration; exit with 1, and the fix, if one is broken."""
    findings = list(examine())
    broken = any(f.status == "broken" for f in findings)
    if as_json:
        typer.echo(
            json.dumps({"ok": not broken, "findings": list(map(asdict, findings))}, indent=2)
        )
    else:
        print_report(findings)
    if broken:
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """All findings, the most basic first."""
    yield from _versions()
    yield from _machine()
    yield from (environment := list(_environment()))
    if any(f.status == "broken" for f in environment):
        return  # all checks below would fail for the same reason
    yield from _kernels()
    yield from _of_extras()
    for host in HOSTS:
        if installed(host) is not None:
            yield from _registration(host)


def _versions() -> Iterator[Finding]:
    for name in TESTED:
        found, optional = installed(name), name == "triton" or name in HOSTS
        if found is None and optional:
            yield Finding("versions", name, "not installed", "note")
            continue
        try:
            yield Finding("versions", name, f"{check_host(name)} ({requirement(name)})")
        except HostVersionError as error:
            # no kernel needs Triton on a CPU
            status: Literal["note", "broken"] = "note" if name == "triton" else "broken"
            yield Finding("versions", name, str(found or "not installed"), status, str(error))
    if not any(map(installed, HOSTS)):
        fix = f"install an engine: {requirement('vllm')}"
        yield Finding("versions", "engine", "neither vLLM nor SGLang", "broken", fix)


def _machine() -> Iterator[Finding]:
    m = machine()
    yield Finding("machine", "processor", f"{m.architecture}, {m.cores} cores")
    yield Finding("machine", "flags", " ".join(m.flags) or "none that the kernels use")
    if m.flags and (missing := [flag for flag in FLAGS if flag not in m.flags]):
        yield Finding("machine", "flags not there", " ".join(missing))
    yield Finding("machine", "memory", f"{m.memory_bytes / 2**30:.1f} GiB")


def _environment() -> Iterator[Finding]:
    try:
        env.check()
    except env.EnvError as error:
        yield Finding("environment", "QWEN3NEXT_*", "refused", "broken", str(error))
    else:
        for name, value in env.in_force().items():
            yield Finding("environment", name, value)


def _kernels() -> Iterator[Finding]:
    answer = _ask("kernels")
    if isinstance(answer, str):
        again = "build and install the plugin again (pip install .), or set "
        fix = "" if "EnvError" in answer else f"{again}QWEN3NEXT_KERNELS=reference"
        yield Finding("kernels", "cpu", answer, "broken", fix)
    else:
        for device, description in answer.items():
            yield Finding("kernels", device, description)


def _of_extras() -> Iterator[Finding]:
    """What other extras say: `findings` of the `findings.py` in their folder."""
    for path in sorted(FOLDER.glob("*/findings.py")):
        yield from import_module(f"{PACKAGE}.{path.parent.name}.findings").findings()


def _registration(host: str) -> Iterator[Finding]:
    section, name = f"registration in {HOSTS[host]}", HOSTS[host]
    answer = _ask(host)
    if isinstance(answer, str):
        fix = f"fix that first, or set QWEN3NEXT_DISABLE=1 to run {name} without this plugin"
        yield Finding(section, host, answer, "broken", fix)
        return
    platform = answer.pop("platform")
    if (host, platform) == ("vllm", "cpu"):
        yield from _needs_of_vllm()
    for architecture, module in answer.items():
        if module.startswith("qwen3next_plugin."):
            yield Finding(section, architecture, module)
            continue
        found = f"{name}'s own {module}"
        if env.disabled():
            yield Finding(section, architecture, f"{found}: QWEN3NEXT_DISABLE=1", "note")
        elif platform not in SERVED:
            why = f"{found}: this plugin does not serve it on {platform}"
            yield Finding(section, architecture, why, "note")
        else:
            fix = (
                f"install the plugin in this environment; {host.upper()}_PLUGINS, if set, must "
                "name it"
            )
            yield Finding(section, architecture, found, "broken", fix)


def _needs_of_vllm() -> Iterator[Finding]:
    """What vLLM's CPU build needs of the machine, and slim images lack."""
    section = "vLLM on a CPU"
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        fix = "install it (Debian and Ubuntu: apt install libnuma1)"
        yield Finding(section, "libnuma", str(error), "broken", fix)
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(shlex.split(compiler)[0]) is None:
        fix = "install it (Debian and Ubuntu: apt install g++), or serve with --enforce-eager"
        yield Finding(section, "compiler", f"no {compiler}", "broken", fix)
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free >> 20
        fix = "docker run --shm-size 1g; Kubernetes: mount an emptyDir of medium Memory there"
        status: Literal["ok", "broken"] = "ok" if free >= MESSAGES_MIB else "broken"
        found = f"{free} MiB free, of {MESSAGES_MIB} that vLLM needs"
        yield Finding(section, str(SHARED_MEMORY), found, status, "" if status == "ok" else fix)


def _ask(question: str) -> dict[str, str] | str:
    """The answer of a probe process, or why it gave none."""
    # -P: the current folder may hold the sources, which lack the compiled kernels.
    command = [sys.executable, "-P", "-m", "qwen3next_plugin.extras.command_line.probe", question]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {PROBE_TIMEOUT_S} s"
    if done.returncode < 0:
        return f"died of signal {-done.returncode}"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode or not lines:
        return lines[-1] if lines else f"exit status {done.returncode}"
    return json.loads(lines[-1])
