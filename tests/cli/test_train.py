"""``mdistill train``, as a user meets it: help, output, one clear line for each mistake."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from mdistill.engine.run_folder import read_metrics
from mdistill.models import MODELS
from mdistill.reporting.statistics import mean_std_text

from ..conftest import refused

ROOT = Path(__file__).resolve().parents[2]
Train = Callable[..., int]


def test_help_teaches(capsys: pytest.CaptureFixture[str], train: Train) -> None:
    with pytest.raises(SystemExit):
        train(Path("x"), "--help")
    text = capsys.readouterr().out
    for word in ("--resume", "--overwrite", "--dry-run", "examples:", "exit codes:", "solver.lr=0.1", "student.pt"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--overwite"], "error: unrecognized arguments: --overwite; did you mean '--overwrite'? (see --help)"),
        (["--seed", "abc"], "error: argument --seed: invalid int value: 'abc' (see --help)"),
        (["--output", ""], "error: argument --output: found '', which names no file or folder (see --help)"),
        (
            ["--data-root", "\udcff"],
            "error: argument --data-root: found '\\udcff', which is no UTF-8 text (see --help)",
        ),
        (["--resume", "--overwrite"], "error: argument --overwrite: not allowed with argument --resume (see --help)"),
    ],
)
def test_flags_are_refused_in_one_line(
    arguments: list[str], pattern: str, capsys: pytest.CaptureFixture[str], train: Train, student_cfg: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        train(student_cfg, *arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err == pattern + "\n"


def test_print_config_is_complete_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], train: Train, kd_cfg: Path, tmp_path: Path
) -> None:
    assert train(kd_cfg, "--print-config", "distiller.temperature=2", "--seed", "4") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["distiller"]["temperature"] == 2.0
    assert printed["seed"] == 4
    assert printed["distiller"]["warmup_epochs"] == 0
    assert not (tmp_path / "runs").exists()


def test_dry_run_does_a_step_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], train: Train, kd_cfg: Path, teacher_file: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert train(kd_cfg, "--dry-run") == 0
    assert "dry run: one step of 64 images on cpu, loss" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_folder_is_a_teacher(train: Train, student_cfg: Path, kd_cfg: Path, tmp_path: Path) -> None:
    assert train(student_cfg, "solver.epochs=1", "student.width=32") == 0
    arguments = ["solver.epochs=1", "teacher.checkpoint=runs/tiny/vanilla/tiny_net/width=32/seed0"]
    assert train(kd_cfg, *arguments) == 0


def test_teacher_is_checked_once_against_its_expected_accuracy(
    capsys: pytest.CaptureFixture[str], train: Train, kd_cfg: Path, teacher_file: Path, tmp_path: Path
) -> None:
    line = refused(capsys, train(kd_cfg, "teacher.expected_top1=90"))
    assert "teacher.expected_top1: " in line
    assert "the configuration expects 90.00 (within 1)" in line
    measured = float(line.split(" reaches ")[1].split(" ")[0])
    (known,) = json.loads((tmp_path / "runs" / "teachers.json").read_text().replace("'", '"')).items()
    assert known[1] == pytest.approx(measured, abs=0.01)
    assert train(kd_cfg, f"teacher.expected_top1={measured + 0.5:.2f}", "solver.epochs=1") == 0


def test_missing_teacher_says_both_ways_to_get_one(
    capsys: pytest.CaptureFixture[str], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    line = refused(capsys, train(Path("configs/cifar100/kd/res32x4_res8x4.yaml")))
    assert f"no resnet32x4 weights at {tmp_path}/cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth" in line
    assert "`python tools/train.py --cfg configs/cifar100/vanilla/resnet32x4.yaml`" in line
    assert "cifar_teachers.tar from the releases of megvii-research/mdistiller" in line
    line = refused(capsys, train(Path("configs/quickstart/kd/vgg8_res8.yaml")))
    assert "`python tools/train.py --cfg configs/quickstart/vanilla/vgg8.yaml`" in line
    assert "cifar_teachers.tar" not in line
    assert not (tmp_path / "runs").exists()


class Hostile:
    """A pickle of this would make a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["other model", "other classes", "truncated", "text", "hostile"])
def test_bad_teacher_files(
    kind: str,
    capsys: pytest.CaptureFixture[str],
    train: Train,
    kd_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
) -> None:
    trap = tmp_path / "executed"
    if kind == "other model":
        torch.save({"model": MODELS.build("resnet8", 10).state_dict()}, teacher_file)
    elif kind == "other classes":
        torch.save({"model": MODELS.build("tiny_net", 7, width=32).state_dict()}, teacher_file)
    elif kind == "truncated":
        teacher_file.write_bytes(teacher_file.read_bytes()[:-200])
    elif kind == "text":
        teacher_file.write_text("<html>not found</html>")
    else:
        teacher_file.write_bytes(pickle.dumps({"model": Hostile(trap)}))
    line = refused(capsys, train(kd_cfg))
    assert str(teacher_file) in line
    expected = {
        "other model": "resnet8",
        "other classes": "7 classes",
        "truncated": "truncated",
        "text": "is not a torch checkpoint",
        "hostile": "mkdir",
    }
    assert expected[kind] in line
    assert not trap.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--device", "tpu"], "--device: unknown device 'tpu' (allowed: cpu, cuda, cuda:N)"),
        (["distiller.kd_weight=0", "distiller.ce_weight=0"], "ce_weight"),
        (["data.holdout=150"], "data.holdout"),
        (["teacher=null"], "needs a teacher and the configuration has none"),
        (["distiller.name=vanilla"], "distiller.kd_weight: unknown key"),
        (["data.batch_size=0"], "data.batch_size: should be greater than 0, found 0"),
        (["solver.epochs=-1"], "solver.epochs: should be greater than 0, found -1"),
        (["solver.lr=nan"], "solver.lr: should be"),
        (["solver.nesterov=true", "solver.momentum=0"], "solver.nesterov: true needs solver.momentum above 0, found 0"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    pattern: str,
    capsys: pytest.CaptureFixture[str],
    train: Train,
    kd_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
) -> None:
    code = train(kd_cfg, *arguments)
    err = capsys.readouterr().err
    assert code == 2
    assert pattern in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device(capsys: pytest.CaptureFixture[str], train: Train, student_cfg: Path) -> None:
    line = refused(capsys, train(student_cfg, "--device", "cuda"))
    assert line == "error: --device: cuda asked for, but this machine has 0 usable CUDA devices; use cpu"


