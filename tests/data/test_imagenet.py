"""ImageNet: classes and their order, counts that differ, and what is refused in one line."""

from pathlib import Path

import pytest

from mdistill.data import DATASETS, imagenet
from mdistill.data.folder import FolderDataset
from mdistill.errors import UserError

from ..pictures import encoded, fill, picture

WNIDS = ("n02102040", "n01440764", "n15075141")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return fill(tmp_path / "imagenet", WNIDS)


def build(root: Path) -> FolderDataset:
    made = DATASETS.build("imagenet", root.parent, False, image_size=16)
    assert isinstance(made, FolderDataset)
    return made


def test_classes_are_in_the_order_of_their_wnids(root: Path) -> None:
    data = build(root)
    assert data.class_names == ("n01440764", "n02102040", "n15075141")
    assert (data.num_classes, data.num_samples, data.size("test")) == (3, 15, 6)
    assert data.notes == [
        "15 images of 3 classes, 6 to evaluate",
        "imagenet: 3 of the 1,000 classes, numbered in the order of their own folders",
    ]
    same = DATASETS.build("folder", root.parent, False, root="imagenet", image_size=16)
    assert same.fingerprint() == data.fingerprint()


def test_counts_that_differ_are_noted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "CLASSES", 3)
    assert build(root).notes[1:] == [
        "imagenet: train has 15 images, the published set 1,281,167",
        "imagenet: val has 6 images, the published set 50,000",
    ]
    monkeypatch.setattr(imagenet, "IMAGES", {"train": 15, "val": 6})
    assert build(root).notes[1:] == []


def test_images_to_evaluate_that_are_not_sorted_are_told(root: Path) -> None:
    for folder in list((root / "val").iterdir()):
        for number, path in enumerate(folder.glob("[0-9].jpg")):
            path.rename(root / "val" / f"ILSVRC2012_val_{folder.name}{number}.JPEG")
    with pytest.raises(UserError, match=r"val holds 6 images that are not sorted by class; move each into val/<wnid>/"):
        build(root)


def test_other_folders_are_refused(root: Path) -> None:
    (root / "val" / WNIDS[0]).rename(root / "val" / "n02102041")
    with pytest.raises(UserError, match=r"differ: 1 are in train alone, 1 in val alone, .* did you mean 'n02102041'"):
        build(root)
    (root / "train" / "tench").mkdir()
    (root / "train" / "tench" / "x.jpg").write_bytes(encoded(picture(0)))
    with pytest.raises(UserError, match=r"a folder for each wnid .*, found 'tench'; for images of your own"):
        build(root)
