"""A fingerprint follows every byte of a checkpoint's files, which are read once."""

import os
import shutil
from pathlib import Path
from threading import Event, Thread

import pytest

from checkpoints import SHIPPED, write_checkpoint
from damage import SLIGHT, slightly_changed
from qwen3next_plugin.kept import kept, one_at_a_time
from qwen3next_plugin.model.checkpoint import fingerprint as module
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.fingerprint import KEPT, fingerprint, hashes

MODEL = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """As in a process that has started just now, of a user who has nothing kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module, "SETTLED", 0)
    return tmp_path / "cache" / "qwen3next_plugin"


@pytest.fixture
def model(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "model")


def read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """What a new process of this user finds, and which files it reads."""
    files: list[str] = []
    hash_one = module._hash
    with monkeypatch.context() as patch:
        patch.setattr(module, "_known", {})
        patch.setattr(module, "_hash", lambda *a: files.append(Path(a[1]).name) or hash_one(*a))
        return fingerprint(folder, print), files


@pytest.mark.parametrize("what", SLIGHT)
def test_one_tensor_is_another(model, tmp_path, what):
    """Also of a file that samples of 4 KiB would not cover."""
    for folder in (model, SHIPPED):
        found = slightly_changed(folder, tmp_path / folder.name / what, what)
        assert fingerprint(found, print) != fingerprint(folder, print)


def test_a_fingerprint_is_of_names_and_contents(model, tmp_path):
    before = fingerprint(model, print)
    copied = Path(shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copyfile))
    assert fingerprint(copied, print) == before
    link = tmp_path / "link"
    link.mkdir()
    (link / MODEL).symlink_to(model / MODEL)  # as a hub's folder has them
    assert fingerprint(link, print) == before
    (link / MODEL).rename(link / f"other-{MODEL}")
    assert fingerprint(link, print) != before
    with pytest.raises(CheckpointError, match="no safetensors files"):
        fingerprint(tmp_path, print)


def test_files_are_read_again_only_when_they_were_written(model, monkeypatch):
    before = read(model, monkeypatch)
    assert before[1] == [MODEL]
    (model / "config.json").touch()
    assert read(model, monkeypatch) == (before[0], [])
    times = (model / MODEL).stat()
    os.utime(model / MODEL)
    assert read(model, monkeypatch) == before
    data = bytearray((model / MODEL).read_bytes())
    data[-1] ^= 1
    (model / MODEL).write_bytes(data)
    os.utime(model / MODEL, ns=(times.st_atime_ns, times.st_mtime_ns))  # with its time put back
    after = read(model, monkeypatch)
    assert (after[0] != before[0], after[1]) == (True, [MODEL])


def test_hashes_are_those_of_sha256sum(model):
    of = hashes([model / MODEL], print)[MODEL]
    assert of == module.sha256((model / MODEL).read_bytes()).hexdigest()


def test_a_file_that_was_just_written_is_read_again(model, monkeypatch):
    """Its next write may leave it with the same time."""
    monkeypatch.setattr(module, "SETTLED", 10**18)
    assert read(model, monkeypatch)[1] == read(model, monkeypatch)[1] == [MODEL]


def test_what_is_kept_is_the_users_own(model, cache, monkeypatch):
    read(model, monkeypatch)
    file = cache / f"{KEPT}.json"
    assert (file.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o600, 0o700)
    file.chmod(0o622)  # others may have written to it
    assert read(model, monkeypatch)[1] == [MODEL]
    assert file.stat().st_mode & 0o777 == 0o600
    for damage in ("", "[]", "{", '{"a": 1}', file.read_text().replace("[[", "[[[")):
        file.write_text(damage)
        assert read(model, monkeypatch)[1] == [MODEL]
    shutil.rmtree(model)
    read(SHIPPED, monkeypatch)
    assert [Path(name).parent for name in kept(KEPT)] == [SHIPPED]  # files that have gone have not


def test_where_nothing_can_be_kept(model, cache, monkeypatch):
    cache.parent.write_text("")
    assert read(model, monkeypatch) == read(model, monkeypatch)


def test_the_ranks_of_a_server_hash_once(model, monkeypatch):
    """Each is a process that asks for the same."""
    waits, said = Event(), []

    def say(line: str) -> None:
        said.append(line)
        waits.set()

    with one_at_a_time(KEPT, print):
        thread = Thread(target=lambda: said.append(fingerprint(model, say)))
        thread.start()
        assert waits.wait(30)
        assert said == ["waiting for another process that hashes weights"]
    thread.join(30)
    assert said[-1] == fingerprint(model, print)


def test_a_file_that_is_written_meanwhile_is_named(model, monkeypatch):
    monkeypatch.setattr(module.progress, "advance", lambda n: os.utime(model / MODEL, (1, 1)))
    with pytest.raises(CheckpointError, match=f"{MODEL} was written while it was read"):
        fingerprint(model, print)


def test_an_interrupt_ends_it(model, monkeypatch):
    """And leaves no hash of a part."""
    monkeypatch.setattr(module, "PIECE", 4096)

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.progress, "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fingerprint(model, print)
    assert not module._known


def test_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / MODEL)
    with pytest.raises(CheckpointError, match=f"{MODEL} is no file"):
        fingerprint(tmp_path, print)
