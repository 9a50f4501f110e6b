"""The cache of a teacher's logits: what comes out is what went in, whatever happens to processes, disks and files."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from mdistill import files
from mdistill.engine import logit_cache
from mdistill.engine.logit_cache import Ids, LogitCache
from mdistill.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parents[2]
ENTRIES, CLASSES = 600, 10
IDENTITY = {"weights": "ab" * 32, "data": "cd" * 32, "device": "cpu", "precision": {"dtype": "float32", "tf32": False}}


def values(ids: Ids, classes: int = CLASSES, dtype: torch.dtype = torch.float16, salt: int = 0) -> torch.Tensor:
    """Logits that follow from the number of the entry."""
    return torch.from_numpy((ids[:, None] * 31 + np.arange(classes) * 7 + salt) % 1999 / 8 - 100).to(dtype)


def opened(root: Path, identity: dict[str, Any] = IDENTITY, **shape: Any) -> LogitCache:
    return LogitCache(root, identity, **{"entries": ENTRIES, "width": CLASSES, "dtype": torch.float16, **shape})


def fill(cache: LogitCache, ids: Ids, changed: bool = False) -> None:
    cache.write(ids, values(ids, cache.width, cache.dtype), np.full(len(ids), changed))


def filled(cache: LogitCache) -> list[int]:
    return np.flatnonzero(~cache.missing(np.arange(cache.entries))).tolist()


def assert_holds(cache: LogitCache, ids: Ids) -> None:
    assert filled(cache) == sorted(ids.tolist())
    assert cache.filled == len(ids)
    assert torch.equal(cache.read(ids), values(ids, cache.width, cache.dtype))


def scattered(count: int, entries: int = ENTRIES, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).permutation(entries)[:count].astype(np.int64)


def only_chunk(cache: LogitCache) -> Path:
    (path,) = cache.path.iterdir()
    return path


def forked(work: Callable[[], object]) -> int:
    """Starts a process that does ``work`` and no more; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- what comes out is what went in ---


