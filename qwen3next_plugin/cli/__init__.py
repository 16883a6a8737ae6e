"""The `qwen3next` command. What it can do is declared by extras (`commands.py`)."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from qwen3next_plugin.commands import Command, commands
from qwen3next_plugin.engines.extras import FOLDER


class NoCommandsError(RuntimeError):
    """No extra is there that has a command."""


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

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Typer's, but a command that no extra has is refused with those that there are."""
        if not get_close_matches(args[0], self.commands):  # typer suggests these
            ctx.fail(f"No such command {args[0]!r}: {_there_are(self.commands)}")
        return super().resolve_command(ctx, args)


def _complain(error: Exception) -> NoReturn:
    typer.secho(f"qwen3next: {error}", fg="red", err=True)
    raise typer.Exit(1) from error


def _there_are(names: Iterable[str]) -> str:
    known = ", ".join(names)
    return f"the extras here have {known}" if known else f"no extra in {FOLDER} has commands"


def make_app(found: Sequence[Command]) -> typer.Typer:
    """The program that has these commands."""
    made = typer.Typer(
        name="qwen3next",
        cls=_Commands,
        no_args_is_help=bool(found),
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

    @made.callback(invoke_without_command=not found)
    def before_a_command() -> None:  # with it, typer keeps the name of a single command
        if not found:
            raise NoCommandsError(_there_are(()))

    for command in found:
        made.command(epilog=command.epilog)(command.run)
    return made


app = make_app(commands())
