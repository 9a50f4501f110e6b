"""``mdistill transfer`` as a command: a run, a file that stands alone, a table's runs, and mistakes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mdistill.cli.main import main
from mdistill.reporting.transfers import read_transfer

from ..conftest import TinyNet, refused
from ..pictures import fill, write_stl10

Train = Callable[..., int]
QUICK = ["epochs=3", "milestones=[2]", "lr=0.05"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with STL-10 and a folder of images in ``data`` and a file of weights."""
    monkeypatch.chdir(tmp_path)
    write_stl10(tmp_path / "data")
    fill(tmp_path / "data" / "photos")
    torch.manual_seed(0)
    torch.save({"model": TinyNet(10, 16).state_dict()}, "w.pt")
    return tmp_path


def transfer(*arguments: str) -> int:
    return main(["transfer", "--device", "cpu", *arguments])


@pytest.mark.slow
def test_what_a_run_reaches_goes_into_its_folder(
    place: Path, train: Train, student_cfg: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(student_cfg, "solver.epochs=1", "seed=3") == 0
    folder = Path("runs/tiny/vanilla/tiny_net/seed3")
    student = (folder / "student.pt").read_bytes()
    capsys.readouterr()
    assert transfer(str(folder), "--target", "stl10", "--target", "folder:photos", *QUICK) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder} (tiny_net) to stl10: top-1 ")
    assert lines[1].endswith(f"{folder}/transfer/folder-photos.json")
    found = read_transfer(folder / "transfer" / "stl10.json")
    assert (found.seed, found.settings.epochs, found.settings.batch_size, found.feature.width) == (3, 3, 64, 16)
    assert (found.data.classes, found.data.train_images, found.data.test_images) == (10, 30, 20)
    assert (found.mean, found.std) == ([0.5] * 3, [0.25] * 3)  # the student's
    assert {"commit", "versions", "device", "code", "started"} <= found.environment.keys()
    assert (folder / "student.pt").read_bytes() == student
    assert transfer(str(folder / "student.pt"), "--target", "stl10", *QUICK, "mirror=true") == 0
    again = read_transfer(folder / "transfer" / "stl10.json")
    assert (again.settings.mirror, again.data.fingerprint) == (True, found.data.fingerprint)
    assert transfer(str(folder / "last.pt"), "--target", "stl10", *QUICK) == 0
    assert capsys.readouterr().out.endswith("(not recorded)\n")
    assert read_transfer(folder / "transfer" / "stl10.json") == again


def test_a_file_that_stands_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = ["--model", "tiny_net", "--weights", "w.pt", "--data", "tiny", "--target", "stl10", *QUICK]
    assert transfer(*alone, "--json", "--record", "out.json", "normalize=target", "--seed", "7") == 0
    told = json.loads(capsys.readouterr().out)
    found = json.loads(Path("out.json").read_text())
    assert told["top1"] == found["top1"]
    assert (found["run"], found["seed"], found["mean"][0]) == (None, 7, 0.4467)
    assert transfer(*alone, "normalize=half", "image_size=16", "resize=nearest", "standardize=true") == 0
    assert "(not recorded)" in capsys.readouterr().out


TABLE = """title: Mine
dataset: cifar100
metrics: [stl10/top1, folder-photos/top1]
transfer: {epochs: 2, milestones: []}
pairs:
  - name: small
    teacher: {name: tiny_net, checkpoint: w.pt}
    student: {name: tiny_net}
    data: {name: tiny}
methods:
  - {name: alone, method: vanilla, settings: {ce_weight: 1.0}}
  - {name: KD, method: kd, settings: {ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}}
seeds: [0, 1]
set: [solver.epochs=1, "solver.milestones=[]"]
"""


