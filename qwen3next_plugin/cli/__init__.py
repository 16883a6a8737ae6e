"""The `qwen3next` command: what runs here (`doctor`) and what fits (`plan`)."""

import typer

from qwen3next_plugin.cli.doctor import doctor
from qwen3next_plugin.cli.plan import plan

app = typer.Typer(
    name="qwen3next",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    add_completion=False,
    help="Serve the Qwen3-Next family: check the machine, then plan the memory, then serve.",
    epilog=(
        "First [bold]qwen3next doctor[/], then"
        " [bold]qwen3next plan MODEL --max-model-len 32768 --max-num-seqs 8[/],"
        " then [bold]vllm serve MODEL[/] with the same flags."
    ),
)
app.command(
    epilog="Example: [bold]qwen3next doctor --json[/]. Exit status 1 if anything is broken.",
)(doctor)
app.command(
    epilog=(
        "Example: [bold]qwen3next plan ./Qwen3-Next-80B-A3B-Instruct --tp 4 --memory 80"
        " --max-model-len 32768 --max-num-seqs 64 --num-speculative-tokens 3[/]."
        " A folder with config.json alone will do: plan before you download."
    ),
)(plan)
