"""Blocks in a folder's files: what was written is read, or nothing; the oldest give way."""

import errno
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest

from engines.faults import STATES, where
from needs import needs
from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.extras.fleet import block_files
from qwen3next_plugin.extras.fleet.block_files import (
    CUT,
    EVERY,
    HEADER,
    PART_SECONDS,
    SPACE,
    BlockFiles,
    check_settings,
    least_limit,
    pieces,
    writer,
)

SPACES = f"{SPACE}weights/model", f"{SPACE}other/model"
SIZE = 1000
CONTENT = memoryview(bytes(i * 7 % 256 for i in range(SIZE)))
FILE = HEADER.size + SIZE  # bytes
# Of tokens with all before them, as an engine names them.
KEYS = [sha256(str(i).encode()).hexdigest() for i in range(20 * EVERY)]
CUTS = [i for i, key in enumerate(KEYS, 1) if key.startswith(CUT)]


@pytest.fixture
def files(tmp_path: Path) -> BlockFiles:
    return BlockFiles(tmp_path, 10 * FILE)


def read(files: BlockFiles, name: str, nbytes: int = SIZE) -> bytes | None:
    content = bytearray(nbytes)
    return bytes(content) if files.read(name, memoryview(content)) else None


def names(files: BlockFiles) -> list[str]:
    return sorted(path.name for path in files.folder.rglob("*") if path.is_file())


def test_writing_gives_way_to_all_else():
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    with writer() as pool:
        assert pool.submit(os.getpriority, os.PRIO_PROCESS, 0).result() == 19
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine < 19


def test_what_is_written_is_read_by_another_server_and_after_a_start(files, tmp_path):
    name = f"{SPACES[0]}/a"
    others = BlockFiles(tmp_path, 10 * FILE)
    assert read(others, name) is None
    files.write(name, CONTENT)
    for each in (files, others, BlockFiles(tmp_path, 10 * FILE)):
        assert each.holds(name, SIZE)
        assert read(each, name) == CONTENT
    assert names(files) == ["a"]


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    match kind:
        case "cut short":
            path.write_bytes(data[:-1])
        case "header only":
            path.write_bytes(data[: HEADER.size])
        case "empty":
            path.write_bytes(b"")
        case "longer":
            path.write_bytes(data + b"\0")
        case "one bit":
            path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        case "zeros, as after a loss of power":
            path.write_bytes(bytes(len(data)))
        case "foreign":
            path.write_bytes(os.urandom(len(data)))
        case "of another name":
            path.write_bytes((path.parent / "b").read_bytes())
        case "of other weights":
            path.write_bytes((path.parents[2] / SPACES[1] / "a").read_bytes())


@pytest.mark.parametrize(
    "kind",
    [
        *("cut short", "header only", "empty", "longer", "one bit", "foreign", "of another name"),
        *("zeros, as after a loss of power", "of other weights"),
    ],
)
def test_a_damaged_or_foreign_file_is_a_miss_and_is_written_again(files, kind):
    name = f"{SPACES[0]}/a"
    for each in (name, f"{SPACES[0]}/b", f"{SPACES[1]}/a"):
        files.write(each, CONTENT)
    damage(files.folder / name, kind)
    assert read(files, name) is None
    assert not (files.folder / name).exists()
    files.write(name, CONTENT)
    assert read(files, name) == CONTENT


def modes(folder: Path) -> dict[bool, set[int]]:
    """Of all folders in it, and of all files."""
    found = {True: set(), False: set()}
    for path in folder.rglob("*"):
        found[path.is_dir()].add(path.stat().st_mode & 0o777)
    return found


@pytest.mark.parametrize("umask", [0, 0o22, 0o277, 0o777], ids=oct)
def test_only_this_user_reads_what_clients_wrote(files, umask):
    before = os.umask(umask)
    try:
        files.write(f"{SPACES[0]}/a", CONTENT)
    finally:
        os.umask(before)
    assert modes(files.folder) == {True: {0o700}, False: {0o600}}
    assert read(files, f"{SPACES[0]}/a") == CONTENT


def test_what_others_may_have_written_is_a_miss(files):
    """Its checksum is right: everybody can compute one."""
    name = f"{SPACES[0]}/a"
    for mode in (0o660, 0o606):
        files.write(name, CONTENT)
        (files.folder / name).chmod(mode)
        assert read(files, name) is None
        assert not (files.folder / name).exists()
    files.write(name, CONTENT)
    if os.geteuid() == 0:
        os.chown(files.folder / name, 12345, -1)
        assert read(files, name) is None


