"""Tiny ImageNet in its published layout: what is read, in which order, and what is missing or does not fit."""

from pathlib import Path

import numpy as np
import pytest

from mdistill.data import DATASETS, InMemoryDataset
from mdistill.errors import UserError

from ..pictures import encoded

WNIDS = ("n02124075", "n01443537", "n07749582")  # not in their order, as in the published file
SORTED = sorted(WNIDS)


def flat(label: int, number: int) -> np.ndarray:
    """64 by 64 pixels of one grey, that says which image it is."""
    return np.full((64, 64, 3), 20 * label + number, np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "tiny-imagenet-200"
    annotations = []
    (place / "val" / "images").mkdir(parents=True)
    for label, wnid in enumerate(SORTED):
        folder = place / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{wnid}_boxes.txt").write_text("no image")
        for number in range(3):
            (folder / f"{wnid}_{number}.JPEG").write_bytes(encoded(flat(label, number), "PNG"))
        for number in range(2):
            name = f"val_{10 * number + 5 - label}.JPEG"
            (place / "val" / "images" / name).write_bytes(encoded(flat(label, 10 + number), "PNG"))
            annotations.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    (place / "val" / "val_annotations.txt").write_text("".join(annotations))
    (place / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (place / "words.txt").write_text("n00000001\tentity\n" + "".join(f"{wnid}\tname of {wnid}\n" for wnid in WNIDS))
    return place


def build(root: Path, **settings: object) -> InMemoryDataset:
    made = DATASETS.build("tiny_imagenet", root.parent, False, **settings)
    assert isinstance(made, InMemoryDataset)
    return made


def greys(data: InMemoryDataset) -> tuple[list[int], list[int]]:
    """The grey of each image to train on, and of each to evaluate."""
    return data._train[:, 0, 0, 0].tolist(), data._eval["test"][0][:, 0, 0, 0].tolist()


def test_reads_the_published_layout(root: Path) -> None:
    data = build(root)
    assert (data.num_samples, data.num_classes, data.size("test"), data.image_size) == (9, 3, 6, 64)
    assert data.class_names == tuple(f"name of {wnid}" for wnid in SORTED)
    assert data.num_views == 17 * 17 * 2
    train, test = greys(data)
    assert train == [20 * label + number for label in range(3) for number in range(3)]
    assert sorted(test) == [20 * label + 10 + number for label in range(3) for number in range(2)]
    assert [grey // 20 for grey in test] == data._eval["test"][1].tolist() == [0, 0, 1, 1, 2, 2]
    assert data.notes[1:] == [
        "tiny_imagenet: 3 classes, the published set has 200",
        "tiny_imagenet: train has 9 images, the published set 100,000",
        "tiny_imagenet: val has 6 images, the published set 10,000",
    ]
    assert build(root, padding=4, flip=False).num_views == 81


def test_a_part_of_the_evaluated_images_is_enough(root: Path) -> None:
    (root / "val" / "images" / "val_5.JPEG").unlink()
    (root / "words.txt").unlink()
    data = build(root)
    assert data._eval["test"][1].tolist() == [0, 1, 1, 2, 2]
    assert data.class_names == tuple(SORTED)
    assert data.notes[-1] == "tiny_imagenet: no words.txt, so classes are known by their wnids"


def test_a_val_that_was_sorted_by_class_is_read_as_well(root: Path) -> None:
    expected = sorted(greys(build(root))[1])
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        (root / "val" / wnid).mkdir(exist_ok=True)
        (root / "val" / "images" / name).rename(root / "val" / wnid / name)
    (root / "val" / "val_annotations.txt").unlink()
    assert sorted(greys(build(root))[1]) == expected


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("wnids.txt", None, "Tiny ImageNet is not complete in .*: no wnids.txt; unpack tiny-imagenet-200.zip"),
        ("wnids.txt", "n02124075\nn01443537\n", "0 are in wnids.txt alone, 1 in train alone, such as n07749582"),
        (
            "wnids.txt",
            "\n".join([*WNIDS, "n07749583"]),
            "1 are in wnids.txt alone, .* such as n07749583$",
        ),
        ("val/val_annotations.txt", None, "val_annotations.txt is missing: it says of which class each image"),
        ("val/val_annotations.txt", "val_5.JPEG\tn01443537\t0\n", "no class for 5 of the 6 images, such as .*JPEG"),
        ("val/val_annotations.txt", "val_5.JPEG n01443537\n", "line 1: '' is none of the 3 classes of wnids.txt"),
        ("train/n01443537/images/n01443537_1.JPEG", "text", "n01443537_1.JPEG: no image that can be read"),
    ],
)
def test_what_does_not_fit_is_one_line(path: str, content: str | None, message: str, root: Path) -> None:
    if content is None:
        (root / path).unlink()
    else:
        (root / path).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        build(root)
    assert len(str(caught.value).splitlines()) == 1


def test_without_images_to_evaluate_it_is_not_complete(root: Path) -> None:
    for path in (root / "val" / "images").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"val/images holds no images; val_annotations\.txt beside it"):
        build(root)
