"""Registers and shared memory of each Triton kernel, found by compiling it; needs no GPU.

    python -m benchmarks.gpu.resources [--arch sm_90 | --write]

The tables have the kernels that a released model's layers launch. Those of another draft length,
shard and dtype are compiled too. If a kernel spills, the command names it and exits with 1.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from triton.compiler import CompiledKernel

from benchmarks.block_model import CONFIG
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.extras.command_line.launches import Launches
from qwen3next_plugin.kernels.gpu.compiling import compiling_for
from qwen3next_plugin.kernels.gpu.configs import CONFIGS

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- gpu_resources: begin -->\n", "<!-- gpu_resources: end -->\n"
HEAD = "kernel | warps | registers | spilled bytes | shared memory | programs | bound by"


@dataclass(frozen=True, slots=True)
class Served:
    """How a model is served: draft tokens, ranks, dtypes of activations and S."""

    num_drafts: int
    ranks: int
    dtype: torch.dtype
    state_dtype: torch.dtype


RELEASED = CONFIG | {"num_experts": 512}  # the block model has 64
TABLED = Served(3, 4, torch.bfloat16, torch.float32)
# Each setting's other value: no drafts, one rank, the other 16-bit dtype, S in 16 bits.
OTHER = Served(0, 1, torch.float16, torch.bfloat16)

# Parts of a processor; registers a lane of each; allocated in eights.
PARTS, REGISTERS, GRAIN = 4, 512, 8
TENSOR_COLUMNS = 512  # of tensor memory


@dataclass(frozen=True, slots=True)
class Processor:
    """Resources of a multiprocessor or compute unit, besides registers."""

    shared: int  # bytes
    reserved: int = 1024  # of them, for each program
    warps: int = 64
    programs: int = 32


PROCESSORS = {
    "sm_80": Processor(shared=164 << 10),
    "sm_90": Processor(shared=228 << 10),
    "sm_100": Processor(shared=228 << 10),
    "gfx942": Processor(shared=64 << 10, reserved=0, warps=32),
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a compiled kernel uses; registers are per lane."""

    name: str
    warps: int
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    tensor_columns: int = 0

    def fitting(self, processor: Processor) -> tuple[int, str]:
        """How many programs a processor holds at once, and which resource limits them."""
        in_part = REGISTERS // (-(-self.registers // GRAIN) * GRAIN)
        shared = self.shared + processor.reserved
        limits = {
            "registers": PARTS * in_part // self.warps,
            "shared memory": processor.shared // max(shared, 1),
            "tensor memory": TENSOR_COLUMNS // max(self.tensor_columns, 1),
            "warps": processor.warps // self.warps,
            "programs": processor.programs,
        }
        bound = min(limits, key=limits.__getitem__)
        return limits[bound], bound

    def row(self, processor: Processor) -> str:
        numbers = (self.warps, self.registers, self.spilled, self.shared)
        cells = [self.name, *(f"{x:,}" for x in numbers), *map(str, self.fitting(processor))]
        return f"| {' | '.join(cells)} |"


def compiled(arch: str, served: Served) -> list[Kernel]:
    """Every kernel that the layers launch, each once, by name."""
    model = Qwen3NextConfig.from_hf(RELEASED, tp_size=served.ranks)
    with compiling_for(arch) as launched:
        Launches(
            model, served.dtype, served.state_dtype, served.num_drafts, torch.device("cpu")
        ).run()
    once = {kernel.hash: kernel for kernel in launched}.values()
    return sorted(map(taken, once), key=lambda kernel: kernel.name)


def taken(kernel: CompiledKernel) -> Kernel:
    return (_of_gcn if "amdgcn" in kernel.asm else _of_cubin)(kernel)


def _name(kernel: CompiledKernel) -> str:
    """The kernel's name, and which of its parts are compiled in."""
    names, constants = kernel.src.fn.arg_names, kernel.src.constants
    parts = [names[path[0]].lower() for path, value in constants.items() if value is True]
    return ", ".join([kernel.metadata.name.strip("_"), *parts])


def _of_cubin(kernel: CompiledKernel) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", said)}
    return Kernel(
        name=_name(kernel),
        warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        tensor_columns=kernel.metadata.tmem_size,
    )


def _of_gcn(kernel: CompiledKernel) -> Kernel:
    said = re.findall(r"\.(\w+):\s+(\d+)$", kernel.asm["amdgcn"], re.MULTILINE)
    usage = {name: int(value) for name, value in said}
    return Kernel(
        name=_name(kernel),
        warps=kernel.metadata.num_warps,
        registers=usage["vgpr_count"],  # accumulation registers included
        spilled=max(usage["private_segment_fixed_size"], 4 * usage["vgpr_spill_count"]),
        shared=kernel.metadata.shared,
    )


def section(arch: str, kernels: list[Kernel]) -> str:
    """The table of an architecture."""
    rows = [kernel.row(PROCESSORS[arch]) for kernel in kernels]
    return "\n".join([f"**{arch}**\n", f"| {HEAD} |", "|---" * 7 + "|", *rows]) + "\n"


def complaints(arch: str, served: Served, kernels: list[Kernel]) -> Iterator[str]:
    """Kernels that spill registers, or that do not fit on a processor."""
    for kernel in kernels:
        if kernel.spilled:
            yield f"{arch}: {kernel.name} spills {kernel.spilled} bytes, {served}"
        fitting, bound = kernel.fitting(PROCESSORS[arch])
        if not fitting:
            yield f"{arch}: {kernel.name} does not fit, for its {bound}, {served}"


def write(sections: list[str]) -> None:
    """Put the tables between the marks of benchmarks/gpu/resources.md."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    said = f"Compiled by Triton {triton.__version__}.\n"
    PAGE.write_text(before + BEGIN + "\n".join([said, *sections]) + END + after)


def main(
    arch: Annotated[str | None, typer.Option(help="Only this architecture, such as sm_90.")] = None,
    write_docs: Annotated[bool, typer.Option("--write", help="Write resources.md.")] = False,
) -> None:
    """What does each Triton kernel use of a GPU? Compiles for every architecture; needs no GPU.

    Prints registers, spilled bytes, shared memory, and how many programs fit on a multiprocessor.
    Exits with 1 if a kernel spills or does not fit.
    """
    if arch and write_docs:
        raise typer.BadParameter("benchmarks/gpu/resources.md has the tables of all architectures")
    sections: list[str] = []
    red: list[str] = []
    for each in [arch] if arch else CONFIGS:
        kernels = compiled(each, TABLED)
        sections.append(section(each, kernels))
        print(sections[-1])
        red += complaints(each, TABLED, kernels)
        red += complaints(each, OTHER, compiled(each, OTHER))
    if red:
        raise SystemExit("\n".join(red))
    if write_docs:
        write(sections)


if __name__ == "__main__":
    typer.run(main)
