"""Distances between classes: CKA, their file, and a run that reads them."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdistill.cli.cache import main as cache_main
from mdistill.data import DATASETS, Dataset, InMemoryDataset
from mdistill.engine import class_distances, trainer
from mdistill.engine.class_distances import ClassDistances, cka_distances
from mdistill.engine.teacher import FrozenTeacher
from mdistill.errors import RunFailed, Stopped, UserError
from mdistill.models import MODELS

from .. import runs
from ..distillers.golden_more import Case, cases, close

METHOD = "wkd_l"
SETTINGS = {"epochs": runs.EPOCHS}


def golden(inputs: str) -> dict[str, torch.Tensor]:
    case: Case = next(each.values[0] for each in cases("wkd", "wkd_l_total") if each.values[0].inputs == inputs)
    return case.tensors()


@pytest.mark.parametrize("group", [1, 5, 12])
@pytest.mark.parametrize("tile_bytes", [200, 2000, 2**28])
def test_distances_are_the_published_code_s_however_classes_and_rows_are_parted(group, tile_bytes, monkeypatch):
    monkeypatch.setattr(class_distances, "TILE_BYTES", tile_bytes)
    given = golden("6x12")
    rows = given["class_features"]
    found = cka_distances(lambda part: rows[part.start : part.stop].clone(), 12, group=group)
    close(found, given["distance"])


@pytest.mark.parametrize("inputs", ["8x100", "5x10"])
def test_distances_are_the_published_code_s(inputs):
    given = golden(inputs)
    rows = given["class_features"]
    found = cka_distances(lambda part: rows[part.start : part.stop].clone(), len(rows), group=len(rows))
    close(found, given["distance"])
    assert torch.equal(found, found.T)


def test_a_class_whose_rows_do_not_vary_is_far_from_all_others():
    rows = torch.randn(3, 6, 4, dtype=torch.float64)
    rows[1] = rows[1, :1]
    found = cka_distances(lambda part: rows[part.start : part.stop].clone(), 3, group=3)
    assert found[1].tolist() == pytest.approx([1, 0, 1])
    assert 0 < found[0, 2] < 1


def of_a_network(root: Path | None, by: str = "last_map") -> tuple[ClassDistances, nn.Module, Dataset]:
    """Those of a small ResNet on two or three images of each of ten classes."""
    dataset = DATASETS.build("tiny", root, False, images=28)
    torch.manual_seed(5)
    network = MODELS.build("resnet8", 10).eval()
    teacher = FrozenTeacher(network, torch.device("cpu"), "fp32")
    prints = {"teacher": "weights", "data": "images"}
    return ClassDistances(teacher, dataset, by, fingerprints=prints, root=root), network, dataset


@pytest.mark.parametrize("by", ["last_map", "logits"])
def test_they_are_those_of_the_definition(by, tmp_path):
    source, network, dataset = of_a_network(tmp_path, by)
    matrices = []
    for number in range(10):
        members = np.flatnonzero(dataset.labels.numpy() == number)[:2]  # as many as the smallest class has
        (image,) = dataset.plain_batches(members, 99)
        with torch.no_grad():
            features = network.forward_features(image)
        rows = features.last_map.permute(0, 2, 3, 1).flatten(0, 2) if by == "last_map" else features.logits
        matrices.append((rows - rows.mean(dim=0)).double())
    norm = torch.linalg.matrix_norm
    expected = [[1 - norm(b.T @ a) ** 2 / (norm(a.T @ a) * norm(b.T @ b)) for b in matrices] for a in matrices]
    torch.testing.assert_close(source.provide(), torch.tensor(expected).float(), rtol=1e-4, atol=1e-5)


def test_a_run_computes_them_once_and_the_next_one_reads_them(tmp_path, capsys):
    cfg = runs.write_config(tmp_path, METHOD, distiller={"epochs": 1}, solver={"epochs": 1})
    source = runs.experiment(cfg).class_distances
    found = source.provide()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"class distances: computed in 0 s, kept in {source.path}"
    assert lines[-2].endswith("by last_map of 10 images of each of 10 classes, rows of 16 numbers, 0.00 GB at a time")
    runs.train(cfg, tmp_path)
    assert f"class distances: read from {source.path}" in capsys.readouterr().out
    state = torch.load(next(tmp_path.rglob("last.pt")), weights_only=True)["model"]
    assert torch.equal(state["class_distances"], found)


def test_what_is_computed_is_another_file_for_other_outputs_weights_or_data(tmp_path):
    paths = {of_a_network(tmp_path, by)[0].path for by in ("last_map", "logits")}
    source, *_ = of_a_network(tmp_path)
    for prints in ({"teacher": "others", "data": "images"}, {"teacher": "weights", "data": "others"}):
        other = ClassDistances(source._teacher, source._dataset, "last_map", fingerprints=prints, root=tmp_path)
        paths.add(other.path)
    assert len(paths) == 4


def test_a_disk_that_is_full_costs_the_file_alone(tmp_path, capsys):
    source, *_ = of_a_network(tmp_path)
    (tmp_path / "class_distances").write_text("in the way")
    assert source.provide().shape == (10, 10)
    assert "s, and not kept: could not write" in capsys.readouterr().out
    with pytest.raises(RunFailed, match="could not write"):
        source.provide(must_write=True)


def test_a_stop_ends_it(tmp_path):
    source, *_ = of_a_network(tmp_path)

    def stopped() -> None:
        raise Stopped("SIGTERM: stopped")

    with pytest.raises(Stopped):
        source.provide(stopped=stopped)
    assert not source.path.exists()


@pytest.mark.slow
def test_a_run_that_is_stopped_meanwhile_has_lost_nothing(tmp_path, monkeypatch):
    cfg = runs.write_config(tmp_path, METHOD, distiller=SETTINGS)
    plain = InMemoryDataset.plain_batches

    def stopping(*given: Any) -> Iterator[Tensor]:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*given)

    monkeypatch.setattr(InMemoryDataset, "plain_batches", stopping)
    with pytest.raises(Stopped, match="SIGTERM: stopped before the first step, while class distances were computed"):
        runs.train(cfg, tmp_path / "parts")
    monkeypatch.undo()
    runs.train(cfg, tmp_path / "whole")
    runs.train(cfg, tmp_path / "parts", mode="resume")
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_groups_of_classes_give_the_same(monkeypatch):
    whole = of_a_network(None)[0].provide()
    monkeypatch.setattr(class_distances, "BYTES", 200_000)  # three classes at a time
    torch.testing.assert_close(of_a_network(None)[0].provide(), whole)


def test_a_dry_run_says_that_it_does_without_them(tmp_path):
    cfg = runs.write_config(tmp_path, METHOD, distiller=SETTINGS)
    text = trainer.dry_run(runs.experiment(cfg, cache=False))
    assert "wasserstein 1e-07); distances between classes were left at 0 and nothing was written" in text


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_distances_of_its_checkpoint(tmp_path, capsys):
    cfg = runs.write_config(tmp_path, METHOD, distiller=SETTINGS)
    runs.train(cfg, tmp_path / "whole")
    runs.train(cfg, tmp_path / "parts", stop_at=7)
    capsys.readouterr()
    runs.train(cfg, tmp_path / "parts", mode="resume")
    assert "class distances" not in capsys.readouterr().out
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("damage", ["cut", "other", "shape"])
def test_a_damaged_file_is_told_and_made_anew(damage, tmp_path, capsys):
    source, *_ = of_a_network(tmp_path)
    found = source.provide()
    content = source.path.read_bytes()
    wrong = {
        "cut": content[:-5],
        "other": content.replace(b"last_map", b"last_mop"),
        "shape": content[:-4] + b"\0\0\0\1",
    }
    source.path.write_bytes(wrong[damage])
    capsys.readouterr()
    assert torch.equal(source.provide(), found)
    assert f"class distances: {source.path} is not used: " in capsys.readouterr().out.splitlines()[0]
    assert torch.equal(source.provide(), found)
    assert capsys.readouterr().out == f"class distances: read from {source.path}\n"


def test_the_command_computes_them_ahead(tmp_path, capsys):
    cfg = runs.write_config(tmp_path, METHOD, distiller=SETTINGS)
    roots = ["--checkpoint-root", str(tmp_path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert cache_main(["--cfg", str(cfg), "--distances", *roots]) == 0
    assert len([*(tmp_path / "out" / "teacher_cache" / "class_distances").glob("*.safetensors")]) == 1
    assert cache_main(["--cfg", str(cfg), "--distances", "--estimate", *roots]) == 2
    assert cache_main(["--cfg", str(runs.write_config(tmp_path)), "--distances", *roots]) == 2
    assert "the method 'kd' reads no distances between classes" in capsys.readouterr().err


def test_plain_images_are_the_training_images_as_they_are_evaluated():
    dataset = DATASETS.build("tiny", None, False, images=28)
    index = torch.tensor([4, 2, 9])
    plain = torch.cat([*dataset.plain_batches(index.numpy(), 2)])
    views = [dataset.train_batch(index, torch.full((3,), view)).image for view in range(dataset.num_views)]
    assert sum(torch.equal(plain, image) for image in views) == 1


def test_what_cannot_be_computed_is_refused(monkeypatch):
    source, _, dataset = of_a_network(None)
    dataset.labels = dataset.labels.clamp(min=1)
    given = {"fingerprints": {"teacher": "", "data": ""}, "root": None}
    with pytest.raises(UserError, match="need training images of each: class 0 has none"):
        ClassDistances(source._teacher, dataset, "logits", **given)
    dataset.labels = None
    with pytest.raises(UserError, match="need the labels of all training images"):
        ClassDistances(source._teacher, dataset, "logits", **given)
    monkeypatch.setattr(InMemoryDataset, "plain_batches", Dataset.plain_batches)
    with pytest.raises(UserError, match="InMemoryDataset has no plain_batches"):
        ClassDistances(source._teacher, dataset, "logits", **given)


def test_an_ensemble_has_logits_and_no_last_map(tmp_path):
    member = {"name": "tiny_net", "checkpoint": "teacher.pt"}
    cfg = runs.write_config(tmp_path, METHOD, distiller=SETTINGS, teacher={**member, "ensemble": [member]})
    with pytest.raises(UserError, match=r"teacher.ensemble: the method 'wkd_l' reads the teacher's features"):
        runs.experiment(cfg)
    assert runs.experiment(cfg, "distiller.distances=logits").class_distances is not None
