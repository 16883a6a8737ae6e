"""A folder's config.json and the JSON files beside it, before and while an engine reads them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen3next_plugin.config import reading
from qwen3next_plugin.config.errors import ConfigError
from qwen3next_plugin.config.fields import QUANTISATIONS, check_file
from qwen3next_plugin.config.json_files import read_object
from qwen3next_plugin.config.kinds import config_kinds

CONFIG = "config.json"
BESIDE = (  # that only engines read
    *("generation_config.json", "tokenizer_config.json", "chat_template.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
)
ARCHITECTURES = ("Qwen3Next", "Qwen3_5")  # the names of the family's begin so


def read_config(path: str | Path) -> dict[str, Any]:
    """The dict of a checkpoint folder's config.json; raises ConfigError.

    The types of its fields are checked if it is of the family.
    """
    file = Path(path) / CONFIG
    check_name(path)
    if not Path(path).is_dir():
        raise ConfigError(f"{path} is not a folder; give a local checkpoint folder, not a hub name")
    if not file.is_file():
        raise ConfigError(f"{file} is missing; give the folder that holds config.json")
    raw = read_object(file, ConfigError)
    if is_of_family(raw):
        try:
            check_file(raw)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
    return raw


def quantization_of(folder: Path) -> Mapping[str, Any] | None:
    """The quantization_config of a checkpoint, if it has one."""
    raw = read_config(folder)
    levels = (raw, raw.get("text_config") or {})
    found = (level.get(name) for level in levels for name in QUANTISATIONS)
    return next(filter(None, found), None)


def check_name(path: str | Path) -> None:
    """Refuse a path that safetensors cannot open; raises ConfigError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{str(path)!a}: the path is not UTF-8, and safetensors opens no such files; "
            f"rename the folder"
        ) from None


def is_of_family(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the family, as far as a damaged one says."""
    architectures = str(raw.get("architectures"))
    names = (*ARCHITECTURES, *(kind.architectures for kind in config_kinds()))
    named = any(name in architectures for name in names)
    return named or raw.get("model_type") in tuple(reading.model_types())


def check_before_engine(model: str | Path) -> None:
    """Refuse what is no file, and damaged JSON files, before an engine reads a local checkpoint.

    Raises:
        ConfigError: names the file, the field and the fix.
    """
    folder = Path(model)
    pipes = [path for path in folder.glob("*") if path.exists() and not _is_file_or_folder(path)]
    if (folder / CONFIG) in pipes:
        raise _no_file(folder / CONFIG)
    if (folder / CONFIG).is_file() and is_of_family(read_config(folder)):
        for path in pipes:
            raise _no_file(path)
        for name in BESIDE:
            if (folder / name).is_file():
                read_object(folder / name, ConfigError)


def _is_file_or_folder(path: Path) -> bool:
    return path.is_file() or path.is_dir()


def _no_file(path: Path) -> ConfigError:
    return ConfigError(f"{path} is no file, and whoever reads it may wait for ever; remove it")


def check_kind(folder: Path, override_flag: str) -> None:
    """Refuse a config.json that mixes two kinds of models, or lacks part of its RoPE.

    Reads the file itself: a host's config class drops fields of other kinds, and fills in a default
    RoPE that no model was trained with. Raises ConfigError.
    """
    if (folder / CONFIG).is_file():
        reading.check_kind(read_config(folder), override_flag)


@contextmanager
def naming_file(model: str | Path, engine: str, override_flag: str) -> Iterator[None]:
    """Make an error of an engine's reader a ConfigError that names the file and the fix.

    The engine checks fields that we do not read. Errors about other models pass.
    """
    try:
        yield
    except (ConfigError, OSError):
        raise
    except Exception as error:
        file = Path(model) / CONFIG
        if not file.is_file() or not is_of_family(read_config(model)):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise ConfigError(
            f"{file}: {engine} cannot read it ({said}); fetch it again, or correct {override_flag}"
        ) from error
