"""The files of a prefix cache in a folder."""

from collections.abc import Callable
from pathlib import Path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def settled(folder: Path) -> Callable[[], bool]:
    """Whether files have been written, and no more since the last call."""
    seen: list[list[Path]] = [[]]

    def same() -> bool:
        before, seen[0] = seen[0], files(folder)
        return bool(before) and before == seen[0] and not list(folder.rglob("*.part"))

    return same


def damage(folder: Path) -> None:
    """Cut files short, change a byte or all, or put another's content in, in turn."""
    whole = sorted(files(folder))
    contents = [path.read_bytes() for path in whole]
    for i, (path, data) in enumerate(zip(whole, contents, strict=True)):
        short, foreign, zeros = data[:-9], contents[i - 1], bytes(len(data))
        path.write_bytes([short, foreign, zeros, data[:99] + b"!" + data[100:]][i % 4])
