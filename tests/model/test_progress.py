"""How far loading is: every byte of the checkpoint's files is counted once, and shown."""

import io
import os
import pty
import subprocess
import sys
from collections import deque
from contextlib import suppress

import pytest
import torch
from safetensors import safe_open

from checkpoints import write_checkpoint
from patience import ticks
from quantised import pack_checkpoint, write_quantised
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.model.checkpoint import progress
from qwen3next_plugin.model.checkpoint.reading import parameters
from qwen3next_plugin.model.checkpoint.tensors import mtp_tensors, trunk_tensors
from qwen3next_plugin.model.quantisation.files import formats_of

DOING = {
    "plain": "loading weights",
    "int4": "quantising to int4",
    "packed_4-bit": "loading weights",
    "in panels": "reading packed weights",
}


BAR = """
from qwen3next_plugin.model.checkpoint import progress
progress.REFRESHED = 0.01
progress.begin(lambda: 8 << 30, print)
progress.describe("quantising to int4")
progress.advance(2 << 30)
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def often(monkeypatch):
    """A bar that shows itself 100 times a second."""
    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr(progress, "REFRESHED", 0.01)
    yield
    progress.cancel()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return write_checkpoint(folder, mtp=True, dtype=torch.bfloat16, hidden_size=128)


@pytest.mark.parametrize("kind", DOING)
def test_every_byte_of_the_files_is_counted_once(plain, tmp_path, often, kind):
    folder = plain
    if kind == "in panels":
        folder = pack_checkpoint(plain, tmp_path / "out", "int8")
    elif kind.startswith("packed"):
        folder = write_quantised(plain, tmp_path, kind)[0]
    raw = read_config(folder)
    config = Qwen3NextConfig.from_hf(raw)
    asked = kind if kind == "int4" else None
    quantization = raw.get("quantization_config")
    formats = formats_of(folder, config, quantization, asked=asked) if kind != "plain" else None
    trunk, mtp, lines = trunk_tensors(config), mtp_tensors(config), []
    for expected, ignored, of in ((trunk, mtp, "trunk"), (mtp, trunk, "mtp")):
        which = {"trunk": of == "trunk", "mtp": of == "mtp"}
        wanted = progress.stored_bytes(folder, config, **which)
        progress.begin(lambda wanted=wanted: wanted, lines.append)
        tensors = parameters(
            stored(folder),
            config,
            expected=expected,
            ignored=ignored,
            formats=formats,
            attach=lambda name, weight: None,
        )
        next(tensors)
        assert progress._loading.what == ("MTP layer: " if of == "mtp" else "") + DOING[kind]
        deque(tensors, maxlen=0)
        assert wanted > 1000
        assert progress._loading._done == wanted
        until(lambda wanted=wanted: progress._loading._total == wanted)
        progress.finish()
        assert lines[-1].startswith(f"loaded {wanted / 2**20:.2f} MiB of weights in ")
    assert progress.stored_bytes(folder, config, trunk=True, mtp=True) == sum(
        tensor.nbytes for _, tensor in stored(folder)
    )


def stored(folder):
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it iterates no other way)
                yield name, file.get_tensor(name)


def test_a_log_gets_plain_lines(often, monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    progress.begin(lambda: 8 << 30, (lines := []).append)
    until(lambda: "building the model" in lines)
    progress.describe("loading weights")
    progress.advance(2 << 30)
    until(lambda: any("loading weights: 2.00 GiB of 8.00 GiB, " in line for line in lines))
    assert all(line.endswith(" s left") for line in lines if "of 8.00" in line)
    progress.finish()
    assert lines[-1].startswith("loaded 2.00 GiB of weights in ")
    assert not log.getvalue()


def test_a_terminal_gets_a_bar_that_is_removed(often, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress.begin(lambda: 8 << 30, (lines := []).append)
    progress.describe("loading weights")
    progress.advance(2 << 30)
    until(lambda: "\rloading weights:  25%|" in terminal.getvalue())
    assert "2.00G/8.00G [" in terminal.getvalue()
    assert not lines
    progress.finish()
    assert len(lines) == 1
    assert terminal.getvalue().endswith("\r")
    assert "\n" not in terminal.getvalue()


def test_a_terminal_without_a_size_gets_one_too():
    """As containers have it."""
    ours, theirs = pty.openpty()
    end = "import time; time.sleep(0.5); progress.finish()"
    child = subprocess.Popen([sys.executable, "-c", BAR + end], stderr=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # as Linux ends it
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert child.wait() == 0
    assert b"\rquantising to int4:  25%|" in shown


def test_a_size_that_is_not_known_is_left_out(often, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress.begin(lambda: None, (lines := []).append)
    progress.describe("loading weights")
    progress.advance(1 << 30)
    until(lambda: any(line.startswith("loading weights: 1.00 GiB, ") for line in lines))


def test_a_load_that_shows_nothing_does_not_ask_for_the_size(monkeypatch):
    """The headers of 92,000 tensors take 0.8 s to read."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    asked = []
    progress.begin(lambda: asked.append(1), (lines := []).append)
    progress.advance(1 << 30)
    progress.finish()
    assert not asked
    assert len(lines) == 1


def test_without_a_bar_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress.describe("loading weights")
    progress.advance(1)
    progress.finish()
    assert not progress.is_shown()
    assert not terminal.getvalue()


def until(true) -> None:
    assert any(true() for _ in ticks())