@pytest.mark.parametrize("classes", [7, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_entries_come_back_in_any_order_and_after_reopening(dtype: torch.dtype, classes: int, tmp_path: Path) -> None:
    ids = scattered(400)
    logits = torch.randn(400, classes, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[0, :4] = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0])
    changed = np.arange(400) % 4 == 0
    cache = opened(tmp_path, width=classes, dtype=dtype)
    assert (cache.filled, cache.changed) == (0, 0.0)
    assert cache.missing(ids).all()
    cache.write(ids[:150], logits[:150], changed[:150])
    assert cache.missing(ids).tolist() == [False] * 150 + [True] * 250
    cache.write(ids[150:], logits[150:], changed[150:])
    for again in (cache, opened(tmp_path, width=classes, dtype=dtype)):
        assert (again.entries, again.width, again.dtype) == (ENTRIES, classes, dtype)
        assert (again.filled, again.changed) == (400, 0.25)
        assert filled(again) == sorted(ids.tolist())
        order = np.random.default_rng(2).integers(0, 400, 1000)
        read = again.read(ids[order])
        assert read.dtype == dtype
        assert torch.equal(read, logits[order])
        read.zero_()  # its own memory
        assert torch.equal(again.read(ids), logits)
        assert again.read(ids[:1]).shape == (1, classes)


def test_nothing_may_be_asked_of_no_entries(tmp_path: Path) -> None:
    none = np.empty(0, np.int64)
    cache = opened(tmp_path)
    for _ in range(2):
        fill(cache, none)
        assert cache.missing(none).shape == (0,)
        assert cache.read(none).shape == (0, CLASSES)
        assert len(list(cache.path.iterdir())) == cache.filled
        fill(cache, np.arange(1))


def test_an_entry_that_is_there_stays_and_of_doubles_the_first_counts(tmp_path: Path) -> None:
    ids = np.array([5, 3, 5, 3, 9])
    logits = torch.arange(5.0).repeat_interleave(CLASSES).view(5, CLASSES).half()
    cache = opened(tmp_path)
    cache.write(ids, logits, np.array([True, False, False, True, False]))
    cache.write(ids, logits + 10, np.ones(5, bool))
    assert only_chunk(cache)  # nothing was new
    cache.write(np.array([4, 5]), logits[:2] + 20, np.ones(2, bool))
    for again in (cache, opened(tmp_path)):
        assert set(again.read(np.array([3, 5, 9]))[:, 0].tolist()) == {0.0, 1.0, 4.0}
        assert again.filled == 4
        assert again.changed == 0.5


def test_of_chunks_that_share_entries_the_one_that_was_there_first_counts(tmp_path: Path) -> None:
    other, cache = opened(tmp_path), opened(tmp_path)
    fill(cache, np.arange(60), changed=True)
    both = np.arange(30, 90)
    other.write(both, values(both, salt=5), np.zeros(60, bool))  # it has not seen the first chunk
    cache.refresh()
    assert cache.filled == other.filled == 90
    assert cache.changed == pytest.approx(60 / 90)
    assert torch.equal(cache.read(np.arange(60)), values(np.arange(60)))
    assert torch.equal(cache.read(np.arange(60, 90)), values(np.arange(60, 90), salt=5))


def test_any_memory_layout_may_be_written(tmp_path: Path) -> None:
    ids = np.arange(40)[::2]
    cache = opened(tmp_path)
    cache.write(ids, values(ids).t().contiguous().t(), np.ones(40, bool)[::2])
    assert_holds(cache, ids)


def test_misuse_is_a_value_error(tmp_path: Path) -> None:
    ids, no = np.arange(3), np.zeros(3, bool)
    logits = values(ids)
    cache = opened(tmp_path)
    fill(cache, ids)
    with pytest.raises(ValueError, match=r"entry 7 of .* is missing"):
        cache.read(np.array([0, 7, 1]))
    for wrong in (logits[:2], logits[:, :-1], logits.float()):
        with pytest.raises(ValueError, match=r"logits are .*, not \(3, 10\)"):
            cache.write(ids, wrong, no)
    for bad in (np.array([0, ENTRIES]), np.array([-1, 0])):
        for use in (cache.read, cache.missing, lambda ids: fill(cache, ids)):
            with pytest.raises(ValueError, match="not all within 0 to 599"):
                use(bad)


def test_the_folder_follows_from_everything_that_fixes_the_numbers(tmp_path: Path) -> None:
    shapes = [{}, {"entries": ENTRIES + 1}, {"width": CLASSES + 1}, {"dtype": torch.float32}]
    caches = [opened(tmp_path, **shape) for shape in shapes] + [opened(tmp_path, {**IDENTITY, "device": "cuda"})]
    assert len({cache.path for cache in caches}) == len(caches)
    for cache in caches:
        fill(cache, np.arange(3))
        assert_holds(cache, np.arange(3))
    assert opened(tmp_path, dict(reversed(IDENTITY.items()))).path == caches[0].path
    assert opened(tmp_path, {"sizes": (1, 2)}).path == opened(tmp_path, {"sizes": [1, 2]}).path


def test_a_chunk_says_what_it_holds(tmp_path: Path) -> None:
    """To whoever opens it, with the library alone; whoever changes this must raise FORMAT."""
    cache = opened(tmp_path)
    fill(cache, np.array([9, 4]), changed=True)
    path = only_chunk(cache)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["identity"]) == {
            "format": 2,
            "entries": ENTRIES,
            "classes": CLASSES,
            "dtype": "float16",
            "identity": IDENTITY,
        }
        numbers = np.array([4, 9]).tobytes() + values(np.array([4, 9])).numpy().tobytes() + b"\x01\x01"
        assert file.metadata()["checksum"] == f"{zlib.crc32(numbers):08x}"
        assert file.get_tensor("entries").tolist() == [4, 9]
        assert torch.equal(file.get_tensor("logits"), values(np.array([4, 9])))
        assert file.get_tensor("changed").tolist() == [True, True]
    size = LogitCache.size(1000, 100, torch.float16)
    large = opened(tmp_path, entries=1000, width=100)
    fill(large, np.arange(1000))
    assert size <= only_chunk(large).stat().st_size < size + 1000


def test_chunks_of_others_are_opened_once_and_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def counted(path: Path, framework: str) -> Any:
        names.append(path.name)
        return safe_open(path, framework)

    monkeypatch.setattr(logit_cache, "safe_open", counted)
    cache, other = opened(tmp_path), opened(tmp_path)
    for ids in np.split(np.arange(50), 5):
        fill(other, ids)
    assert cache.missing(np.arange(50)).all()
    names.clear()
    cache.refresh()
    assert_holds(cache, np.arange(50))
    assert len(names) == 5
    cache.refresh()
    assert len(names) == 5


