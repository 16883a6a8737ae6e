"""`qwen3next pack`: a checkpoint in the kernels' own layout, which loads as fast as it is read."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError, read_config
from qwen3next_plugin.model.checkpoint.sizes import served_dtype
from qwen3next_plugin.model.checkpoint.units import readable


def pack(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: a new or an empty one.")],
    quantise: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(help="Of a plain checkpoint; a quantised one keeps its formats."),
    ] = None,
) -> None:
    """Write a checkpoint as the CPU kernels read it: an engine that serves it packs nothing.

    It gives the same bits as MODEL (with --quantise, as MODEL with QWEN3NEXT_QUANTISE), on any CPU
    and any number of tensor-parallel ranks. It takes the memory of one weight, and as much disk as
    the server takes memory for its weights. OUT is there once it is complete.
    """
    env.check()
    dtype = served_dtype(read_config(model))
    import torch

    from qwen3next_plugin.extras.pack.writing import plan_packing, write_packed

    torch.set_num_threads(1)  # of an op; experts are packed side by side
    planned = plan_packing(model, quantise, getattr(torch, dtype))
    if note := planned.source.formats.described():
        typer.echo(note)
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        *(TextColumn("packing"), BarColumn(), DownloadColumn(binary_units=True)),
        *(TransferSpeedColumn(), TimeRemainingColumn()),
    )
    progress = Progress(*columns, transient=True)
    task = progress.add_task("", total=planned.nbytes, start=False)

    def wrote(count: int) -> None:
        progress.start()  # not before: hashing has a bar of its own
        progress.start_task(task)
        progress.advance(task, count)

    try:
        write_packed(planned, out, wrote, partial(typer.echo, err=True))
    except OSError as error:
        raise ConfigError(f"packing into {out} failed: {error}") from error
    finally:
        progress.stop()
    served = f"QWEN3NEXT_MMAP=1 vllm serve {shlex.quote(str(out))}"
    typer.echo(f"{out}: {readable(planned.nbytes)}. Serve it from its files:\n{served}")
