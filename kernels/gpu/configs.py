"""Tile sizes and launch options by architecture. Fixed tables: nothing is tuned while serving."""

import functools
from dataclasses import dataclass

import torch

from qwen3next_plugin.kernels.step import GRID


@dataclass(frozen=True, slots=True)
class Launch:
    """Warps of a program, and pipeline stages of its loops' loads."""

    num_warps: int
    num_stages: int = 1

    def options(self) -> dict[str, int | bool]:
        launch = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return launch | {"enable_fp_fusion": True}  # Triton is changing its default


@dataclass(frozen=True, slots=True)
class Config:
    """The sizes of one architecture. `columns` are those of S in one program."""

    processors: int  # multiprocessors or compute units
    short_columns: int = 32
    short: Launch = Launch(4, 2)
    replay_stages: int = 8  # a window's tokens whose loads are in flight, and one more
    chunk: int = 64  # positions of a chunk
    prepare_tokens: int = 16
    prepare: Launch = Launch(4)
    matrices: Launch = Launch(4)
    scan_columns: int = 32
    scan: Launch = Launch(4, 2)
    segment: int = 1024  # positions of a segment of a row that is split; a multiple of chunk
    split_from: int = 4096  # tokens of a row that is split, at least
    transitions: Launch = Launch(4, 2)
    starts: Launch = Launch(8)
    commit: Launch = Launch(1)
    rowwise: Launch = Launch(4)  # norms and gates
    inverse_precision: str = "tf32"  # with 16-bit activations
    fp32_precision: str = "tf32x3"  # of all products with fp32 activations

    def __post_init__(self) -> None:
        """A row's last segment ends with its S, and no row shorter than a segment is split."""
        assert self.segment % self.chunk == self.segment % GRID == 0
        assert self.split_from >= self.segment

    def splits(self, HV: int, K: int, V: int) -> bool:
        """Whether to split long rows: only if unsplit ones would leave half the processors idle.

        Splitting more than doubles the work. With K > 128 a segment's product does not fit into
        shared memory.
        """
        return K <= 128 and 2 * -(-V // self.scan_columns) * HV <= self.processors


CONFIGS = {
    "sm_80": Config(108, chunk=32),
    "sm_90": Config(132),
    "sm_100": Config(148, replay_stages=6),  # with 8, fp16 spills
    # 64 KiB of shared memory: too little to pipeline loads of fp32 activations.
    "gfx942": Config(
        304,
        scan=Launch(4, 1),
        transitions=Launch(4, 1),
        inverse_precision="ieee",
        fp32_precision="ieee",
    ),
}
# sm_120 has little more shared memory than sm_80 gives a block, and less than sm_100.
MAJORS = {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_80"}


_compiled_for: str | None = None  # see `compiling_for`


def compile_for(arch: str | None) -> None:
    """Treat CPU tensors as tensors on `arch` from now on; None ends that."""
    global _compiled_for
    _compiled_for = arch


def compiles() -> bool:
    return _compiled_for is not None


def architecture(device: torch.device) -> str:
    """The architecture whose sizes a device uses.

    Raises: NotImplementedError if there are none for it.
    """
    if device.type == "cpu":
        return _compiled_for or "sm_90"  # Triton's interpreter takes any
    return _architecture_of(device)


@functools.cache
def _architecture_of(device: torch.device) -> str:
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        nearest = "gfx942" if name.startswith("gfx9") else None
    else:
        major, minor = torch.cuda.get_device_capability(device)
        name, nearest = f"sm_{major}{minor}", MAJORS.get(major)
    if nearest is None:
        raise NotImplementedError(
            f"the Triton kernels are built for {', '.join(CONFIGS)}, not for {name};"
            " QWEN3NEXT_KERNELS=reference runs anywhere, slowly"
        )
    return nearest


def config_for(device: torch.device) -> Config:
    return CONFIGS[architecture(device)]
