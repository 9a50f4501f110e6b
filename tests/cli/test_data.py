"""``mdistill data``: what it tells of a folder of images, its exit codes, and smaller copies of it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdistill.cli.data import main
from mdistill.data import DATASETS, decoding
from mdistill.data import shrink as copies
from mdistill.data.folder import FolderDataset
from mdistill.errors import Stopped, UserError

from ..conftest import refused
from ..pictures import encoded, fill, picture

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos")


def checked(root: Path, capsys: Capture, code: int) -> list[str]:
    """What ``check`` prints, the line on stderr last."""
    assert main(["check", str(root)]) == code
    printed = capsys.readouterr()
    return printed.out.splitlines() + printed.err.splitlines()


def turned(pixels: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(pixels, exif=exif)


# ---- check ----


def test_a_good_folder_is_counted(root: Path, capsys: Capture) -> None:
    lines = checked(root, capsys, 0)
    size = sum(path.stat().st_size for path in (root / "train").rglob("[0-9].jpg"))
    assert lines[0] == f"train: 10 images of 2 classes, 5 of each, {size / 1e6:,.1f} MB"
    assert lines[1].startswith("val: 4 images of 2 classes, 2 of each, ")
    assert lines[2] == (
        "pixels (least / median / most): height 30 / 37 / 58, width 41 / 56 / 61, short side 30 / 37 / 46"
    )
    assert lines[3:] == ["all images can be read"]


def test_what_is_odd_is_named_and_is_no_fault(root: Path, capsys: Capture) -> None:
    ant = root / "train" / "ant"
    (ant / "grey.jpg").write_bytes(encoded(picture(1), mode="L"))
    (ant / "inks.jpg").write_bytes(encoded(picture(2), mode="CMYK"))
    (ant / "other.JPEG").write_bytes(encoded(picture(3), "PNG"))
    (ant / "turned.jpg").write_bytes(turned(picture(4)))
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(ant / "deep.png")
    (root / "val" / "bee" / "0.jpg").write_bytes((ant / "turned.jpg").read_bytes())
    lines = checked(root, capsys, 0)
    assert lines[0].startswith("train: 15 images of 2 classes, 5 to 10 of each, ")
    assert lines[3:] == [
        "grey, of which three equal channels are made: 2, such as train/ant/deep.png",
        "in CMYK, converted to RGB: 1, such as train/ant/inks.jpg",
        "in another format than the name says, read by their content: 1, such as train/ant/other.JPEG",
        "of 16 bits, whose upper 8 are used: 1, such as train/ant/deep.png",
        "turned by an EXIF tag, which is left out: 2, such as train/ant/turned.jpg",
        "evaluated and trained on, the same bytes by SHA-256: 1",
        "  val/bee/0.jpg is train/ant/turned.jpg",
        "all images can be read",
    ]


def test_everything_that_is_wrong_is_told_at_once(root: Path, capsys: Capture) -> None:
    (root / "train" / "bee" / "1.jpg").write_bytes(b"")
    (root / "train" / "bee" / "2.jpg").write_bytes(encoded(picture(0))[:400])
    (root / "val" / "ant" / "0.jpg").write_text("text")
    (root / "train" / "cow").mkdir()
    lines = checked(root, capsys, 2)
    assert lines[3:6] == [
        f"{root / 'train' / 'cow'} holds no image",
        "classes in train and not in val: 1, such as cow",
        "files that cannot be read: 3",
    ]
    assert lines[6] == f"  {root / 'train' / 'bee' / '1.jpg'}: the file is empty"
    assert lines[7].startswith(f"  {root / 'train' / 'bee' / '2.jpg'}: ")
    assert lines[8] == f"  {root / 'val' / 'ant' / '0.jpg'}: it begins with b'text', as no known format does"
    assert lines[9:] == [f"error: {root}: 5 things are wrong, told above"]


@pytest.mark.skipif(sys.platform != "linux", reason="such names are refused elsewhere")
def test_names_of_files_may_hold_anything(root: Path, capsys: Capture) -> None:
    for name in (b"\xff\x1b[31m.jpg", b"two\nlines.jpg"):
        (root / "train" / "bee" / os.fsdecode(name)).write_text("text")
    lines = checked(root, capsys, 2)
    assert lines[4].endswith(r"two\nlines.jpg: it begins with b'text', as no known format does")
    assert r"\udcff\x1b[31m.jpg" in lines[5]


def test_folders_that_are_missing_are_told(root: Path, capsys: Capture) -> None:
    (root / "val").rename(root / "valid")
    assert checked(root, capsys, 2)[-2:] == [
        f"{root} should hold train/ and val/ (or test/), found train, valid",
        f"error: {root}: 1 thing is wrong, told above",
    ]
    assert refused(capsys, main(["check", str(root / "none")])).endswith(
        "none is not there; it should hold train/ and val/"
    )
    assert "README is a file; it should hold" in refused(capsys, main(["check", str(root / "train" / "README")]))


def test_the_layout_of_tiny_imagenet_is_known(root: Path, capsys: Capture) -> None:
    images = root / "val" / "images"
    images.mkdir()
    rows = []
    for name in ("ant", "bee"):
        for path in (root / "val" / name).glob("[0-9].jpg"):
            rows.append(f"{name}{path.name}\t{name}\t0\n")
            path.rename(images / f"{name}{path.name}")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    lines = checked(root, capsys, 0)
    assert lines[1].startswith("val: 4 images of 2 classes, 2 of each, ")
    (root / "val" / "val_annotations.txt").write_text("".join(rows[1:]))
    assert "gives no class for 1 of the 4 images" in checked(root, capsys, 2)[-2]


# ---- shrink ----


def shrunk(root: Path, out: Path, *options: str) -> int:
    return main(["shrink", str(root), str(out), *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_copy_is_smaller_and_read_alike(root: Path, tmp_path: Path, capsys: Capture) -> None:
    bee = root / "train" / "bee"
    (bee / "deep.png").write_bytes(encoded(picture(5, 80, 120), "PNG"))
    (bee / "grey.jpg").write_bytes(encoded(picture(6, 80, 120), mode="L"))
    (bee / "turned.jpg").write_bytes(turned(picture(7, 80, 120)))
    out = tmp_path / "small"
    assert shrunk(root, out, "--short-side", "32") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{root}: 17 images of 2 classes in train and val, 0.")
    assert lines[1].startswith(f"{out}: 17 images, 0.")
    before, after = (DATASETS.build("folder", tmp_path, False, root=path.name, image_size=16) for path in (root, out))
    assert isinstance(before, FolderDataset)
    assert isinstance(after, FolderDataset)
    assert after.notes[1] == "a smaller copy of other images (mdistill_copy.json): short side 32, JPEG quality 90"
    assert before.fingerprint() != after.fingerprint()
    for number, name in enumerate(before._train.files):
        ours, theirs = before._train.read(number), after._train.read(after._train.files.index(copies.copied_name(name)))
        short = min(ours.shape[:2])
        if short <= 32:
            assert np.array_equal(ours, theirs)
        else:
            assert theirs.shape[:2] == tuple(round(side * 32 / short) for side in ours.shape[:2])
            expected = Image.fromarray(ours).resize(theirs.shape[1::-1], Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(expected).astype(int) - theirs).mean() < 6
    assert contents(out)["train/bee/deep.png.jpg"].startswith(b"\xff\xd8")
    assert Image.open(out / "train" / "bee" / "grey.jpg").mode == "L"
    assert not Image.open(out / "train" / "bee" / "turned.jpg").getexif()
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize(
    ("form", "mode", "kept"), [("JPEG", "RGB", True), ("JPEG", "CMYK", False), ("PNG", "RGB", False)]
)
def test_small_images_are_not_enlarged(form: str, mode: str, kept: bool) -> None:
    content = encoded(picture(1), form, mode)
    copied = copies.smaller(content, 256, 90)
    assert (copied == content) is kept
    assert decoding.decode(copied).shape == (40, 52, 3)
    assert np.abs(decoding.decode(copied).astype(int) - decoding.decode(content)).mean() < 6


def interrupt_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """The copy is stopped by a signal after so many images."""
    original, calls = copies.smaller, []

    def smaller(*arguments: Any) -> bytes:
        calls.append(arguments)
        if len(calls) > count:
            raise Stopped
        return original(*arguments)

    patch.setattr(copies, "smaller", smaller)


@pytest.mark.slow
def test_an_interrupted_copy_looks_like_none_and_goes_on(root: Path, tmp_path: Path, capsys: Capture) -> None:
    assert shrunk(root, tmp_path / "whole", "--short-side", "20") == 0
    out, partial = tmp_path / "small", tmp_path / "small.partial"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(6, patch)
        with pytest.raises(Stopped):
            copies.shrink(root, out, short_side=20, quality=90)
    assert not out.exists()
    made = [name for name in contents(partial) if name.endswith(".jpg")]
    assert 0 < len(made) <= 6
    assert all(contents(partial)[name] == contents(tmp_path / "whole")[name] for name in made)
    capsys.readouterr()
    assert f"{partial} is an interrupted copy of other images" in checked(partial, capsys, 2)
    with pytest.raises(UserError, match=r"small\.partial is an interrupted copy of images; run `mdistill data shrink`"):
        DATASETS.build("folder", tmp_path, False, root=partial.name)
    for settings in (["--short-side", "21"], ["--short-side", "20", "--quality", "80"]):
        assert "is no interrupted copy of" in refused(capsys, shrunk(root, out, *settings))
    assert shrunk(root, out, "--short-side", "20") == 0
    assert f"14 images, {len(made)} of them by an earlier run, " in capsys.readouterr().out
    assert contents(out) == contents(tmp_path / "whole")
    assert not partial.exists()


def broken_image(root: Path, out: Path) -> None:
    (root / "val" / "ant" / "1.jpg").write_text("text")


def same_name_twice(root: Path, out: Path) -> None:
    (root / "val" / "ant" / "x.png").write_bytes(encoded(picture(0), "PNG"))
    (root / "val" / "ant" / "x.png.jpg").write_bytes(encoded(picture(0)))


def something_else(root: Path, out: Path) -> None:
    (out.parent / f"{out.name}.partial").mkdir()
    (out.parent / f"{out.name}.partial" / "mine").write_text("mine")


def a_file(root: Path, out: Path) -> None:
    (out.parent / f"{out.name}.partial").write_text("mine")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root, out: out.mkdir(), "small is there already; remove it or choose another place"),
        (something_else, "small.partial is there and is no interrupted copy of "),
        (a_file, "small.partial is there and is no folder"),
        (same_name_twice, "two images would both be copied to val/ant/x.png.jpg; rename one"),
        (broken_image, "1.jpg: no image that can be read: it begins with b'text'"),
        (
            lambda root, out: (root / "val" / "bee").rename(root / "val" / "bees"),
            "the class folders of train and val differ",
        ),
    ],
)
def test_what_cannot_be_copied_is_one_line(
    spoil: Callable[[Path, Path], object], message: str, root: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "small"
    spoil(root, out)
    there = contents(out.parent / "small.partial")
    assert message in refused(capsys, shrunk(root, out))
    assert not out.exists() or not any(out.iterdir())
    assert there.items() <= contents(out.parent / "small.partial").items()


def test_settings_and_places_are_checked(root: Path, capsys: Capture) -> None:
    assert "--short-side: should be at least 1, found 0" in refused(capsys, shrunk(root, root, "--short-side", "0"))
    assert "--quality: should be from 1 to 100, found 101" in refused(capsys, shrunk(root, root, "--quality", "101"))
    assert "lies in" in refused(capsys, shrunk(root, root / "train" / "x"))
    assert "none is not there" in refused(capsys, shrunk(root / "none", root.parent / "small"))