def test_a_folder_is_closed_to_others_at_start(files):
    """Files of an earlier release are open; where others can write there, they are told from ours.

    There, nothing is changed: what has our names may be links of theirs.
    """
    warnings: list[str] = []
    settings = {"folder": str(files.folder), "folder_bytes": 1}

    def check() -> None:
        check_settings(settings, ["folder_bytes"], "FIELD", warnings.append)

    files.write(f"{SPACES[0]}/a", CONTENT)
    opened = (files.folder / SPACES[0] / "a", files.folder / SPACES[0], files.folder)
    for mode, warned in ((0o755, False), (0o775, True), (0o1777, True), (0o700, False)):
        for path in opened[:2]:
            path.chmod(0o755)
        files.folder.chmod(mode)
        check()
        assert bool(warnings) == warned
        assert modes(files.folder)[False] == ({0o755} if warned else {0o600})
        if warned:
            path = files.folder
            assert f"others can write to {path}, " in warnings[0]
            assert warnings.pop().endswith(f"chown {os.geteuid()} {path} && chmod 700 {path}")
    (files.folder / "mine.txt").touch(0o644)
    check()
    assert (files.folder / "mine.txt").stat().st_mode & 0o777 == 0o644


def test_a_disk_that_lets_everybody_write_is_refused(tmp_path, monkeypatch):
    """A FAT disk has modes of its own; over NFS the files of root may be another's."""
    monkeypatch.setattr(block_files, "is_own", lambda found: False)
    with pytest.raises(ConfigError, match=r"its disk lets others write .* name another in FIELD"):
        check_settings({"folder": str(tmp_path)}, [], "FIELD", print)


def test_another_size_is_a_miss(files):
    name = f"{SPACES[0]}/a"
    files.write(name, CONTENT)
    assert not files.holds(name, SIZE + 1)
    assert read(files, name, SIZE + 1) is None


def test_a_folder_in_a_files_place_is_a_miss(files):
    name = f"{SPACES[0]}/a"
    (files.folder / name).mkdir(parents=True)
    assert read(files, name) is None
    with pytest.raises(OSError, match="a"):
        files.write(name, CONTENT)
    assert names(files) == []  # nothing half written


def held(files: BlockFiles) -> int:
    return sum(path.stat().st_size for path in files.folder.glob(f"{SPACE}*/*/*"))


def test_the_least_recently_used_are_removed_of_whatever_weights(files):
    (files.folder / "mine.txt").write_bytes(bytes(5 * FILE))
    every = [f"{SPACES[i % 2]}/{i}" for i in range(8)]
    for age, name in enumerate(every):
        files.write(name, CONTENT)
        os.utime(files.folder / name, (age, age))
    assert read(files, every[0]) == CONTENT  # the last now
    for i in range(4):
        files.write(f"{SPACES[0]}/new-{i}", CONTENT)
    assert {name for name in every if files.holds(name, SIZE)} == {every[0], *every[5:]}
    assert all(files.holds(f"{SPACES[0]}/new-{i}", SIZE) for i in range(4))
    assert (files.folder / "mine.txt").exists()


def test_two_servers_keep_to_the_limit_together(tmp_path):
    servers = [BlockFiles(tmp_path, 64 * FILE) for _ in range(2)]
    most = 0
    for i in range(300):
        servers[i % 2].write(f"{SPACES[0]}/{i}", CONTENT)
        most = max(most, held(servers[0]))
    assert 56 * FILE < most <= 72 * FILE  # beyond it by an eighth for each but one


def test_what_a_killed_server_left_half_written_goes_with_time(files, tmp_path):
    folder = tmp_path / SPACES[0]
    folder.mkdir(parents=True)
    for name, age in (("old.0.part", 2 * PART_SECONDS), ("new.1.part", 0)):
        (folder / name).write_bytes(b"1")
        os.utime(folder / name, (0, (folder / name).stat().st_mtime - age))
    assert names(BlockFiles(tmp_path, files.limit)) == ["new.1.part"]


@needs("mounts")
def test_what_cannot_be_removed_stays(tmp_path):
    """As another user's files: they are no reason not to start."""
    part = tmp_path / SPACES[0] / "old.0.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"1")
    os.utime(part, (0, 0))
    code = f"from pathlib import Path; from {BlockFiles.__module__} import BlockFiles as Files"
    code += f"; Files(Path({str(tmp_path)!r}), 1000)"
    command = where(str(tmp_path), "read-only, with its files", [sys.executable, "-c", code])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert part.exists()


