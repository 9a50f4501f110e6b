"""``mdistill eval``: run folders, their files, published checkpoints, and one clear line for each mistake."""

import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from mdistill.data import DATASETS, DataInfo
from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.models import MODELS

from ..conftest import refused

Train = Callable[..., int]
Evaluate = Callable[[Sequence[str]], int]


@pytest.mark.slow
def test_trains_and_evaluates_a_run_folder_and_its_files(
    capsys: pytest.CaptureFixture[str],
    train: Train,
    evaluate_tool: Evaluate,
    kd_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
) -> None:
    assert train(kd_cfg, "solver.epochs=2") == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("epoch ")]) == 2
    folder = tmp_path / "runs" / "tiny" / "kd" / "tiny_net_tiny_net" / "seed0"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    for what in (folder, folder / "student.pt", folder / "last.pt"):
        assert evaluate_tool([str(what), "--device", "cpu", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["model"] == "tiny_net"
        assert (result["top1"], result["top5"]) == (last["test/top1"], last["test/top5"])
        assert result["loss"] == pytest.approx(last["test/loss"], rel=1e-6)
        assert result["images_per_second"] > 0
    assert evaluate_tool([str(folder), "--device", "cpu"]) == 0
    assert "tiny_net  test (60 images)  top-1" in capsys.readouterr().out


def test_a_loss_without_cross_entropy_is_labelled(
    capsys: pytest.CaptureFixture[str],
    train: Train,
    evaluate_tool: Evaluate,
    kd_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
) -> None:
    assert train(kd_cfg, "distiller.ce_weight=0", "solver.epochs=1") == 0
    assert "loss: trained without cross-entropy" in capsys.readouterr().out
    folder = tmp_path / "runs/tiny/kd/tiny_net_tiny_net/ce_weight=0/seed0"
    assert "not comparable" in json.loads((folder / "env.json").read_text())["sessions"][0]["loss"]
    assert evaluate_tool([str(folder), "--device", "cpu"]) == 0
    assert "note: trained without cross-entropy" in capsys.readouterr().out
    assert evaluate_tool([str(folder), "--device", "cpu", "--json"]) == 0
    assert "not comparable" in json.loads(capsys.readouterr().out)["note"]


def test_evaluates_a_published_checkpoint(
    capsys: pytest.CaptureFixture[str], evaluate_tool: Evaluate, tmp_path: Path
) -> None:
    state = MODELS.build("resnet8", 10).state_dict()
    path = tmp_path / "ckpt_epoch_240.pth"
    torch.save(
        {"epoch": 240, "model": {f"module.{k}": v for k, v in state.items()}, "best_acc": torch.tensor(50.0)}, path
    )
    assert evaluate_tool(["--model", "resnet8", "--weights", str(path), "--data", "tiny", "--device", "cpu"]) == 0
    assert "resnet8  test (60 images)" in capsys.readouterr().out
    data = "{name: tiny, images: 20}"
    assert evaluate_tool(["--model", "resnet8", "--weights", str(path), "--data", data, "--device", "cpu"]) == 0


@pytest.mark.slow
def test_evaluates_a_released_student_of_rld(
    capsys: pytest.CaptureFixture[str],
    evaluate_tool: Evaluate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As its trainer writes ``student_best``: the bare student's state under "model", saved from a GPU; then zipped."""
    student = MODELS.build("resnet8x4", 10)
    file = tmp_path / "student_best"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        torch.save({"model": student.state_dict()}, file)
    archive = tmp_path / "RLD_student.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.write(file, "RLD_student/resnet32x4_resnet8x4")
    options = ["--model", "resnet8x4", "--data", "tiny", "--device", "cpu", "--weights"]
    assert evaluate_tool([*options, str(archive)]) == 2
    told = capsys.readouterr().err
    assert (
        "is a zip archive, not a torch checkpoint: unpack it and name a file in it (it holds: RLD_student/res" in told
    )
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(tmp_path)
    assert evaluate_tool([*options, str(tmp_path / "RLD_student/resnet32x4_resnet8x4"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ((images, target),) = DATASETS.build("tiny", tmp_path, False).eval_batches("test", 60)
    with torch.no_grad():
        top1 = (student.eval()(images).argmax(dim=1) == target).double().mean().item()
    assert result["top1"] == pytest.approx(100 * top1)


def test_code_that_a_run_folder_names_runs_only_when_it_is_asked_for(
    capsys: pytest.CaptureFixture[str],
    train: Train,
    evaluate_tool: Evaluate,
    student_cfg: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is found beside the original configuration; training from that file, and resuming, asks for nothing."""
    (tmp_path / "beside_cfg.py").write_text(
        "from pathlib import Path\nwith Path(__file__).with_name('loaded').open('a') as file:\n    file.write('x')\n"
    )
    student_cfg.write_text("imports: [beside_cfg]\n" + student_cfg.read_text())
    assert train(student_cfg, "solver.epochs=1") == 0

    def fresh() -> None:
        monkeypatch.delitem(sys.modules, "beside_cfg", raising=False)
        monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(tmp_path)])

    fresh()
    assert train(student_cfg, "solver.epochs=2", "--resume") == 0
    assert (tmp_path / "loaded").read_text() == "xx"
    arguments = [str(tmp_path / "runs/tiny/vanilla/tiny_net/seed0"), "--device", "cpu"]
    fresh()
    capsys.readouterr()
    line = refused(capsys, evaluate_tool(arguments))
    assert "imports: it names code, beside_cfg; code that a run folder names is run only when you name it" in line
    assert "(--import beside_cfg) or trust the folder (--trust)" in line
    line = refused(capsys, evaluate_tool([*arguments, "--import", "json"]))
    assert (tmp_path / "loaded").read_text() == "xx"
    for number, flags in enumerate((["--import", "beside_cfg"], ["--trust"]), start=3):
        fresh()
        assert evaluate_tool([*arguments, *flags]) == 0
        assert (tmp_path / "loaded").read_text() == number * "x"


def test_a_module_inside_a_run_folder_is_loaded_only_from_a_trusted_one(
    capsys: pytest.CaptureFixture[str], train: Train, evaluate_tool: Evaluate, student_cfg: Path, tmp_path: Path
) -> None:
    assert train(student_cfg, "solver.epochs=1") == 0
    folder = tmp_path / "runs/tiny/vanilla/tiny_net/seed0"
    (folder / "inside_run.py").write_text("from pathlib import Path\nPath(__file__).with_name('loaded').touch()\n")
    recorded = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(recorded.replace("imports: []", "imports: [inside_run]"))
    arguments = [str(folder), "--device", "cpu"]
    capsys.readouterr()
    refused(capsys, evaluate_tool(arguments))
    assert "no module 'inside_run'" in refused(capsys, evaluate_tool([*arguments, "--import", "inside_run"]))
    assert not (folder / "loaded").exists()
    assert evaluate_tool([*arguments, "--trust"]) == 0
    assert (folder / "loaded").exists()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "name one thing to evaluate"),
        (["nowhere", "--model", "resnet8"], "--model, --role and --data go with --weights"),
        (["nowhere"], "no run folder or checkpoint at nowhere"),
        (["--weights", "x.pt"], "--weights x.pt needs --model"),
        (
            ["--weights", "x.pt", "--model", "resnet9", "--data", "tiny"],
            "unknown model 'resnet9' in --model; did you mean",
        ),
        (["--weights", "x.pt", "--model", "resnet8", "--data", "tiny"], "x.pt"),
        (
            ["--weights", "x.pt", "--model", "resnet8", "--data", "tinny"],
            "unknown data set 'tinny' in --data; did you mean",
        ),
        (["--weights", "x.pt", "--model", "resnet8", "--data", "{name: tiny"], "--data: '{name: tiny': not YAML"),
        (["--weights", "x.pt", "--model", "resnet8", "--data", "{nam: tiny}"], "--data: should be a name or {name"),
        (["--weights", "x.pt", "--model", "resnet8", "--data", "{name: tiny, x: 1}"], "--data: x: unknown key"),
        (["nowhere", "--batch-size", "0"], "--batch-size: should be at least 1, found 0"),
        (["--weights", "x.pt", "--model", "resnet8", "--data", "tiny", "--split", "val"], "no split 'val' here"),
        (["nowhere", "--teacher-model", "resnet8"], "--teacher-model NAME and --teacher-weights FILE go together"),
        (["nowhere", "--teacher", "--teacher-model", "x", "--teacher-weights", "y"], "give one of them"),
        (
            ["--weights", "x.pt", "--model", "resnet8", "--teacher"],
            "--teacher goes with a run folder; give --teacher-mo",
        ),
        (["nowhere", "--predictions", "student.pt"], "should be a file whose name ends in .npz, found student.pt"),
    ],
)
def test_eval_bad_input_is_one_line(
    arguments: list[str], pattern: str, capsys: pytest.CaptureFixture[str], evaluate_tool: Evaluate
) -> None:
    assert pattern in refused(capsys, evaluate_tool([*arguments, "--device", "cpu"]))


class ProjectedStudent(nn.Module):
    """The student and a layer behind it: what a method may leave instead of the bare student."""

    def __init__(self, network: nn.Module, projector: nn.Linear) -> None:
        super().__init__()
        self.network, self.projector = network, projector

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.network(x))


@DISTILLERS.register("projected")
class Projected(Distiller):
    """Its student at inference is another network than the one that is configured."""

    needs = Needs(teacher="logits")

    def __init__(self, student: nn.Module, teacher: nn.Module, data: DataInfo, **shared: Any) -> None:
        super().__init__(student, teacher, data, **shared)
        self.projector = nn.Linear(data.num_classes, data.num_classes)

    def students(self) -> dict[str, nn.Module]:
        return {"student": ProjectedStudent(self.student, self.projector), "bare": self.student}

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        difference = self.projector(signals.student_logits) - signals.teacher_logits
        return {"projected": difference.square().mean()}


@pytest.mark.usefixtures("teacher_file")
def test_a_student_that_is_another_network_is_rebuilt_through_its_method(
    capsys: pytest.CaptureFixture[str], train: Train, evaluate_tool: Evaluate, kd_cfg: Path, tmp_path: Path
) -> None:
    kd_cfg.write_text(kd_cfg.read_text().split("distiller:")[0] + "distiller: {name: projected, ce_weight: 1.0}\n")
    assert train(kd_cfg, "solver.epochs=1") == 0
    folder = tmp_path / "runs" / "tiny" / "projected" / "tiny_net_tiny_net" / "seed0"
    recorded = json.loads((folder / "metrics.jsonl").read_text())
    capsys.readouterr()
    for what, key in (
        (folder, "test/loss"),
        (folder / "student.pt", "test/loss"),
        (folder / "bare.pt", "bare/test/loss"),
    ):
        assert evaluate_tool([str(what), "--device", "cpu", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(recorded[key], rel=1e-6)
    assert recorded["test/loss"] != recorded["bare/test/loss"]


@pytest.fixture
def kd_folder(
    train: Train, kd_cfg: Path, teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Path:
    """A run whose teacher is ``teacher_file``."""
    assert train(kd_cfg, "solver.epochs=1") == 0
    capsys.readouterr()
    return tmp_path / "runs" / "tiny" / "kd" / "tiny_net_tiny_net" / "seed0"


def test_a_student_is_compared_with_its_teacher(
    capsys: pytest.CaptureFixture[str], evaluate_tool: Evaluate, kd_folder: Path, teacher_file: Path, tmp_path: Path
) -> None:
    """Figures against a plain loop over what both networks say of the images."""
    out = tmp_path / "out.npz"
    flags = ["--device", "cpu", "--checkpoint-root", str(tmp_path), "--teacher", "--per-class"]
    assert evaluate_tool([str(kd_folder), *flags, "--json", "--predictions", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    networks = [MODELS.build("tiny_net", 10, width=width) for width in (16, 32)]
    for network, file in zip(networks, (kd_folder / "student.pt", teacher_file), strict=True):
        network.load_state_dict(torch.load(file, weights_only=True)["model"])
    ((images, target),) = DATASETS.build("tiny", tmp_path, False).eval_batches("test", 60)
    with torch.no_grad():
        student, teacher = (network.eval()(images).double() for network in networks)
    same = (student.argmax(dim=1) == teacher.argmax(dim=1)).double().mean()
    p, q = teacher.softmax(dim=1), student.softmax(dim=1)
    assert result["teacher"] == {
        "model": "tiny_net",
        "top1": pytest.approx(100 * float((teacher.argmax(dim=1) == target).double().mean())),
        "agreement": pytest.approx(100 * float(same)),
        "kl": pytest.approx(float((p * (p / q).log()).sum(dim=1).mean()), rel=1e-4),
    }
    assert [each["images"] for each in result["per_class"]] == [6] * 10
    assert sum(each["top1"] for each in result["per_class"]) / 10 == pytest.approx(result["top1"])
    assert sum(each["images"] for each in result["calibration"]) == 60
    gaps = [each["images"] * abs(each["top1"] - each["confidence"]) for each in result["calibration"] if each["images"]]
    assert result["ece"] == pytest.approx(sum(gaps) / 60)
    with numpy.load(out, allow_pickle=False) as arrays:
        assert {*arrays} == {"logits", "labels", "names", "teacher_logits"}
        assert arrays["logits"] == pytest.approx(student.numpy(), rel=1e-4, abs=1e-5)
        assert arrays["teacher_logits"] == pytest.approx(teacher.numpy(), rel=1e-4, abs=1e-5)
        assert arrays["labels"].tolist() == target.tolist()
        assert arrays["names"].dtype.kind == "U"
    assert evaluate_tool([str(kd_folder), *flags]) == 0
    first, second, header, _, *rows = capsys.readouterr().out.splitlines()
    assert f"  ECE {result['ece']:.2f}  " in first
    assert second.startswith(
        f"teacher tiny_net  top-1 {result['teacher']['top1']:.2f}  agreement {100 * same:.2f}  KL("
    )
    assert header.split() == ["class", "images", "top-1"]
    assert len(rows) == 10


def test_another_teacher_is_named_or_refused(
    capsys: pytest.CaptureFixture[str], evaluate_tool: Evaluate, kd_folder: Path, teacher_file: Path, tmp_path: Path
) -> None:
    flags = ["--device", "cpu", "--json"]
    twin = ["--teacher-model", "tiny_net", "--teacher-weights", str(kd_folder / "student.pt")]
    lone = ["--model", "tiny_net", "--weights", str(kd_folder / "student.pt"), "--data", "tiny"]
    for what in ([str(kd_folder)], lone):
        assert evaluate_tool([*what, *twin, *flags]) == 0
        result = json.loads(capsys.readouterr().out)["teacher"]
        assert (result["agreement"], result["kl"]) == (100.0, pytest.approx(0, abs=1e-6))
    own = [str(kd_folder), "--teacher", "--checkpoint-root", str(tmp_path), *flags]
    state = torch.load(teacher_file, weights_only=True)
    state["model"]["classifier.bias"] += 1
    torch.save(state, teacher_file)
    told = refused(capsys, evaluate_tool(own))
    assert "teacher.pt under" in told
    assert "is not the teacher that the run in" in told
    assert "its fingerprint was " in told
    teacher_file.unlink()
    assert "teacher.checkpoint: no tiny_net weights at" in refused(capsys, evaluate_tool(own))


def test_a_run_without_a_teacher_has_none_to_compare_with(
    capsys: pytest.CaptureFixture[str], train: Train, evaluate_tool: Evaluate, student_cfg: Path, tmp_path: Path
) -> None:
    assert train(student_cfg, "solver.epochs=1") == 0
    capsys.readouterr()
    folder = tmp_path / "runs/tiny/vanilla/tiny_net/seed0"
    assert "has none; give --teacher-model" in refused(
        capsys, evaluate_tool([str(folder), "--teacher", "--device", "cpu"])
    )


def test_predictions_that_cannot_be_written_leave_the_old_ones(
    capsys: pytest.CaptureFixture[str], evaluate_tool: Evaluate, kd_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.npz"
    out.write_bytes(b"old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy, "savez", failing)
        line = refused(capsys, evaluate_tool([str(kd_folder), "--device", "cpu", "--predictions", str(out)]), 1)
    assert f"could not write {out}: [Errno 28]" in line
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert evaluate_tool([str(kd_folder), "--device", "cpu", "--predictions", str(out)]) == 0
    with numpy.load(out, allow_pickle=False) as arrays:
        assert arrays["logits"].shape == (60, 10)


def failing(file: Any, **_: Any) -> None:
    """``numpy.savez`` on a disk that is full."""
    file.write(b"half")
    raise OSError(28, "No space left on device")