def test_reading_takes_the_memory_of_what_is_read_and_no_open_files(tmp_path: Path) -> None:
    def private_kilobytes() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1])

    cache = opened(tmp_path, entries=80_000, width=100, dtype=torch.float32)  # 32 MB
    for ids in np.split(np.arange(80_000), 20):
        fill(cache, ids)
    del cache
    open_files, before = len(os.listdir("/proc/self/fd")), private_kilobytes()
    cache = opened(tmp_path, entries=80_000, width=100, dtype=torch.float32)
    cache.read(np.arange(0, 80_000, 80))
    assert private_kilobytes() - before < 8_000
    assert len(os.listdir("/proc/self/fd")) == open_files


# --- files that are not what they should be ---


def chunk_of(ids: Any = (7, 8, 9), *, identity: str, **others: Any) -> bytes:
    """A chunk as the cache would write it, but for ``others``."""
    entries = torch.tensor(ids, dtype=torch.int64)
    chunk = {"entries": entries, "logits": values(entries.numpy()), "changed": torch.zeros(len(entries)).bool()}
    chunk |= {key: value for key, value in others.items() if key in chunk}
    metadata = {
        "identity": identity,
        "checksum": logit_cache._checksum({key: value.numpy() for key, value in chunk.items()}),
    } | others.get("metadata", {})
    return save({key: value for key, value in chunk.items() if key != others.get("without")}, metadata)


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


BAD: dict[str, Callable[[bytes, str], bytes]] = {
    "empty": lambda whole, identity: b"",
    "cut in its header": lambda whole, identity: whole[:40],
    "cut in its logits": lambda whole, identity: whole[:-20],
    "too long": lambda whole, identity: whole + b"more",
    "flipped in its entries": lambda whole, identity: whole.replace(b"\x07\0\0\0\0\0\0\0", b"\x06\0\0\0\0\0\0\0"),
    "flipped in a flag": lambda whole, identity: whole[:-1] + b"\x01",
    "another identity": lambda whole, identity: chunk_of(identity=identity.replace("ab", "ef")),
    "the first characters of the identity": lambda whole, identity: chunk_of(identity=identity[:-1]),
    "another checksum": lambda whole, identity: chunk_of(identity=identity, metadata={"checksum": "0"}),
    "no metadata": lambda whole, identity: save({"entries": torch.arange(3)}),
    "no logits": lambda whole, identity: chunk_of(identity=identity, without="logits"),
    "other logits": lambda whole, identity: chunk_of(identity=identity, logits=torch.zeros(3, CLASSES)),
    "fewer classes": lambda whole, identity: chunk_of(identity=identity, logits=torch.zeros(3, 4).half()),
    "fewer logits": lambda whole, identity: chunk_of(identity=identity, logits=torch.zeros(2, CLASSES).half()),
    "one logit": lambda whole, identity: chunk_of(identity=identity, logits=torch.tensor(0.0).half()),
    "flags that are numbers": lambda whole, identity: chunk_of(identity=identity, changed=torch.zeros(3).int()),
    "no entries": lambda whole, identity: chunk_of((), identity=identity),
    "an entry below 0": lambda whole, identity: chunk_of((-1, 8, 9), identity=identity),
    "an entry beyond the last": lambda whole, identity: chunk_of((7, 8, ENTRIES), identity=identity),
    "an entry twice": lambda whole, identity: chunk_of((7, 7, 9), identity=identity),
    "entries that descend": lambda whole, identity: chunk_of((7, 9, 8), identity=identity),
    "entries whose differences overflow": lambda whole, identity: chunk_of(
        (0, 2**63 - 1, -(2**63), -1, 5), identity=identity
    ),
    "no safetensors": lambda whole, identity: b"PK\x03\x04" + bytes(500),
    "a header that never ends": lambda whole, identity: (2**63).to_bytes(8, "little") + whole[8:],
    "a deep header": lambda whole, identity: header(b"[" * 100_000),
    "a deep object": lambda whole, identity: header(b'{"a":' * 50_000),
    "a header that is no text": lambda whole, identity: header(b"\xff\xfe\0"),
    "huge tensors": lambda whole, identity: header(
        b'{"entries":{"dtype":"I64","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_chunk_is_told_of_and_never_used(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = opened(tmp_path)
    fill(cache, np.arange(3))
    whole = chunk_of(identity=cache._identity)
    bad = cache.path / "bad.safetensors"
    bad.write_bytes(BAD[kind](whole, cache._identity))
    for reopen in (False, True):
        again = opened(tmp_path) if reopen else cache
        again.refresh()
        again.refresh()
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"teacher: 1 chunk files in {cache.path} are not used, such as bad.safetensors: ")
        assert len(line) < 500 + len(str(cache.path))
        assert_holds(again, np.arange(3))
    fill(cache, np.arange(7, 10))  # computed again
    assert_holds(cache, np.array([0, 1, 2, 7, 8, 9]))
    assert bad.exists()
    bad.write_bytes(whole)  # the same name again: a process looks at it once
    cache.refresh()
    assert capsys.readouterr().out == ""
    assert_holds(opened(tmp_path), np.array([0, 1, 2, 7, 8, 9]))


@pytest.mark.slow
def test_no_change_of_a_byte_changes_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = opened(tmp_path)
    fill(cache, np.arange(7, 10))
    path = only_chunk(cache)
    whole = path.read_bytes()
    used = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        again = opened(tmp_path)
        if again.filled:
            assert_holds(again, np.arange(7, 10))
            used += 1
        else:
            assert len(capsys.readouterr().out.splitlines()) == 1
    assert used < 10  # the filling of a header


def test_the_folder_of_another_teacher_gives_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = opened(tmp_path), opened(tmp_path, {**IDENTITY, "weights": "ef" * 32})
    for ids in np.split(np.arange(20), 4):
        fill(theirs, ids)
    ours.path.rmdir()
    theirs.path.rename(ours.path)
    assert opened(tmp_path).filled == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"teacher: 4 chunk files in {ours.path} are not used, such as ")
    assert line.endswith(": it is of another teacher, data set or version")