@pytest.mark.slow
def test_the_runs_of_a_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(TABLE)
    train = ["train", "--cfg", "mine.yaml", "--pair", "small", "--device", "cpu", "--checkpoint-root", "."]
    for row in ("alone", "KD"):
        assert main([*train, "--row", row, "--seed", "0"]) == 0
    table = ["--table", "mine.yaml"]
    capsys.readouterr()
    assert main(["table", "run", "mine.yaml", "--device", "cpu", "--checkpoint-root", ".", "--seeds", "0"]) == 0
    ended = capsys.readouterr().out.splitlines()[-1]
    assert ended == (
        "2 of them are still to be transferred to stl10 or folder-photos: mdistill transfer --table mine.yaml"
    )
    assert transfer(*table, "--methods", "KD") == 0
    told = capsys.readouterr()
    assert "folder-photos: left out; say where it is with --target folder:PATH" in told.err
    assert "mine.yaml: 1 of 2 runs are complete below runs, 1 of them to be transferred" in told.err
    assert told.out.count(" to stl10: top-1 ") == 1
    both = [*table, "--target", "stl10", "--target", "folder:photos"]
    assert transfer(*both) == 0
    out = capsys.readouterr().out
    assert (out.count(" to stl10: "), out.count(" to folder-photos: ")) == (1, 2)  # what was there stays
    assert transfer(*both) == 0
    assert capsys.readouterr().out == ""
    assert main(["table", "show", "mine.yaml", "--results", "none"]) == 0
    shown = capsys.readouterr().out
    assert "small stl10" in shown
    assert shown.count("(1 of 2)") == 4
    assert main(["table", "show", "mine.yaml", "--results", "none", "--metric", "stl10/top1"]) == 0
    assert "top-1 on stl10, last epoch" in capsys.readouterr().out
    line = refused(capsys, main(["table", "show", "mine.yaml", "--results", "none", "--metric", "stl10/top2"]))
    assert "--metric: unknown 'stl10/top2'; did you mean 'stl10/top1'? (of this table: stl10/top1, folder-" in line
    line = refused(capsys, transfer(*table, "--target", "tiny_imagenet"))
    assert line == "error: --target: tiny_imagenet is none of this table's (there is: stl10, folder-photos)"


def test_a_run_that_fails_does_not_keep_the_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
    line = refused(capsys, transfer("a", "--target", "stl10"))
    assert "a: no config.yaml in its folder" in line
    assert transfer("a", "b", "--target", "stl10") == 1
    told = capsys.readouterr().err.splitlines()
    assert [text.split(":")[0] for text in told] == ["failed", "failed", "error"]
    assert told[-1].startswith("error: 2 of 2 failed: a: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "name one thing to transfer: run folders, --table NAME, or --model NAME --weights FILE"),
        (["run"], "--target: name a data set: stl10, tiny_imagenet or folder:PATH"),
        (["run", "--target", "stl"], "--target: unknown 'stl'"),
        (["run", "--target", "stl10", "--target", "stl10:x"], "--target: stl10:x has the name stl10, as another one"),
        (["run", "--target", "stl10", "--seeds", "1"], "--seeds goes with --table"),
        (["run", "--target", "stl10", "epoch=3"], "unknown setting 'epoch'; did you mean 'epochs'? (known: epochs,"),
        (["run", "--target", "stl10", "epochs=0"], "epochs: "),
        (["run", "--target", "stl10", "lr=[1"], "command line: 'lr=[1': not a YAML value: "),
        (["run", "--target", "stl10", "milestones=[5,3]"], "milestones should ascend, found [5, 3]"),
        (["run", "--target", "stl10", "--seed", "-1"], "--seed: should be from 0 to 2**63 - 1, found -1"),
        (["run", "--target", "stl10", "--batch-size", "0"], "--batch-size: should be at least 1, found 0"),
        (["run", "--target", "stl10", "--target", "folder:x", "--record", "o"], "--record is one file"),
        (["--table", "mcld_table8", "epochs=3"], "epochs=3 does not go with --table: settings of a table stand in its"),
        (["--table", "mcld_table8", "--import", "no_parts"], "imports: no module 'no_parts' in "),
        (["--table", "mcld_table7"], "mcld_table7: no metric on a target, such as stl10/top1, among its metrics"),
        (["nowhere", "--target", "stl10"], "no run folder or checkpoint at nowhere"),
        (["--model", "tiny_net", "--weights", "w.pt", "--data", "tiny", "--target", "folder:x"], "there is no folder"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], line: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused(capsys, transfer(*arguments))
