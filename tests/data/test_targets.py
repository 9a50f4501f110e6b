"""Data sets that features are tried on: STL-10's binary layout, Tiny ImageNet and folders, as small squares."""

import hashlib
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import STL10, utils

from mdistill.data import stl10, targets
from mdistill.data.resizing import Filter, resize
from mdistill.data.stl10 import read_stl10
from mdistill.data.targets import Images, Target, load_target, parse_target
from mdistill.errors import RunFailed, UserError

from ..pictures import encoded, fill, picture, write_stl10


def load(text: str, root: Path, *, size: int = 32, by: Filter = "bilinear", download: bool = False) -> Images:
    return load_target(parse_target(text), root, download=download, size=size, by=by)


def test_reads_stl10_as_it_is_stored(tmp_path: Path) -> None:
    made = write_stl10(tmp_path, 20, 10)
    notes: list[str] = []
    for root in (tmp_path, tmp_path / "stl10_binary"):
        train, test, names = read_stl10(root, False, notes)
        for found, (images, labels) in ((train, made["train"]), (test, made["test"])):
            assert (found[0] == images).all()
            assert found[1].tolist() == labels.tolist()
    assert (names[0], names[-1], len(names)) == ("airplane", "truck", 10)
    assert notes[:2] == [
        "stl10: train has 20 images, the published set 5,000",
        "stl10: test has 10 images, the published set 8,000",
    ]


def test_stl10_at_32_pixels(tmp_path: Path) -> None:
    made = write_stl10(tmp_path, 12, 10)
    images = load("stl10", tmp_path)
    assert images.train[0].shape == (12, 32, 32, 3)
    assert (images.train[0][3] == resize(made["train"][0][3], 32, 32)).all()
    assert (images.num_classes, images.statistics) == (10, (stl10.MEAN, stl10.STD))
    assert load("stl10:stl10_binary", tmp_path, size=96).test[0].tolist() == made["test"][0].tolist()
    data = images.normalized(*images.statistics)
    (first,) = data.plain_batches(np.array([3]), 5)
    expected = (images.train[0][3].transpose(2, 0, 1) / 255 - np.array(stl10.MEAN)[:, None, None]) / np.array(
        stl10.STD
    )[:, None, None]
    assert np.allclose(first[0].numpy(), expected, atol=1e-5)
    assert data.class_names[1] == "bird"


def test_a_file_that_is_not_the_published_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stl10(tmp_path, 20, 10)
    monkeypatch.setattr(stl10, "IMAGES", {"train": 20, "test": 10})
    own = [
        [name, hashlib.md5((tmp_path / "stl10_binary" / name).read_bytes()).hexdigest()]
        for name in ("train_X.bin", "train_y.bin", "test_X.bin")
    ]
    monkeypatch.setattr(STL10, "train_list", own[:2])
    monkeypatch.setattr(STL10, "test_list", [own[2], ["test_y.bin", "0" * 32]])
    notes: list[str] = []
    read_stl10(tmp_path, False, notes)
    assert notes == ["stl10: test_y.bin is not the published file"]
    (tmp_path / "stl10_binary" / "class_names.txt").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"class_names.txt: is no text; delete it, and fetch it again$"):
        read_stl10(tmp_path, False, notes)


@pytest.mark.parametrize(
    ("name", "size", "last", "message"),
    [
        ("train_X.bin", None, 0, r"STL-10 is not complete in .*stl10_binary: no train_X.bin; give --download"),
        ("train_X.bin", 525_313, 0, r"train_X.bin has 525,313 bytes, no multiple of the 27,648 of an image"),
        ("train_X.bin", 0, 0, r"train_X.bin has 0 bytes, no multiple"),
        ("test_X.bin", 9 * 27_648, 0, r"test_X.bin has 9 images and test_y.bin 10 labels; one of them is damaged"),
        ("test_y.bin", 10, 11, r"test_y.bin: classes should be from 1 to 10, found 11"),
        ("test_y.bin", 10, 0, r"test_y.bin: classes should be from 1 to 10, found 0"),
    ],
)
def test_damage_to_stl10_is_one_line(name: str, size: int | None, last: int, message: str, tmp_path: Path) -> None:
    write_stl10(tmp_path, 20, 10)
    path = tmp_path / "stl10_binary" / name
    if size is None:
        path.unlink()
    else:
        path.write_bytes((b"\x01" * (size - 1) + bytes([last]))[:size])
    with pytest.raises(UserError, match=message) as caught:
        load("stl10", tmp_path)
    assert "\n" not in str(caught.value)