def test_a_run_that_is_there_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], train: Train, kd_cfg: Path, teacher_file: Path
) -> None:
    assert train(kd_cfg, "solver.epochs=1") == 0
    capsys.readouterr()
    assert "already holds a run with 1 epochs done: continue it with --resume" in refused(capsys, train(kd_cfg))
    kd_cfg.write_text(kd_cfg.read_text().replace("kd_weight: 0.9", "kd_weight: 0.8"))
    assert "distiller.kd_weight: was 0.9, now 0.8" in refused(capsys, train(kd_cfg, "--resume"))
    kd_cfg.write_text(kd_cfg.read_text().replace("kd_weight: 0.8", "kd_weight: 0.9"))
    torch.save({"model": MODELS.build("tiny_net", 10, width=32).state_dict()}, teacher_file)
    assert "cannot resume with another teacher" in refused(capsys, train(kd_cfg, "--resume"))


def test_damaged_data(capsys: pytest.CaptureFixture[str], train: Train, student_cfg: Path, tmp_path: Path) -> None:
    student_cfg.write_text(student_cfg.read_text() + "data: {name: cifar100}\n")
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"\x80\x02half")
    assert str(folder) in refused(capsys, train(student_cfg, "--data-root", str(tmp_path)))


def test_queue_smaller_than_the_batch(
    capsys: pytest.CaptureFixture[str], train: Train, kd_cfg: Path, teacher_file: Path
) -> None:
    settings = "ce_weight: 0, temperature: 0.2, queue_size: 32, instance: true, sample: true, category: true"
    head = kd_cfg.read_text().splitlines()[:-1]
    kd_cfg.write_text("\n".join([*head, f"distiller: {{name: mcld, {settings}}}"]) + "\n")
    line = refused(capsys, train(kd_cfg))
    assert "distiller.queue_size: 32 is smaller than the batch size 64" in line


def test_warning_for_milestones_past_the_end(
    capsys: pytest.CaptureFixture[str], train: Train, student_cfg: Path
) -> None:
    assert train(student_cfg, "solver.milestones=[9]", "--dry-run") == 0
    assert "warning: " in (err := capsys.readouterr().err)
    assert "solver.milestones: [9] lie at or past the last epoch (3)" in err


def test_missing_data_folder(
    capsys: pytest.CaptureFixture[str], train: Train, student_cfg: Path, tmp_path: Path
) -> None:
    student_cfg.write_text(student_cfg.read_text() + "data: {name: cifar100}\n")
    line = refused(capsys, train(student_cfg, "--data-root", str(tmp_path / "nowhere")))
    assert "nowhere" in line
    assert "--download" in line


@pytest.mark.parametrize("width", [9223372036854775807, -5])
def test_a_network_that_torch_cannot_make_is_told_with_its_settings(
    width: int, capsys: pytest.CaptureFixture[str], train: Train, student_cfg: Path
) -> None:
    line = refused(capsys, train(student_cfg, f"student.width={width}"))
    assert line.startswith(f"error: student.name: 'tiny_net' cannot be built with {{'width': {width}}}: ")


def test_a_network_of_another_width_of_output(
    capsys: pytest.CaptureFixture[str], train: Train, student_cfg: Path
) -> None:
    if "two_outputs" not in MODELS.names():
        MODELS.register("two_outputs")(lambda num_classes: MODELS.build("tiny_net", 2))
    student_cfg.write_text(student_cfg.read_text().replace("tiny_net", "two_outputs"))
    line = refused(capsys, train(student_cfg))
    assert "student.name: 'two_outputs' turns 2 images into an output of shape (2, 2)" in line
    assert "10 classes" in line


def test_an_output_root_that_cannot_be_made(
    capsys: pytest.CaptureFixture[str], train: Train, kd_cfg: Path, teacher_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("a file")
    assert train(kd_cfg, "teacher.expected_top1=10") in {1, 2}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "runs" in line


@pytest.mark.slow
def test_several_seeds_end_with_their_mean(
    capsys: pytest.CaptureFixture[str], train: Train, student_cfg: Path, tmp_path: Path
) -> None:
    assert train(student_cfg, "solver.epochs=1", "--seeds", "0,1") == 0
    ends = [read_metrics(path.parent)[-1]["test/top1"] for path in sorted(tmp_path.rglob("metrics.jsonl"))]
    assert len(ends) == 2
    line = f"test top-1 after the last epoch: {mean_std_text(ends)} over seeds 0, 1"
    assert line in capsys.readouterr().out.splitlines()
