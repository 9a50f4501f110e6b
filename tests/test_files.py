import errno
from pathlib import Path

import pytest
import torch

from mdistill.errors import RunFailed
from mdistill.files import atomic_write, write_text


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
