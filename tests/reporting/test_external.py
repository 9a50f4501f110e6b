"""Runs of other projects: their logs and checkpoints, in the formats that their code writes."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdistill.cli.import_ import main
from mdistill.models import MODELS
from mdistill.reporting.external import (
    EpochFigures,
    Measured,
    best_of,
    names_of,
    parse_printed,
    parse_worklog,
    read_external,
    read_folder,
    settings_of,
)

from ..conftest import refused

RULE = "-" * 25


def worklog(epochs: dict[int, float], lr: str = "0.05") -> str:
    """As ``BaseTrainer.log`` of mdistiller writes it."""
    blocks = [
        f"{RULE}\nepoch: {epoch}\nlr: {lr}\ntrain_acc: 9.26\ntrain_loss: 6.84\ntest_acc: {top1:.2f}\n"
        f"test_acc_top5: 44.73\ntest_loss: 3.42\n{RULE}\n"
        for epoch, top1 in epochs.items()
    ]
    return "".join(blocks) + f"best_acc\t{max(epochs.values()):.2f}"


def test_a_worklog() -> None:
    text = worklog({1: 17.2, 2: 30.0, 3: 29.5})
    epochs = parse_worklog(text)
    assert epochs == [EpochFigures(1, 17.2, 44.73), EpochFigures(2, 30.0, 44.73), EpochFigures(3, 29.5, 44.73)]
    assert best_of(epochs) == epochs[1]
    resumed = parse_worklog(text + "\n" + worklog({3: 31.0, 4: 32.0}, lr="0.050000"))
    assert [(each.epoch, each.top1) for each in resumed] == [(1, 17.2), (2, 30.0), (3, 31.0), (4, 32.0)]
    assert len(parse_worklog(text.replace("test_acc: 30.00", "test_acc: nan"))) == 2
    assert parse_worklog("no log") == []


@pytest.mark.parametrize(
    ("epoch", "top1", "top5"),
    [
        ("inf", "50", "80"),
        ("-1", "50", "80"),
        ("1e30", "50", "80"),
        pytest.param("9" * 5000, "50", "80", id="digits"),
        ("0", "50", "80"),
        ("7", "170.0", "80"),
        ("7", "1.2.3", "4"),
        ("7", "nan", "80"),
    ],
)
def test_a_figure_that_can_be_none_is_left_out(epoch: str, top1: str, top5: str) -> None:
    assert parse_worklog(f"epoch: {epoch}\ntest_acc: {top1}\ntest_acc_top5: {top5}\n") == []
    assert parse_printed(f"epoch {epoch}, total time 3\n * Acc@1 {top1} Acc@5 {top5}\n") == []


def test_a_top_5_that_can_be_none_leaves_the_top_1() -> None:
    for top5 in ("800.0", "1.2.3"):
        assert parse_worklog(f"epoch: 7\ntest_acc: 50.0\ntest_acc_top5: {top5}\n") == [EpochFigures(7, 50.0)]
        assert parse_printed(f"epoch 7, total time 3\n * Acc@1 50.0 Acc@5 {top5}\n") == [EpochFigures(7, 50.0)]


def test_what_repdistiller_prints() -> None:
    text = (
        "==> training...\nEpoch: [1][0/782]\tTime 1.0 (1.0)\tAcc@1 1.562 (1.562)\n * Acc@1 9.260 Acc@5 27.000\n"
        "epoch 1, total time 34.56\nTest: [0/157]\tAcc@1 20.000 (20.000)\n * Acc@1 17.200 Acc@5 44.730\n"
        "saving the best model!\n==> training...\n * Acc@1 12.000 Acc@5 30.000\nepoch 2, total time 33.00\n"
        " * Acc@1 22.500 Acc@5 50.000\nbest accuracy: tensor(22.5000, device='cuda:0')\n"
    )
    assert parse_printed(f"teacher accuracy:  tensor(72.3)\n * Acc@1 72.340 Acc@5 91.000\n{text}") == [
        EpochFigures(1, 17.2, 44.73),
        EpochFigures(2, 22.5, 50.0),
    ]


def test_a_folder_of_mdistiller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cifar100_baselines" / "kd,res56,res20"
    folder.mkdir(parents=True)
    (folder / "worklog.txt").write_text(worklog({1: 17.2, 240: 70.55, 230: 70.9}))
    (folder / "student_latest").write_bytes(b"weights")
    assert main([str(folder), "--source", "a lab", "--results", str(tmp_path / "results")]) == 0
    place = tmp_path / "results/external/cifar100/kd/resnet56_resnet20/a-lab/cifar100_baselines-kd,res56,res20"
    line = f"kd resnet56 -> resnet20, 240 epochs, last 70.55, best 70.90: {place}\n"
    assert capsys.readouterr().out == line
    external = read_external(place)
    assert (external.project, external.method, external.accuracy("last")) == ("mdistiller", "kd", 70.55)
    assert set(external.files) == {"worklog.txt", "student_latest"}
    assert main([str(folder), "--source", "a lab", "--results", str(tmp_path / "results")]) == 0  # the same again
    (folder / "worklog.txt").write_text(worklog({240: 71.0}))
    code = main([str(folder), "--source", "a lab", "--results", str(tmp_path / "results")])
    assert refused(capsys, code).endswith("holds another run: tell them apart with --trial")


def test_a_folder_of_rld_says_in_its_config_what_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "some,thing" / "2024-09-01 10:00:00"
    folder.mkdir(parents=True)
    (folder / "worklog.txt").write_text(worklog({240: 76.64}, lr="0.000050"))
    (folder / "config.txt").write_text(
        "DATASET:\n  TYPE: cifar100\nDISTILLER:\n  STUDENT: ShuffleV2\n  TEACHER: resnet32x4\n  TYPE: RLD\n"
    )
    assert main([str(folder), "--results", str(tmp_path / "results")]) == 0
    (file,) = (tmp_path / "results").rglob("external.json")
    external = read_external(file.parent)
    assert (external.method, external.teacher, external.student) == ("rld", "resnet32x4", "shufflenet_v2")
    assert external.trial == "2024-09-01 10:00:00"
    assert external.settings.startswith("config.txt ")
    config = folder / "config.txt"
    config.write_text(config.read_text() + "EXPERIMENT:\n  NAME: other\nLOG:\n  PREFIX: there\n")
    same = settings_of(folder)["settings"]
    config.write_text(config.read_text().replace("NAME: other", "NAME: third"))
    assert settings_of(folder)["settings"] == same
    config.write_text(config.read_text().replace("NAME: third", "LOGIT_STAND: true"))
    assert settings_of(folder)["settings"] != same


def test_a_log_that_stands_alone(tmp_path: Path) -> None:
    log = tmp_path / "dkd,wrn_40_2,MobileNetV2,2,15,2.0.txt"
    log.write_text(worklog({240: 69.0}))
    assert main([str(log), "--label", "LSKD + DKD", "--results", str(tmp_path / "results")]) == 0
    (file,) = (tmp_path / "results").rglob("external.json")
    external = read_external(file.parent)
    assert (external.label, external.teacher, external.student) == ("LSKD + DKD", "wrn_40_2", "mobilenet_v2")


@pytest.mark.parametrize(
    ("name", "student", "settings"),
    [
        ("S:resnet8_T:resnet14_cifar100_kd_r:0.1_a:0.9_b:0.0_2", "resnet8", "r:0.1 a:0.9 b:0.0"),
        ("kd,res56,res20", "res20", ""),
        ("dkd,wrn_40_2,MobileNetV2,2,15,2.0.txt", "MobileNetV2", "2 15 2.0"),
        (
            "kd,vgg13,MobileNetV2KD.TEMPERATURE:4,KD.LOSS.CE_WEIGHT:0.5",
            "MobileNetV2",
            "KD.TEMPERATURE:4 KD.LOSS.CE_WEIGHT:0.5",
        ),
    ],
)
def test_settings_in_names(name: str, student: str, settings: str) -> None:
    found = names_of(Path(name))
    assert (found["student"], found["settings"]) == (student, settings)


def test_runs_of_repdistiller_with_other_settings_lie_apart(tmp_path: Path) -> None:
    for weights in ("r:0.1_a:0.9", "r:1.0_a:3.0"):
        log = tmp_path / f"S:resnet8_T:resnet14_cifar100_kd_{weights}_b:0.0_1"
        log.write_text("epoch 1, total time 3\n * Acc@1 17.2 Acc@5 44.7\n")
        assert main([str(log), "--results", str(tmp_path / "results")]) == 0
    found = [read_external(file.parent) for file in sorted((tmp_path / "results").rglob("external.json"))]
    assert [(each.settings, each.trial) for each in found] == [("r:0.1 a:0.9 b:0.0", "1"), ("r:1.0 a:3.0 b:0.0", "1")]


def rep_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "S:resnet8_T:resnet14_cifar100_kd_r:0.1_a:0.9_b:0.0_2"
    folder.mkdir()
    state = MODELS.build("resnet8", 10).state_dict()
    torch.save({"epoch": 200, "model": state, "accuracy": torch.tensor(59.0)}, folder / "ckpt_epoch_200.pth")
    torch.save({"epoch": 240, "model": state, "accuracy": torch.tensor(60.25)}, folder / "ckpt_epoch_240.pth")
    torch.save({"epoch": 233, "model": state, "best_acc": torch.tensor(60.5)}, folder / "resnet8_best.pth")
    torch.save({"opt": Namespace(alpha=0.9), "model": state}, folder / "resnet8_last.pth")
    return folder


def test_a_folder_of_repdistiller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = rep_folder(tmp_path)
    run = read_folder(folder)
    assert (run.last, run.best) == (EpochFigures(240, 60.25), EpochFigures(233, 60.5))
    assert {what: path.name for what, path in run.students.items()} == {
        "last": "resnet8_last.pth",
        "best": "resnet8_best.pth",
    }
    assert main([str(folder), "--results", str(tmp_path / "results")]) == 0
    (file,) = (tmp_path / "results").rglob("external.json")
    external = read_external(file.parent)
    assert (external.teacher, external.student, external.trial) == ("resnet14", "resnet8", "2")
    assert set(external.files) == {"ckpt_epoch_240.pth", "resnet8_last.pth", "resnet8_best.pth"}
    other = torch.load(folder / "ckpt_epoch_240.pth") | {"accuracy": torch.tensor(61.0)}
    torch.save(other, folder / "ckpt_epoch_240.pth")
    code = main([str(folder), "--results", str(tmp_path / "results")])
    assert refused(capsys, code).endswith("holds another run: tell them apart with --trial")
    assert read_external(file.parent) == external


def test_what_was_measured_stays_where_the_same_run_is_imported_again(tmp_path: Path) -> None:
    log = tmp_path / "kd,resnet56,resnet20"
    log.mkdir()
    (log / "worklog.txt").write_text(worklog({240: 70.5}))
    given = [str(log), "--results", str(tmp_path / "results")]
    assert main(given) == 0
    (file,) = (tmp_path / "results").rglob("external.json")
    measured = {"last": Measured("student_latest", "a" * 64, 71.23)}
    file.write_text(replace(read_external(file.parent), measured=measured).to_json())
    assert main(given) == 0
    assert read_external(file.parent).accuracy("last") == 71.23


@pytest.mark.slow
def test_students_are_measured_on_request(tmp_path: Path) -> None:
    folder = rep_folder(tmp_path)
    given = ["--results", str(tmp_path / "results"), "--dataset", "tiny", "--evaluate", "--device", "cpu"]
    assert main([str(folder), *given]) == 0
    (file,) = (tmp_path / "results").rglob("external.json")
    external = read_external(file.parent)
    assert set(external.measured) == {"last", "best"}
    assert external.accuracy("last") == external.measured["last"].top1 < 60.25


@pytest.mark.parametrize(
    ("name", "flags", "line"),
    [
        ("nowhere", [], "no such folder or log: "),
        ("empty", [], "neither worklog.txt, as mdistiller and RLD write it, nor *.pth, as RepDistiller does"),
        ("x.txt", [], "no epoch in it, neither as worklog.txt of mdistiller nor as RepDistiller prints them"),
        ("log", [], "its name does not tell which method it is of: give --method, --student and --teacher"),
        (
            "log",
            ["--method", "rl", "--student", "resnet8"],
            "'rl' is none of our methods; did you mean 'rld'? (--method says",
        ),
        ("infinite", [], "no epoch in it, neither as worklog.txt of mdistiller nor as RepDistiller prints them"),
        ("log", ["--method", "kd"], "its name does not tell its student: give --student"),
        ("log", ["--method", "kd", "--student", "resnet9"], "unknown model 'resnet9' in --student of "),
        ("log", ["--method", "kd", "--student", "resnet8", "--evaluate"], "--evaluate: there are no students in it"),
    ],
)
def test_a_mistake_is_one_line(
    name: str, flags: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("nothing")
    (tmp_path / "infinite").write_text("epoch: inf\ntest_acc: 50.0\n * Acc@1 1.2.3 Acc@5 4\n")
    (tmp_path / "log").write_text(worklog({1: 2.0}))
    assert line in refused(capsys, main([str(tmp_path / name), *flags, "--results", str(tmp_path / "results")]))
    assert not (tmp_path / "results").exists()
