"""`qwen3next warmup`: compile a model's Triton kernels ahead, on a machine without the GPU."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen3next_plugin import env
from qwen3next_plugin.config import (
    ConfigError,
    Qwen3NextConfig,
    check_num_speculative_tokens,
    read_config,
)
from qwen3next_plugin.engines.plan import StateDtype
from qwen3next_plugin.model.checkpoint.sizes import served_dtype

if TYPE_CHECKING:
    from qwen3next_plugin.extras.command_line.launches import Launches

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def warmup(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder; config.json is enough.")],
    arch: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(ARCHITECTURES)}; may be repeated. Default: all."),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(help="MTP draft length, 1 to 8; by default no drafts.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Activations and weights; auto: the checkpoint's."),
    ] = "auto",
    state_dtype: Annotated[
        StateDtype,
        typer.Option(help="The recurrent state; as --mamba-ssm-cache-dtype."),
    ] = "float32",
) -> None:
    """Compile the Triton kernels of a model into Triton's cache; needs no GPU.

    An engine compiles the same kernels when it starts. This command fills images and shared
    caches: set TRITON_CACHE_DIR, run it with the engine's Triton, and ship the folder.
    """
    env.check()
    if num_speculative_tokens is not None:
        check_num_speculative_tokens(num_speculative_tokens)
    for name in arch or ():
        if name not in ARCHITECTURES:
            raise ConfigError(f"--arch {name}: use one of {', '.join(ARCHITECTURES)}")
    raw = read_config(model)
    config = Qwen3NextConfig.from_hf(raw, tp_size=tp)
    import torch

    from qwen3next_plugin.extras.command_line.launches import Launches

    launches = Launches(
        config,
        getattr(torch, served_dtype(raw) if dtype == "auto" else dtype),
        getattr(torch, state_dtype),
        num_speculative_tokens or 0,
        torch.device("cpu"),
    )
    _compile(arch or ARCHITECTURES, launches)


def _compile(architectures: Iterable[str], launches: "Launches") -> None:
    import triton
    from rich.console import Console

    from qwen3next_plugin.kernels.gpu.compiling import compiling_for

    console = Console()
    for arch in architectures:
        begin = time.perf_counter()
        with console.status(f"{arch}: compiling"), compiling_for(arch) as kernels:
            launches.run()
        names = sorted({kernel.name for kernel in kernels})
        seconds = time.perf_counter() - begin
        console.print(f"{arch}: {', '.join(names)}, {seconds:.1f} s", highlight=False)
    console.print(
        f"Triton {triton.__version__} has them in {triton.knobs.cache.dir}", highlight=False
    )
