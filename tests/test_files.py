import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mdistill.errors import RunFailed, UserError
from mdistill.files import atomic_write, lock_folder, write_text


def test_replaces_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fill() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunFailed, match=r"could not write .*file.txt: .*No space left on device; the previous file is"):
        fill()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"old": torch.ones(1)}, path)

    def fill() -> None:
        with atomic_write(path) as temporary:
            temporary.symlink_to("/dev/full")
            torch.save({"new": torch.zeros(100_000)}, temporary)

    with pytest.raises(RunFailed, match="could not write"):
        fill()
    assert torch.load(path, weights_only=True)["old"].item() == 1.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def interrupted() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_locked_folder_is_refused_until_it_is_released(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path / "run", "output folder")
    with pytest.raises(UserError, match=r"output folder .*run is in use by another running process"):
        lock_folder(tmp_path / "run", "output folder")
    lock.release()
    lock_folder(tmp_path / "run", "output folder").release()


def test_a_locked_folder_may_be_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, naps = lock_folder(tmp_path, "folder"), list[float]()

    def nap(seconds: float) -> None:  # in place of sleep: who waits finds the folder locked twice, then free
        naps.append(seconds)
        assert lock.is_locked
        if len(naps) == 3:
            lock.release()

    monkeypatch.setattr(time, "sleep", nap)
    lock_folder(tmp_path, "folder", wait=60.0).release()
    assert len(naps) == 3
    assert not lock.is_locked


def test_who_waits_for_a_locked_folder_in_vain_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_folder(tmp_path, "folder")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"folder .* is in use by another running process"):
        lock_folder(tmp_path, "folder", wait=0.001)
    lock.release()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mdistill.files import lock_folder\n"
        "lock = lock_folder(Path(sys.argv[1]), 'folder'); print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="in use by another running process"):
            lock_folder(tmp_path, "folder")
        holder.kill()
    lock_folder(tmp_path, "folder").release()


def test_a_lock_that_is_a_link_is_refused_and_its_target_unharmed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match=r"output folder .*run cannot be written"):
        lock_folder(tmp_path / "run", "output folder")
    assert precious.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=r"output folder .*run cannot be written"):
        lock_folder(tmp_path / "file" / "run", "output folder")
