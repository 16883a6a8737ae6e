"""A hub's folder of downloads with one model."""

from pathlib import Path

MODEL = "an/id"


def downloaded(checkpoint: Path, downloads: Path) -> str:
    """The folder, in which MODEL is a checkpoint's folder."""
    model = downloads / "models--an--id"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text("0" * 40)
    (model / "snapshots").mkdir()
    (model / "snapshots" / ("0" * 40)).symlink_to(checkpoint)
    return str(downloads)