def test_what_is_no_chunk_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = opened(tmp_path)
    fill(cache, np.arange(3))
    for name in ("notes.txt", "._left.by.macos.safetensors", ".half.safetensors.99.tmp"):
        (cache.path / name).write_text("mine")
    assert_holds(opened(tmp_path), np.arange(3))
    assert capsys.readouterr().out == ""
    (cache.path / "folder.safetensors").mkdir()
    os.mkfifo(cache.path / "pipe.safetensors")  # opening it would wait for ever
    assert_holds(opened(tmp_path), np.arange(3))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("teacher: 2 chunk files ")


def test_tables_of_the_first_edition_are_not_read_and_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "0123456789abcdef"
    old.mkdir()
    for name in ("table.json", "logits.bin", "marks.bin"):
        (old / name).write_text("{}")
    cache = opened(tmp_path)
    assert capsys.readouterr().out == (
        f"teacher: {old} holds logits of an earlier version, not read now; it can be deleted\n"
    )
    fill(cache, np.arange(3))
    assert_holds(cache, np.arange(3))
    assert len(list(old.iterdir())) == 3


def test_files_of_writers_that_died_long_ago_go(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    for name, age in (("old", 25), ("new", 23)):
        leftover = cache.path / f".{name}.safetensors.99.tmp"
        leftover.write_text("half")
        os.utime(leftover, (time.time() - age * 3600,) * 2)
    opened(tmp_path)
    assert only_chunk(cache).name == ".new.safetensors.99.tmp"


# --- processes ---


@pytest.mark.slow
def test_a_writer_that_is_killed_at_any_line_leaves_a_chunk_or_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL before each line that a write runs through, until one reaches its end."""
    ids = scattered(50)
    sources = {logit_cache.__file__, files.__file__}

    def write_until(line: int, root: Path) -> None:
        seen = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal seen
            if frame.f_code.co_filename not in sources:
                return None
            seen += event == "line"
            if seen > line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        cache = opened(root)
        sys.settrace(trace)
        fill(cache, ids)

    outcomes = []
    for line in range(1000):
        root = tmp_path / str(line)
        code = ended(forked(lambda line=line, root=root: write_until(line, root)))
        again = opened(root)
        outcomes.append((code, again.filled))
        assert_holds(again, ids[: again.filled])
        fill(again, ids)
        assert_holds(opened(root), ids)
        if code == 0:
            break
    assert capsys.readouterr().out == ""
    killed = [there for code, there in outcomes[:-1] if code == -signal.SIGKILL]
    assert len(killed) == len(outcomes) - 1 > 40
    assert set(killed) == {0, 50}
    assert outcomes[-1] == (0, 50)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_writer_that_is_killed_within_a_file_leaves_nothing_that_counts(share: float, tmp_path: Path) -> None:
    def half(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[: int(share * len(data))])
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        Path.write_bytes = half
        fill(cache, np.arange(50))

    cache = opened(tmp_path)
    assert ended(forked(write)) == -signal.SIGKILL
    (leftover,) = cache.path.iterdir()
    assert leftover.name.endswith(".tmp")
    assert opened(tmp_path).filled == 0
    fill(cache, np.arange(50))
    assert_holds(opened(tmp_path), np.arange(50))


def test_processes_may_add_to_one_cache_at_the_same_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With different values, so that parts of two chunks would show; a third one reads all the while."""
    entries, root = 4_000, tmp_path / "made" / "by" / "both"

    def write(salt: int) -> None:
        cache = opened(root, entries=entries)
        for ids in np.split(scattered(entries, entries, seed=salt), 40):
            cache.write(ids, values(ids, salt=salt), ids % 2 == 0)
            cache.refresh()

    def check(cache: LogitCache) -> None:
        cache.refresh()
        ids = np.array(filled(cache), dtype=np.int64)
        read = cache.read(ids)
        either = [(read == values(ids, salt=salt)).all(dim=1) for salt in (1, 2)]
        assert (either[0] | either[1]).all()

    children = [forked(lambda salt=salt: write(salt)) for salt in (1, 2)]
    cache = opened(root, entries=entries)
    for _ in range(20):
        check(cache)
    assert [ended(child) for child in children] == [0, 0]
    check(cache)
    assert (cache.filled, cache.changed) == (entries, 0.5)
    assert capsys.readouterr().out == ""


PORTABLE = """
import os, sys
from pathlib import Path
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("posix_fallocate", "fdatasync", "sched_getaffinity", "fork"):
    delattr(os, name)
import numpy as np
import torch
from mdistill.engine.logit_cache import LogitCache
import mdistill.engine.teacher
cache = LogitCache(Path(sys.argv[1]), {}, entries=5, width=2, dtype=torch.float16)
cache.write(np.arange(3), torch.ones(3, 2).half(), np.zeros(3, bool))
assert cache.read(np.array([2]))[0].tolist() == [1.0, 1.0]
"""


@pytest.mark.slow
def test_nothing_is_asked_of_the_system_that_only_linux_has(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", PORTABLE, str(tmp_path)], check=True, env=environment)


# --- disks and folders ---


def failing(code: int) -> Callable[..., Any]:
    """A function that fails with the system's error ``code``."""

    def fail(*arguments: Any, **more: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("function", ["os.fsync", "os.replace", "pathlib.Path.write_bytes"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_write_that_fails_leaves_nothing_and_the_rest_can_be_read(
    code: int, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = opened(tmp_path)
    fill(cache, np.arange(5))
    before = only_chunk(cache)
    with monkeypatch.context() as patch:
        patch.setattr(function, failing(code))
        for again in (cache, opened(tmp_path)):  # a folder that cannot be written can be opened and read
            with pytest.raises(RunFailed) as caught:
                fill(again, np.arange(3, 9))
            assert str(caught.value).startswith(f"could not write {cache.path}")
            assert os.strerror(code) in str(caught.value)
            assert "\n" not in str(caught.value)
            assert only_chunk(cache) == before
            assert_holds(again, np.arange(5))
    fill(cache, np.arange(3, 9))
    assert_holds(cache, np.arange(9))


def test_a_disk_that_is_full_half_way_through_a_chunk(tmp_path: Path) -> None:
    cache = opened(tmp_path, entries=100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(RunFailed, match="File too large"):
            fill(cache, np.arange(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(cache.path.iterdir()) == []
    fill(cache, np.arange(100_000))
    assert_holds(cache, np.arange(100_000))


def test_room_is_left_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(tmp_path)
    size = LogitCache.size(5, CLASSES, torch.float16)
    usage = SimpleNamespace(free=size + logit_cache.HEADROOM - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunFailed) as caught:
        fill(cache, np.arange(5))
    assert str(caught.value) == (
        "the teacher's outputs need 0.00 MB on disk, and 1,074 MB must stay free beside them,"
        f" but {cache.path} has 1,074 MB free"
    )
    assert list(cache.path.iterdir()) == []
    usage.free += 1
    fill(cache, np.arange(5))
    assert_holds(cache, np.arange(5))


def test_no_root_where_a_file_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for root in (file, file / "below"):
        with pytest.raises(UserError) as caught:
            opened(root)
        assert str(caught.value).startswith(f"--cache-root: {root} cannot be written: [Errno 20] Not a directory")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_root_that_cannot_be_made(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", failing(code))
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    assert str(caught.value) == f"--cache-root: {tmp_path} cannot be written: [Errno {code}] {os.strerror(code)}"


def test_a_folder_that_is_removed_while_it_is_open_can_still_be_read_and_comes_again(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    fill(cache, np.arange(5))
    shutil.rmtree(cache.path)
    cache.refresh()
    assert_holds(cache, np.arange(5))
    fill(cache, np.arange(5, 9))
    assert_holds(cache, np.arange(9))
    assert_holds(opened(tmp_path), np.arange(5, 9))