@pytest.mark.parametrize("count", [1, 2, 6, 15])
def test_the_least_limit_keeps_the_newest(tmp_path, count):
    files = BlockFiles(tmp_path, least_limit(count, SIZE))
    for i in range(40):
        files.write(f"{SPACES[0]}/{i}", CONTENT)
        os.utime(tmp_path / SPACES[0] / f"{i}", (i, i))
        newest = [f"{SPACES[0]}/{n}" for n in range(max(0, i + 1 - count), i + 1)]
        assert all(files.holds(name, SIZE) for name in newest)


FILL = """
import errno, os, sys
from pathlib import Path
from qwen3next_plugin.extras.fleet.block_files import SPACE, BlockFiles
folder, content = Path(sys.argv[1]), memoryview(bytes(10_000))
files = BlockFiles(folder, 1 << 30)
for i in range(60):
    name = f"{SPACE}a/b/{i}"
    kept = {path.name for path in folder.rglob("*") if path.is_file()}
    try:
        files.write(name, content)
        os.utime(folder / name, (i, i))
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        break
assert kept == {str(n) for n in range(i)} and 10 < i < 59, kept
left = {path.name for path in folder.rglob("*") if path.is_file()}
assert left == {str(n) for n in range(8, i)}, left  # nothing half written, and eight gave way
assert all(files.read(f"{SPACE}a/b/{n}", memoryview(bytearray(10_000))) for n in range(8, i))
for n in range(100, 105):
    files.write(f"{SPACE}a/b/{n}", content)
"""


@needs("mounts")
def test_on_a_full_disk_the_oldest_give_way(tmp_path):
    assert "size=256k" in STATES["nearly full"]
    assert shutil.which("unshare")
    command = where(str(tmp_path), "nearly full", [sys.executable, "-c", FILL, str(tmp_path)])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", [(os, "open"), (Path, "mkdir")], ids=["open", "mkdir"])
def test_a_full_quota_makes_the_oldest_give_way(monkeypatch, tmp_path, where):
    """Also where a new subfolder does not fit."""
    files = BlockFiles(tmp_path, 1 << 30)
    content = memoryview(bytes(10_000))
    for name in ("a", "b"):
        files.write(f"{SPACE}x/y/{name}", content)
        os.utime(tmp_path / f"{SPACE}x" / "y" / name, (ord(name), ord(name)))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        with pytest.raises(OSError, match="quota"):
            files.write(f"{SPACE}x/z/c", content)
    assert not (tmp_path / f"{SPACE}x" / "y" / "a").exists()


def test_a_file_has_as_many_tokens_as_said():
    assert 0.7 * EVERY < len(KEYS) / len(CUTS) < 1.4 * EVERY


@pytest.mark.parametrize("end", [1, EVERY, CUTS[3] - 1, CUTS[3], CUTS[3] + 1, len(KEYS)])
def test_files_follow_each_other_and_all_but_the_last_are_those_of_a_longer_prefix(end):
    found = list(pieces(KEYS[:end]))
    assert (found[0][0], found[-1][1]) == (0, end)
    assert all(before[1] == after[0] for before, after in pairwise(found))
    assert found[:-1] == list(pieces(KEYS))[: len(found) - 1]


def test_files_of_shorter_prefixes_are_given_once():
    ends = (1, CUTS[1], CUTS[2] + 1, len(KEYS))
    apart = {piece for end in ends for piece in pieces(KEYS[:end])}
    together = list(pieces(KEYS, ends))
    assert (set(together), len(together)) == (apart, len(apart))


@pytest.mark.parametrize("begin", [1, CUTS[2] - 1, CUTS[2], CUTS[2] + 1])
def test_what_follows_a_part_ends_where_the_whole_does(begin):
    """Only the first file may begin before the part."""
    found = [end + begin for _, end in pieces(KEYS[begin:])]
    assert found == [end for _, end in pieces(KEYS) if end > begin]


def test_the_folder_is_made_where_its_parent_is(tmp_path):
    settings = {"folder": str(tmp_path / "prefixes"), "folder_bytes": 1 << 30}
    for _ in range(2):
        check_settings(settings, ("folder_bytes",), "somewhere", print)
    assert (tmp_path / "prefixes").stat().st_mode & 0o777 == 0o700
    settings["folder"] = str(tmp_path / "no" / "prefixes")
    with pytest.raises(ConfigError, match="no such folder; make it, or change somewhere"):
        check_settings(settings, ("folder_bytes",), "somewhere", print)
    assert not (tmp_path / "no").exists()
