"""At start, every kernel that a model launches is compared with its reference, on small inputs.

What a kernel computes depends on processor, compiler and driver, and few of them were ever tried.
A verdict is kept, so a machine pays once.
"""

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import qwen3next_plugin.kernels
from qwen3next_plugin import __version__, env
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.extras.self_check.cases import Draw, Run, Served, cases, run_bad_row
from qwen3next_plugin.extras.self_check.variables import self_check
from qwen3next_plugin.extras.self_check.verdicts import Verdict, passed
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.model.kinds import kind_of
from qwen3next_plugin.model.state import PageLayout

# On |out - ref| / |ref| of each vector (last dim); Triton multiplies fp32 in three parts of tf32,
# and bf16 as it is: tests/tolerances.py has what was measured.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
LEAST = 1 / 4  # of a mean vector: one that cancels to less is measured by this


class KernelError(RuntimeError):
    """A kernel that does not launch here, or computes something else than its reference."""


def check_kernels(
    config: Qwen3NextConfig,
    layout: PageLayout,
    device: torch.device,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Compare this rank's kernels with their references, unless they have agreed here before.

    Raises:
        KernelError: the first that disagrees, with its sizes, the deviation and the ways out.
    """
    if not self_check() or env.kernels() == "reference":
        return
    served = Served(config, layout, device)
    subject = _subject(served)
    if passed(subject):
        return
    begin = time.monotonic()
    try:
        with torch.inference_mode():
            compare(served)
    except KernelError as error:
        Verdict.now(subject, time.monotonic() - begin, str(error)).keep()
        raise
    seconds = time.monotonic() - begin
    Verdict.now(subject, seconds).keep()
    log(f"{subject['kernels']} kernels agree with their references, checked in {seconds:.1f} s")


def compare(served: Served) -> None:
    """Run every case by the backend and by the reference; raises KernelError."""
    backend = dispatch.backend("gated_delta_net", served.device.type)
    found = cases(served, backend)
    if kind := kind_of(served.config):
        found |= kind.cases(served, backend)
    for op, case in found.items():
        run, reference = dispatch.implementation(op, served.device), _reference(op)
        sizes = "its first input"
        try:
            for (sizes, out), (_, ref) in zip(
                case(run, served, Draw(served)), case(reference, served, Draw(served)), strict=True
            ):
                _compare_one(f"{op}, {sizes}", out, ref, served)
            faults.check(served.device)
        except KernelError:
            raise
        except Exception as error:
            raise _error(f"{op}, after {sizes}: {error}", served) from error
    _expect_refusal(served)


def _compare_one(what: str, out: Tensor, ref: Tensor, served: Served) -> None:
    found, allowed = deviation(out, ref), BOUNDS[served.dtype]
    if not found <= allowed:
        raise _error(f"{what}: differs by {found:.1e}, allowed {allowed:.0e}", served)


def deviation(out: Tensor, ref: Tensor) -> float:
    """The greatest |out - ref| / |ref| of a vector; infinite where whole numbers differ."""
    if not ref.is_floating_point():
        return 0.0 if out.equal(ref) else torch.inf
    difference = (out.double() - ref.double()).norm(dim=-1)
    scale = ref.double().norm(dim=-1)
    least = LEAST * scale.square().mean().sqrt().item()
    if least == 0:
        return difference.max().item()
    return (difference / scale.clamp(min=least)).max().item()


def _expect_refusal(served: Served) -> None:
    """A row without a page must be reported, not written somewhere."""
    try:
        run_bad_row(dispatch.implementation("gated_delta_net", served.device), served, Draw(served))
        faults.check(served.device)
    except RuntimeError as error:
        if "row 0: slot 7" in str(error):
            return
        raise _error(f"gated_delta_net, a slot that is not there: {error}", served) from error
    raise _error("gated_delta_net, a slot that is not there: it was not reported", served)


def _reference(op: str) -> Run:
    return import_module(f"qwen3next_plugin.kernels.{op}.reference").run


def _error(complaint: str, served: Served) -> KernelError:
    subject = _subject(served)
    ways_out = ["QWEN3NEXT_DISABLE=1 serves without this plugin"]
    if subject["kernels"].startswith("native"):
        ways_out.append("QWEN3NEXT_ISA=baseline uses the simplest kernels")
    ways_out.append("QWEN3NEXT_KERNELS=reference computes without them, slowly")
    return KernelError(
        f"{subject['kernels']} kernels are wrong on {subject['device']}: {complaint}."
        f" {'; '.join(ways_out)}. Please report this line and `qwen3next doctor --json`"
    )


def _subject(served: Served) -> Mapping[str, str]:
    """All that decides what the kernels compute, by name."""
    return {
        "device": _name(served.device),
        "kernels": dispatch.described(served.device.type),
        "chosen": env.kernels(),
        "plugin": f"{__version__} {_sources()}",
        "torch": torch.__version__,
        "triton": version("triton") if served.device.type == "cuda" else "",
        **served.sizes,
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "this processor"


def _sources() -> str:
    """What tells one build of the kernels from another of the same version."""
    folders = map(Path, qwen3next_plugin.kernels.__path__)
    files = [
        f.stat() for folder in folders for f in folder.rglob("*") if f.suffix in (".py", ".so")
    ]
    return f"{sum(f.st_size for f in files)} {max(f.st_mtime_ns for f in files)}"
