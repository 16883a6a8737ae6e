"""The `qwen3next` command: what runs here, what fits, packing, GPU kernels, a server's drafts."""

from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from qwen3next_plugin.cli import doctor, pack, plan, warmup, watch


class _Commands(TyperGroup):
    """Prints this package's errors, and those of files, as one line; others are bugs."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, RuntimeError) as error:
            if not type(error).__module__.startswith("qwen3next_plugin."):
                raise
            _complain(error)
        except OSError as error:
            if error.filename is None:
                raise
            _complain(error)


def _complain(error: Exception) -> NoReturn:
    typer.secho(f"qwen3next: {error}", fg="red", err=True)
    raise typer.Exit(1) from error


app = typer.Typer(
    name="qwen3next",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="Serve the Qwen3-Next family: check the machine, plan the memory, then serve.",
    epilog=(
        "First [bold]qwen3next doctor[/], then"
        " [bold]qwen3next plan MODEL --max-model-len 32768 --max-num-seqs 8[/],"
        " then [bold]vllm serve MODEL[/] with the same flags,"
        " or [bold]sglang serve --model-path MODEL[/]."
    ),
)
app.command(
    epilog="Example: [bold]qwen3next doctor --json[/]. Exit status 1 if anything is broken.",
)(doctor.doctor)
app.command(
    epilog=(
        "Example: [bold]qwen3next plan ./Qwen3-Next-80B-A3B-Instruct --tp 4 --memory 80"
        " --max-model-len 32768 --max-num-seqs 64 --num-speculative-tokens 3[/]."
        " A folder with only config.json is enough: plan before you download."
        " Exit status 1 if no request fits."
    ),
)(plan.plan)
app.command(
    epilog=(
        "Example: [bold]qwen3next pack ./Qwen3.6-35B-A3B ./packed --quantise int4[/], then"
        " [bold]vllm serve ./packed[/] or [bold]sglang serve --model-path ./packed[/]. With"
        " QWEN3NEXT_MMAP=1 the weights stay in the files, which servers share and Linux pages."
    ),
)(pack.pack)
app.command(
    epilog=(
        "Example: [bold]TRITON_CACHE_DIR=cache qwen3next warmup ./Qwen3-Next-80B-A3B-Instruct"
        " --arch sm_90 --tp 4 --num-speculative-tokens 3[/]."
    ),
)(warmup.warmup)
app.command(
    epilog=(
        "Example: [bold]qwen3next watch http://localhost:8000[/]. vLLM needs no flag but MTP's own"
        " --speculative-config, SGLang --enable-metrics with NEXTN. Exit status 1 if the server has"
        " no such metrics, or goes away."
    ),
)(watch.watch)
