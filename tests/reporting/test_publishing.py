"""Records that are copied into the results."""

import json
from pathlib import Path

import pytest
import yaml

from mdistill.config import load
from mdistill.errors import UserError
from mdistill.reporting import publishing
from mdistill.reporting.publishing import destination, publish
from mdistill.reporting.records import read_record

from .written_records import write_record

CFG = Path(__file__).resolve().parents[2] / "configs" / "cifar100" / "kd" / "res56_res20.yaml"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in ``runs`` of the current folder, with a teacher elsewhere."""
    monkeypatch.chdir(tmp_path)
    config = load(CFG, [f"teacher.checkpoint={tmp_path}/teachers/t.pth"], seed=1)
    return write_record(
        tmp_path / "runs", config, [60.0, 70.0], first=239, session={"config_folder": "/somewhere/else"}
    )


def test_a_record_is_copied_without_the_paths_of_the_machine(run: Path, tmp_path: Path) -> None:
    (run / "student.pt").write_bytes(b"weights")
    record = read_record(run)
    place = destination(record, tmp_path / "runs")
    assert place == run.relative_to(tmp_path / "runs")
    assert destination(record, tmp_path / "others").parts[:3] == ("cifar100", "kd", "resnet56_resnet20")
    target = tmp_path / "results" / place
    assert publish(record, target) is True
    assert sorted(path.name for path in target.iterdir()) == ["config.yaml", "env.json", "metrics.jsonl"]
    (session,) = json.loads((target / "env.json").read_text())["sessions"]
    assert session["command"] == ["mdistill", "--output", "runs"]
    assert session["config_folder"] == "else"
    assert yaml.safe_load((target / "config.yaml").read_text())["teacher"]["checkpoint"] == "teachers/t.pth"
    assert str(tmp_path) not in "".join(path.read_text() for path in target.iterdir())
    copy = read_record(target)
    assert (copy.settings, copy.top1, copy.identity) == (record.settings, 70.0, record.identity)
    assert publish(record, target) is False


def test_paths_within_messages_and_below_other_roots(run: Path, tmp_path: Path) -> None:
    """A teacher that lies below the runs or the checkpoints keeps its place there, which a reader can find."""
    messages = {
        "failed": "/home/jane/a/x.json is damaged: see /home/jane/secret/run.log, and/or 'C:\\Users\\jane\\y.txt'.",
        "notes": [f"data: read {tmp_path}/data, {tmp_path}, 3/4 of https://a.org/b/c (/home/jane/b)"],
        "command": ["train.py", "--cfg=/home/jane/a b/c.yaml", "/elsewhere/runs/cifar100/vanilla/resnet56/seed0"],
    }
    content = json.loads((run / "env.json").read_text())
    content["sessions"][0] |= messages
    (run / "env.json").write_text(json.dumps(content))
    path = run / "config.yaml"
    text = path.read_text().replace(f"{tmp_path}/teachers/t.pth", "/elsewhere/runs/cifar100/vanilla/resnet56/seed0")
    path.write_text(text)
    publish(read_record(run), tmp_path / "results", (Path("checkpoints"), Path("/elsewhere/runs")))
    (session,) = json.loads((tmp_path / "results" / "env.json").read_text())["sessions"]
    assert session["failed"] == "x.json is damaged: see run.log, and/or 'y.txt'."
    assert session["notes"] == ["data: read data, ., 3/4 of https://a.org/b/c (b)"]
    assert session["command"] == ["train.py", "--cfg=c.yaml", "cifar100/vanilla/resnet56/seed0"]
    config = yaml.safe_load((tmp_path / "results" / "config.yaml").read_text())
    assert config["teacher"]["checkpoint"] == "cifar100/vanilla/resnet56/seed0"


def test_another_run_is_not_written_over(run: Path, tmp_path: Path) -> None:
    record = read_record(run)
    publish(record, tmp_path / "results")
    (run / "env.json").write_text((run / "env.json").read_text().replace("2026-01-01", "2026-01-02"))
    with pytest.raises(UserError, match=r"results holds another run, begun 2026-01-01.* and not 2026-01-02.*: move it"):
        publish(read_record(run), tmp_path / "results")


def test_what_is_too_large_or_unfinished_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "MAX_BYTES", 100)
        with pytest.raises(UserError, match=r"has 0.0 MB, and a published file at most 0.0001"):
            publish(read_record(run), tmp_path / "results")
    (run / "metrics.jsonl").write_text('{"epoch": 7, "test/top1": 20.0}\n')
    with pytest.raises(UserError, match="is at epoch 7 of 240: publish it when it is complete"):
        publish(read_record(run), tmp_path / "results")
    (run / "env.json").unlink()
    (run / "metrics.jsonl").write_text('{"epoch": 240, "test/top1": 20.0}\n')
    with pytest.raises(UserError, match=r"has no env.json"):
        publish(read_record(run), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_number_that_json_has_not_is_refused(run: Path, tmp_path: Path) -> None:
    content = json.loads((run / "env.json").read_text())
    content["sessions"][0]["threads"] = float("inf")
    (run / "env.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"env.json is damaged: it holds a number that is not finite"):
        publish(read_record(run), tmp_path / "results")
