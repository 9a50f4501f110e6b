"""Folders of images: what is read, the same whoever decodes it and when, and what is refused in one line."""

import gc
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

from mdistill import config
from mdistill.data import DATASETS, InMemoryDataset, decoding, image_files, randaugment, resized_crop
from mdistill.data.decoding import decode
from mdistill.data.folder import FolderDataset
from mdistill.data.resizing import centre_crop, resize
from mdistill.errors import UserError
from mdistill.models import MODELS

from .. import runs
from ..pictures import encoded, fill, picture
from ..pretend_cuda import pretend

SIZE = 24


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, ten images to train on and four to evaluate, of different sizes; and what lies beside."""
    return fill(tmp_path / "photos")


def build(root: Path, **settings: Any) -> FolderDataset:
    made = DATASETS.build("folder", root.parent, False, root=root.name, image_size=SIZE, **settings)
    assert isinstance(made, FolderDataset)
    return made


# ---- what is read ----


def test_lists_the_images_class_by_class(root: Path) -> None:
    data = build(root)
    assert (data.num_samples, data.num_classes, data.size("test"), data.class_names) == (10, 2, 4, ("ant", "bee"))
    assert data.labels is not None
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    assert data.notes == ["10 images of 2 classes, 4 to evaluate"]
    assert data.info(4).num_views is None


def test_a_training_image_is_its_crop_resized_and_flipped(root: Path) -> None:
    """Put together here step by step."""
    data = build(root)
    index, view = np.arange(10), np.arange(10) * 987654321
    for number, pixels in zip(index, data.read(index, view), strict=True):
        path = root / "train" / ("ant", "bee")[number // 5] / f"{number % 5}.jpg"
        image = np.array(Image.open(path).convert("RGB"))
        (words,) = resized_crop.draw(np.array([number]), view[number : number + 1])
        top, left, height, width, flip = resized_crop.crop(words, *image.shape[:2])
        cut = torch.from_numpy(image[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
        wanted = F.interpolate(cut, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, wanted[:, ::-1] if flip else wanted)


def test_a_number_of_views_is_how_many_an_image_has_and_changes_none(root: Path) -> None:
    data, endless = build(root, views=3), build(root)
    assert data.info(4).num_views == data.hold_out(2).num_views == 3
    assert data.fingerprint() == endless.fingerprint()
    index, view = np.repeat(np.arange(10), 3), np.tile(np.arange(3), 10)
    pixels = data.read(index, view)
    assert np.array_equal(pixels, endless.read(index, view))
    assert len({image.tobytes() for image in pixels}) == 30
    for wrong in (0, -1, "many"):
        with pytest.raises(UserError, match="views: "):
            build(root, views=wrong)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_pixels_do_not_depend_on_workers_order_or_batch(workers: int, root: Path) -> None:
    data = build(root)
    other = FolderDataset(data._train, data._eval["test"][0], data.class_names, image_size=SIZE, workers=workers)
    index, view = np.array([3, 1, 9, 4, 4]), np.array([5, 2**62, 7, 1, 2])
    whole = data.read(index, view)
    assert np.array_equal(whole, other.read(index[::-1].copy(), view[::-1].copy())[::-1])
    assert np.array_equal(whole[2:4], other.read(index[2:4], view[2:4]))
    assert not np.array_equal(whole[3], whole[4])  # another view


def test_evaluates_the_centre_of_the_resized_image_in_order(root: Path) -> None:
    data = build(root)
    batches = list(data.eval_batches("test", 3))
    assert [len(target) for _, target in batches] == [3, 1]
    assert torch.cat([target for _, target in batches]).tolist() == [0, 0, 1, 1]
    image = np.array(Image.open(root / "val" / "bee" / "1.jpg").convert("RGB"))
    wanted = data._normalize(torch.from_numpy(centre_crop(image, SIZE).copy())[None])
    assert torch.equal(batches[1][0], wanted)


def test_plain_training_images_are_the_centres_too(root: Path) -> None:
    data = build(root)
    index = np.array([7, 0, 3])
    images = torch.cat([*data.plain_batches(index, 2)])
    pixels = np.stack([centre_crop(data._train.read(number), SIZE) for number in index])
    assert torch.equal(images, data._normalize(torch.from_numpy(pixels)))
    other = data.hold_out(4)
    (held,) = other.plain_batches(np.array([1]), 2)
    (same,) = data.plain_batches(other._kept[1:2], 2)
    assert torch.equal(held, same)


@pytest.mark.parametrize("shape", [(468, 400), (400, 468), (300, 300), (40, 7), (7, 40), (1, 1)])
def test_the_centre_crop_is_that_of_the_short_side_resized(shape: tuple[int, int]) -> None:
    """The short side becomes 256 / 224 of the crop, the long one in proportion, as torchvision rounds it."""
    from torchvision.transforms.v2 import functional as V

    image = picture(0, *shape)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    resized = V.resize(tensor, [32], interpolation=V.InterpolationMode.BILINEAR, antialias=True)
    wanted = V.center_crop(resized, [28]).permute(1, 2, 0).numpy()
    assert np.array_equal(centre_crop(image, 28), wanted)


def test_held_out_images_are_evaluated_with_their_labels_and_keep_their_crops(root: Path) -> None:
    data = build(root)
    other = data.hold_out(4)
    assert (other.num_samples, other.splits, other.size("val")) == (6, ("val", "test"), 4)
    assert torch.cat([target for _, target in other.eval_batches("val", 10)]).tolist() == [0, 0, 1, 1]
    kept = other._kept
    view = np.arange(6) + 50
    assert np.array_equal(other.read(np.arange(6), view), data.read(kept, view))
    assert other.labels is not None
    assert other.labels.tolist() == [0 if number < 5 else 1 for number in kept]
    assert other.fingerprint() != data.fingerprint()
    assert data.hold_out(0) is data
    with pytest.raises(UserError, match=r"data\.holdout must be from 0 to 9, .* found 10"):
        data.hold_out(10)


def test_the_fingerprint_is_of_names_sizes_and_settings(root: Path) -> None:
    before = build(root).fingerprint()
    assert build(root).fingerprint() == before
    assert build(root, mean=[0.5, 0.5, 0.5]).fingerprint() != before
    (root / "train/ant/0.jpg").write_bytes(encoded(picture(77)) + b"more")
    assert build(root).fingerprint() != before


# ---- strong views ----


def read_both(data: FolderDataset, index: Any, view: Any, strong_view: Any) -> tuple[np.ndarray, np.ndarray]:
    plain, strong = np.zeros((2, len(index), SIZE, SIZE, 3), np.uint8)
    data.read_both_into(plain, strong, index, view, strong_view)
    return plain, strong


def test_a_strong_view_is_a_crop_of_its_own_strengthened(root: Path) -> None:
    data = build(root)
    index, view, word = np.arange(10), np.arange(10) * 987654321, np.arange(10) * (2**63 // 11)
    plain, strong = read_both(data, index, view, word)
    assert np.array_equal(plain, data.read(index, view))
    for number, pixels in zip(index, strong, strict=True):
        image = data._train.read(number)
        (words,) = resized_crop.draw(np.array([number]), word[number : number + 1], stream=7)
        top, left, height, width, flip = resized_crop.crop(words, *image.shape[:2])
        cut = resize(image[top : top + height, left : left + width], SIZE, SIZE)
        assert np.array_equal(pixels, cut[:, ::-1] if flip else cut)
    parts = randaugment.decode(torch.from_numpy(word), num_views=1)
    expected = data._normalize(randaugment.Strengthen(SIZE)(torch.from_numpy(strong), parts))
    finished = data.finish_strong(torch.from_numpy(strong), torch.from_numpy(index), torch.from_numpy(word))
    assert torch.equal(finished, expected)
    assert parts.view.sum() == 0
    assert len({*parts.operation.flatten().tolist()}) > 5


@pytest.mark.parametrize("workers", [1, 5])
def test_strong_views_do_not_depend_on_workers_order_or_batch(workers: int, root: Path) -> None:
    data = build(root)
    other = FolderDataset(data._train, data._eval["test"][0], data.class_names, image_size=SIZE, workers=workers)
    index, view, word = np.array([3, 1, 9, 4, 4]), np.array([5, 2**62, 7, 1, 1]), np.array([0, 2**62, 9, 1, 2])
    _, strong = read_both(data, index, view, word)
    assert np.array_equal(strong[::-1], read_both(other, index[::-1], view, word[::-1])[1])
    assert np.array_equal(strong[2:4], read_both(other, index[2:4], view[2:4], word[2:4])[1])
    assert not np.array_equal(strong[3], strong[4])


def test_strong_views_are_for_images_of_less_than_1024_pixels(root: Path) -> None:
    for size, there in ((1023, True), (1024, False)):
        data = DATASETS.build("folder", root.parent, False, root=root.name, image_size=size)
        assert data.info(4).strong_views is there


# ---- held in memory ----


def small(root: Path, **settings: Any) -> InMemoryDataset:
    made = DATASETS.build("folder", root.parent, False, root=root.name, image_size=SIZE, augment="crop", **settings)
    assert isinstance(made, InMemoryDataset)
    return made


def test_small_images_are_held_as_they_are_and_others_are_resized(root: Path) -> None:
    exact = picture(9, SIZE, SIZE)
    (root / "train" / "ant" / "0.jpg").write_bytes(encoded(exact, "PNG"))
    data = small(root)
    assert (data.num_samples, data.num_classes, data.size("test"), data.class_names) == (10, 2, 4, ("ant", "bee"))
    assert data.notes == ["10 images of 2 classes, 4 to evaluate", "13 of 14 images were resized to 24 x 24 pixels"]
    assert data.num_views == 7 * 7 * 2  # three pixels on each side
    assert np.array_equal(data._train[0, :SIZE, :SIZE].numpy(), exact)
    other = np.array(Image.open(root / "train" / "ant" / "1.jpg").convert("RGB"))
    assert np.array_equal(data._train[1, :SIZE, :SIZE].numpy(), centre_crop(other, SIZE, SIZE))
    (image, _) = next(iter(data.eval_batches("test", 4)))
    assert image.shape == (4, 3, SIZE, SIZE)


def test_padding_and_flips_are_settings(root: Path) -> None:
    assert small(root, padding=1).num_views == 18
    assert small(root, padding=0, flip=False).num_views == 1
    assert small(root, mean=[0.5, 0.5, 0.5]).fingerprint() != small(root).fingerprint()
    with pytest.raises(UserError, match=r"data\.padding: 4 goes with data\.augment crop, found random_resized_crop"):
        build(root, padding=4)
    with pytest.raises(UserError, match=r"data\.views: 5 goes with data\.augment random_resized_crop, found crop"):
        small(root, views=5)
    with pytest.raises(UserError, match=r"augment: .*'random_resized_crop' or 'crop', found 'cut'"):
        build(root, augment="cut")


def test_without_flips_no_crop_is_mirrored(root: Path) -> None:
    index, view = np.zeros(20, np.int64), np.arange(20)
    flips = [resized_crop.crop(words, 30, 61).flip for words in resized_crop.draw(index, view)]
    some, none = build(root), build(root, flip=False)
    for flip, one, other in zip(flips, some.read(index, view), none.read(index, view), strict=True):
        assert np.array_equal(other[:, ::-1] if flip else other, one)
    assert any(flips)
    assert some.fingerprint() != none.fingerprint()


def test_more_images_than_memory_holds_are_refused_before_any_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "MOST_IN_MEMORY", 14 * 3 * SIZE**2 - 1)
    (root / "train" / "ant" / "0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"14 images of 24 x 24 pixels take 0 GB, more than .* random_resized_crop"):
        small(root)
    monkeypatch.setattr(image_files, "MOST_IN_MEMORY", 14 * 3 * SIZE**2)
    with pytest.raises(UserError, match=r"ant/0\.jpg: no image that can be read: the file is empty"):
        small(root)


# ---- decoding ----

FORMS: dict[str, Callable[[np.ndarray], bytes]] = {
    "JPEG": lambda pixels: encoded(pixels, quality=95),
    "JPEG without subsampling": lambda pixels: encoded(pixels, quality=95, subsampling=0),
    "progressive JPEG": lambda pixels: encoded(pixels, quality=95, progressive=True),
    "grey JPEG": lambda pixels: encoded(pixels, mode="L", quality=95),
    "CMYK JPEG": lambda pixels: encoded(pixels, mode="CMYK", quality=95),
    "PNG": lambda pixels: encoded(pixels, "PNG"),
    "PNG with a palette": lambda pixels: encoded(pixels, "PNG", mode="P"),
    "WebP": lambda pixels: encoded(pixels, "WEBP", lossless=True),
    "BMP": lambda pixels: encoded(pixels, "BMP"),
}


@pytest.mark.parametrize("form", FORMS)
def test_both_decoders_give_the_same_pixels(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if decoding.fast_decoder() is None:
        pytest.skip("needs simplejpeg")
    content = FORMS[form](picture(1))
    fast = decode(content)
    monkeypatch.setattr(decoding, "fast_decoder", lambda: None)
    assert np.array_equal(fast, decode(content))
    assert fast.shape == (40, 52, 3)
    assert np.abs(fast.astype(int) - picture(1)).mean() < {"grey JPEG": 60, "PNG with a palette": 25}.get(form, 12)


def test_grey_images_have_three_equal_channels_and_16_bits_become_8() -> None:
    grey = decode(encoded(picture(2), mode="L"))
    assert (grey[..., 0] == grey[..., 1]).all()
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    assert np.array_equal(decode(buffer.getvalue())[..., 2], (deep >> 8).astype(np.uint8))


def test_a_rotation_in_the_metadata_is_left_out() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(picture(3), exif=exif)).shape == (40, 52, 3)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"no image at all", r"it begins with b'no image', as no known format does"),
        (encoded(picture(0))[:500], "."),
        (encoded(picture(0), "PNG")[:300], "."),
        (b"\xff\xd8\xff" + bytes(100), "."),
    ],
)
def test_what_is_no_image_is_refused(content: bytes, message: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(decoding, "fast_decoder", lambda: None)
    with pytest.raises(ValueError, match=message):
        decode(content)


def test_a_huge_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 2000)
    for form in ("JPEG", "PNG"):
        with pytest.raises(ValueError, match="it has 52 x 40 pixels, more than 2,000"):
            decode(encoded(picture(0), form))


def test_resizing_to_the_same_size_changes_nothing() -> None:
    assert np.array_equal(resize(picture(4), 40, 52), picture(4))


# ---- what is refused ----


def test_a_root_that_is_a_file_or_cannot_be_listed_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"README is a file; it should be a folder that holds train/ and val/"):
        DATASETS.build("folder", root, False, root="train/README")

    def scandir(folder: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(image_files.os, "scandir", scandir)
    with pytest.raises(UserError, match=r"photos\S*: cannot be read: Permission denied$"):
        build(root)


def test_missing_and_mixed_up_folders_are_one_line(root: Path, tmp_path: Path) -> None:
    def message(place: Path) -> str:
        with pytest.raises(UserError) as caught:
            build(place)
        (line,) = str(caught.value).splitlines()
        return line

    assert "there is no folder" in message(tmp_path / "nowhere")
    assert "should hold train/ and val/ (or test/), found ant, bee" in message(root / "val")
    (root / "val" / "bee").rename(root / "val" / "beee")
    assert "differ: 1 are in train alone, 1 in val alone, such as" in message(root)
    assert "did you mean 'beee'" in message(root)
    (root / "val" / "beee").rename(root / "val" / "bee")
    for file in (root / "train" / "ant").glob("*.jpg"):
        file.unlink()
    (root / "train" / "ant" / "more").mkdir()
    assert "ant holds no image (.bmp, .jpeg" in message(root)
    (root / "train" / "ant" / "more" / "x.PNG").write_bytes(encoded(picture(0), "PNG"))
    assert build(root).num_samples == 6


def test_images_that_are_not_sorted_by_class_are_told(root: Path) -> None:
    for label in ("ant", "bee"):
        for path in (root / "val" / label).iterdir():
            path.rename(root / "val" / f"{label}{path.name}")
        (root / "val" / label).rmdir()
    with pytest.raises(UserError, match="2 classes, found 0; it holds 6 images, which have to be sorted into folders"):
        build(root)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("left", [0, 1])
def test_two_classes_are_needed(split: str, left: int, root: Path) -> None:
    for name in ("ant", "bee")[left:]:
        shutil.rmtree(root / split / name)
    with pytest.raises(UserError, match=rf"{split} should hold a folder for each of at least 2 classes, found {left}$"):
        build(root)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_both_splits_are_needed(missing: str, root: Path) -> None:
    shutil.rmtree(root / missing)
    with pytest.raises(UserError, match=r"should hold train/ and val/ \(or test/\), found (train|val)$"):
        build(root)


def test_a_class_without_images_is_told(root: Path) -> None:
    for path in (root / "val" / "bee").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"val/bee holds no image \(\.bmp, \.jpeg, "):
        build(root)


def test_a_broken_file_among_those_that_are_evaluated_is_one_line(root: Path, tmp_path: Path) -> None:
    path = root / "val" / "bee" / "1.jpg"
    path.write_bytes(encoded(picture(0))[:400])
    with pytest.raises(UserError, match=rf"{path}: no image that can be read: ") as caught:
        runs.train(configured(root, tmp_path), tmp_path / "runs", "solver.epochs=1")
    assert len(str(caught.value).splitlines()) == 1


def test_images_smaller_than_the_crop_are_enlarged(root: Path) -> None:
    data = DATASETS.build("folder", root.parent, False, root=root.name, image_size=96)
    assert isinstance(data, FolderDataset)
    assert data.read(np.arange(10), np.arange(10)).shape == (10, 96, 96, 3)
    assert next(data.eval_batches("test", 4))[0].shape == (4, 3, 96, 96)


@pytest.mark.parametrize("content", [b"", b"text", encoded(picture(0))[:400]])
def test_a_broken_file_is_one_line_with_its_path(content: bytes, root: Path) -> None:
    path = root / "train" / "bee" / "2.jpg"
    path.write_bytes(content)
    data = build(root)
    with pytest.raises(UserError, match=rf"{path}: no image that can be read: ") as caught:
        data.read(np.arange(10), np.arange(10))
    assert len(str(caught.value).splitlines()) == 1
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: cannot be read: No such file"):
        data.read(np.arange(10), np.arange(10))


# ---- whole runs ----


def test_logits_of_small_images_are_cached(root: Path, tmp_path: Path) -> None:
    cfg = configured(root, tmp_path, "kd")
    experiment = runs.experiment(cfg, "data.augment=crop")
    assert experiment.cache is not None
    assert experiment.cache.entries == 10 * 98
    runs.train(cfg, tmp_path / "runs", "data.augment=crop", "solver.epochs=1")


def configured(root: Path, folder: Path, method: str = "vanilla") -> Path:
    queue = {"queue_size": 8} if method == "mcld" else None
    settings = yaml.safe_load(runs.write_config(folder, method, distiller=queue).read_text())
    settings["data"] = {"name": "folder", "root": str(root), "image_size": SIZE, "batch_size": 4, "eval_batch_size": 3}
    torch.save({"model": MODELS.build("tiny_net", 2).state_dict()}, folder / "teacher.pt")
    cfg = folder / "photos.yaml"
    cfg.write_text(yaml.safe_dump(settings))
    return cfg


def test_where_the_images_are_changes_no_result(root: Path, tmp_path: Path) -> None:
    cfg = configured(root, tmp_path)
    here, there = config.load(cfg), config.load(cfg, ["data.root=/elsewhere"])
    assert here.run_folder() == there.run_folder()
    assert config.results_only(here.resolved()) == config.results_only(there.resolved())


def test_a_run_goes_on_where_its_images_were_moved(root: Path, tmp_path: Path) -> None:
    cfg = configured(root, tmp_path)
    runs.train(cfg, tmp_path / "runs", "solver.epochs=1")
    moved = root.rename(tmp_path / "moved")
    runs.train(cfg, tmp_path / "runs", f"data.root={moved}", mode="resume")
    (moved / "train" / "ant" / "0.jpg").unlink()
    with pytest.raises(UserError, match="cannot resume with another data"):
        runs.train(cfg, tmp_path / "runs", f"data.root={moved}", "solver.epochs=4", mode="resume")


def test_a_file_that_breaks_during_training_ends_the_run_in_one_line_and_the_checkpoint_stays(
    root: Path, tmp_path: Path
) -> None:
    cfg = configured(root, tmp_path)
    runs.train(cfg, tmp_path / "runs", "solver.epochs=1")
    path = root / "train" / "bee" / "3.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))  # as long as before
    before = (tmp_path / "runs" / "seed0" / "last.pt").read_bytes()
    with pytest.raises(UserError, match=rf"{path}: no image that can be read: ") as caught:
        runs.train(cfg, tmp_path / "runs", "solver.epochs=2", mode="resume")
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "runs" / "seed0" / "last.pt").read_bytes() == before
    path.write_bytes(content)
    runs.train(cfg, tmp_path / "runs", "solver.epochs=2", mode="resume")
    runs.train(cfg, tmp_path / "whole", "solver.epochs=2")
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vanilla", "mlkd"])
def test_a_run_stopped_in_mid_epoch_and_resumed_equals_an_unbroken_one(method: str, root: Path, tmp_path: Path) -> None:
    cfg = configured(root, tmp_path, method)
    runs.train(cfg, tmp_path / "whole")
    runs.train(cfg, tmp_path / "parts", stop_at=5)
    assert runs.place(tmp_path / "parts") == (2, 2)
    runs.train(cfg, tmp_path / "parts", mode="resume")
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_on_cuda_a_captured_run_equals_an_eager_one(root: Path, tmp_path: Path) -> None:
    """On the pretended device, with strong views and evaluation."""
    cfg = configured(root, tmp_path, "mlkd")
    gc.freeze()  # each capture collects garbage: here among what the test makes alone
    try:
        with pretend():
            for engine in ("eager", "graph"):
                overrides = f"run.engine={engine}", "run.deterministic=true", "solver.epochs=2"
                runs.train(cfg, tmp_path / engine, *overrides, device="cuda")
            runs.assert_same_runs(tmp_path / "eager", tmp_path / "graph")
    finally:
        gc.unfreeze()
        torch.use_deterministic_algorithms(False)
