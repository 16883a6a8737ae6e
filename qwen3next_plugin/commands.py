"""Commands of `qwen3next`. Extras declare them: `COMMANDS` in the `commands.py` of their folder."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from qwen3next_plugin.engines.extras import FOLDER, PACKAGE


@dataclass(frozen=True, slots=True)
class Command:
    """A command by the name of its function, whose parameters typer reads."""

    run: Callable[..., None]
    epilog: str  # of its help: an example

    @property
    def name(self) -> str:
        return self.run.__name__


def commands() -> list[Command]:
    """Those of all extras, by name."""
    names = (path.parent.name for path in FOLDER.glob("*/commands.py"))
    modules = [import_module(f"{PACKAGE}.{name}.commands") for name in names]
    found = [command for module in modules for command in module.COMMANDS]
    return sorted(found, key=lambda command: command.name)