def test_fetches_stl10_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, place = tmp_path / "source", tmp_path / "place"
    made = write_stl10(source, 10, 10)
    archive = source / "stl10_binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source / "stl10_binary", "stl10_binary")
    monkeypatch.setattr(STL10, "url", archive.as_uri())
    monkeypatch.setattr(utils, "_urlretrieve", lambda url, path, *rest: shutil.copy(archive, path))
    with pytest.raises(RunFailed, match=r"could not fetch file://.* into .*place: .*by other means"):
        load("stl10", place, download=True)
    assert not list(place.glob("stl10_binary/*"))
    monkeypatch.setattr(STL10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert (load("stl10", place, download=True, size=96).test[0] == made["test"][0]).all()
    assert sorted(path.name for path in place.iterdir()) == ["stl10_binary", "stl10_binary.tar.gz"]


@pytest.mark.parametrize("by", ["bilinear", "bicubic", "nearest"])
def test_images_are_resized_as_pillow_does(by: Filter) -> None:
    image = picture(1, 96, 96)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}.get(
        by, Image.Resampling.NEAREST
    )
    wanted = np.asarray(Image.fromarray(image).resize((32, 32), method)).astype(int)
    assert np.abs(resize(image, 32, 32, by).astype(int) - wanted).max() <= 1


def test_tiny_imagenet_is_read_at_32_pixels(tmp_path: Path) -> None:
    place = tmp_path / "tiny-imagenet-200"
    (place / "val" / "images").mkdir(parents=True)
    (place / "wnids.txt").write_text("n1\nn2\n")
    lines = []
    for label, wnid in enumerate(("n1", "n2")):
        (place / "train" / wnid / "images").mkdir(parents=True)
        (place / "train" / wnid / "images" / "a.JPEG").write_bytes(encoded(picture(label, 64, 64), "PNG"))
        (place / "val" / "images" / f"{label}.JPEG").write_bytes(encoded(picture(8 + label, 64, 64), "PNG"))
        lines.append(f"{label}.JPEG\t{wnid}\t0\t0\t9\t9\n")
    (place / "val" / "val_annotations.txt").write_text("".join(lines))
    for text in ("tiny_imagenet", "tiny_imagenet:tiny-imagenet-200", f"tiny_imagenet:{place}"):
        images = load(text, tmp_path)
        assert [(each == resize(picture(n, 64, 64), 32, 32)).all() for n, each in enumerate(images.train[0])] == [
            True
        ] * 2
        assert images.test[1].tolist() == [0, 1]
        assert (images.num_classes, images.statistics[0]) == (2, (0.4802, 0.4481, 0.3975))
    assert "tiny_imagenet: 2 classes, the published set has 200" in images.notes


def test_a_folder_of_images_has_statistics_of_its_own(tmp_path: Path) -> None:
    fill(tmp_path / "my photos")
    images = load("folder:my photos", tmp_path, size=16)
    assert (images.train[0].shape, images.test[0].shape) == ((10, 16, 16, 3), (4, 16, 16, 3))
    assert images.class_names == ("ant", "bee")
    flat = images.train[0].reshape(-1, 3) / 255
    assert images.statistics[0] == pytest.approx(flat.mean(axis=0))
    assert images.statistics[1] == pytest.approx(flat.std(axis=0))
    assert Target("folder", Path("a/my photos")).name == "folder-my_photos"
    assert targets._statistics(np.zeros((1, 2, 2, 3), np.uint8))[1] == (1 / 255,) * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stl11", r"--target: unknown 'stl11'; did you mean 'stl10'\? \(allowed: stl10, tiny_imagenet, folder:PATH\)"),
        ("folder", r"--target: 'folder' names no folder; write folder:PATH"),
        ("folder: ", r"names no folder; write folder:PATH"),
        (
            "folder:nowhere",
            r"--target folder: there is no folder .*nowhere; it should hold the images, with train/ and",
        ),
        ("tiny_imagenet", r"--target tiny_imagenet: .*tiny-imagenet-200.zip has to be unpacked first, into a folder"),
        ("tiny_imagenet:a.tar", r"--target tiny_imagenet: .*a.tar has to be unpacked first, into a folder"),
    ],
)
def test_what_is_no_target_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    for name in ("tiny-imagenet-200.zip", "a.tar"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        load(text, tmp_path)
