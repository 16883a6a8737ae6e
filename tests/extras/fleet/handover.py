"""What both engines' hand-over tests check in the same way."""

import re
import urllib.error
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

import pytest

from checkpoints import SHIPPED
from damage import SLIGHT, slightly_changed
from engines.server import Server, closing


def differences(log: str) -> set[str]:
    """The names of the settings that a log says differ between the two servers."""
    found = re.search(r"Local: (?:\w+ )?\((.*?)\), Remote: (?:\w+ )?\((.*?)\)", log).groups()
    decoder, prefiller = ({*each.split(", ")} for each in found)
    return {fact.split("=")[0] for fact in decoder ^ prefiller}


def check_slight_changes_are_refused(
    folder: Path,
    prefiller: Callable[[Path], Server],
    decoder: Callable[[Path], Server],
    ask: Callable[[Server, Server], Any],
) -> None:
    """In the same folder: one server has started before its weights were replaced."""
    model = copytree(SHIPPED, folder / "model", copy_function=copyfile)
    with closing(prefiller(model)) as (first,):
        for change in SLIGHT:
            other = slightly_changed(SHIPPED, folder / change, change)
            (other / "model.safetensors").replace(model / "model.safetensors")
            with closing(decoder(model)) as (second,):
                with pytest.raises(urllib.error.HTTPError) as refusal:
                    ask(first, second)
                assert refusal.value.code == 500
                assert differences(second.process.text()) == {"weights"}
