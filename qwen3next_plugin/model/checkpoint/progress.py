"""Progress of loading or hashing: a bar on a terminal, a line every few seconds in a log.

A process shows one at a time. Without `begin`, the other functions do nothing.
"""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shutil import get_terminal_size

import torch.distributed
from tqdm import tqdm

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.files import stored_tensors
from qwen3next_plugin.model.checkpoint.layouts import our_name
from qwen3next_plugin.model.checkpoint.tensors import MTP
from qwen3next_plugin.model.checkpoint.units import readable

REFRESHED, EVERY = 1.0, 10.0  # seconds between updates of the bar, and between lines
Say = Callable[[str], object]
Total = Callable[[], int | None]


class _Loading:
    """Counts bytes, and shows them from a thread of its own."""

    def __init__(self, total: Total, say: Say, what: str) -> None:
        self._find_total, self.say = total, say
        self.what, self._done = what, 0
        self._total: int | None = None
        self._began, self._ended = time.monotonic(), threading.Event()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            columns, lines = get_terminal_size()  # tqdm draws nothing if the size is unknown
            self._bar = tqdm(
                desc=self.what,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                smoothing=0,  # the mean rate: layers differ
                leave=False,
                ncols=columns,
                nrows=lines,
            )
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def advance(self, nbytes: int) -> None:
        self._done += nbytes

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def summary(self) -> str:
        """The bytes so far, and the time they took."""
        seconds = time.monotonic() - self._began
        return f"{readable(self._done)} of weights in {seconds:.1f} s"

    def _show(self) -> None:
        while not self._ended.wait(EVERY if self._bar is None else REFRESHED):
            if self._done and self._total is None:  # the files are there by now
                with suppress(CheckpointError):  # loading itself says what is wrong
                    self._total = self._find_total()
            if self._bar is None:
                self.say(self._line())
                continue
            self._bar.total, self._bar.n = self._total, self._done
            self._bar.set_description(self.what)  # draws

    def _line(self) -> str:
        done, rate = self._done, self._done / (time.monotonic() - self._began)
        if not done:
            return self.what
        of = f" of {readable(self._total)}" if self._total else ""
        left = f", {(self._total - done) / rate:.0f} s left" if self._total else ""
        return f"{self.what}: {readable(done)}{of}, {rate / 2**20:.0f} MiB/s{left}"


_loading: _Loading | None = None


def begin(total: Total, say: Say, what: str = "building the model") -> None:
    """Show how far loading is, on the first rank.

    Args:
        total: the bytes that will be counted, if they are known. Called in a thread of its own,
            when there is something to show: it reads the headers of all files.
        say: takes a line of the log.
        what: the activity to show first.
    """
    global _loading
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        cancel()
        _loading = _Loading(total, say, what)


def is_shown() -> bool:
    """Whether there is a bar."""
    return _loading is not None


def describe(what: str) -> None:
    """Name what is done now."""
    if _loading is not None:
        _loading.what = what


def advance(nbytes: int) -> None:
    """Count bytes that are loaded."""
    if _loading is not None:
        _loading.advance(nbytes)


def finish(done: str = "loaded") -> None:
    """Remove the bar, and leave one line in the log that says what is done."""
    if (finished := _loading) is not None:
        cancel()
        finished.say(f"{done} {finished.summary()}")


def cancel() -> None:
    """Remove the bar without a line."""
    global _loading
    if _loading is not None:
        _loading.close()
        _loading = None


def stored_bytes(
    folder: Path | None, config: Qwen3NextConfig, *, trunk: bool, mtp: bool
) -> int | None:
    """Bytes of a checkpoint's tensors that are counted: of trunk, MTP layer or both.

    None: it is not known where its files are.
    """
    if folder is None:
        return None
    found = 0
    for original, tensor in stored_tensors(folder):
        if (name := our_name(original, config)) is not None:
            found += tensor.nbytes * (mtp if name.startswith(MTP) else trunk)
    return found
