"""Records of runs and what pictures show of them, worked out by hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from mdistill.errors import UserError
from mdistill.reporting.figures import (
    band,
    bins,
    by_teacher,
    costs,
    folded,
    learning,
    metrics_of,
    place_labels,
    thinned,
)
from mdistill.reporting.records import find_named, read_record, read_records
from mdistill.reporting.series import by_pair, series

from .written_records import write_plain as write


def test_a_record_says_what_was_run(tmp_path: Path) -> None:
    session = {"teacher": {"top1": 70.5}, "parameters": {"student": 10, "extra": 7}}
    folder = write(tmp_path, "m", 3, teacher="big", top1=[10.0, 40.0, 30.0], variant="beta=4", session=session)
    record = read_record(folder)
    assert (record.dataset, record.method, record.pair, record.seed) == ("tiny", "m", "big → small", 3)
    assert (record.name, record.state, record.top1, record.best_accuracy("top1")) == (
        "m, beta=4",
        "complete",
        30.0,
        40.0,
    )
    assert (record.teacher_top1, record.extra_parameters, record.commit) == (70.5, 7, "abc")
    assert record.step_ms == pytest.approx(1000 * 50 / 2000)  # the median of 1000, 2000 and 3000 images a second


def test_how_far_a_run_came(tmp_path: Path) -> None:
    runs = {"complete": [30.0, 29.0, 31.0], "unfinished": [30.0], "collapsed": [30.0, 30.0, 1.0], "empty": []}
    for state, top1 in runs.items():
        assert read_record(write(tmp_path / state, "m", top1=top1)).state == state
    assert read_record(write(tmp_path, "m", top1=[30.0], session={"failed": "no memory"})).state == "failed"
    held = write(tmp_path / "val", "m", epochs=1)
    (held / "metrics.jsonl").write_text('{"epoch": 1, "val/top1": 50.0}\n')
    assert read_record(held).state == "untested"


def test_where_a_run_fell_is_judged_on_the_split_that_its_best_epoch_is_of(tmp_path: Path) -> None:
    line = {"epoch": 3, "test/top1": 30.0, "val/top1": 20.0, "best/epoch": 1, "best/top1": 50.0}
    folder = write(tmp_path, "m")
    for val, state in ((20.0, "collapsed"), (26.0, "complete")):
        (folder / "metrics.jsonl").write_text(json.dumps({**line, "val/top1": val}) + "\n")
        assert read_record(folder).state == state


def test_an_accuracy_is_of_the_last_epoch_that_was_evaluated(tmp_path: Path) -> None:
    folder = write(tmp_path, "m", top1=[10.0, 20.0], epochs=9)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "train/loss": 1.0}\n')
    record = read_record(folder)
    assert (record.top1, record.done, record.state, len(record.metrics)) == (20.0, 3, "unfinished", 3)


def test_a_published_copy_counts_once_and_the_farther_one_is_taken(tmp_path: Path) -> None:
    started = {"started": "2026-01-01T00:00:00+0000"}
    write(tmp_path / "results", "m", top1=[10.0], session=started)
    whole = write(tmp_path / "runs", "m", session=started)
    write(tmp_path / "runs", "m", 1, session=started)
    (each,) = series(read_records([tmp_path]))
    assert [(run.folder, run.seed) for run in each.runs] == [(whole, 0), (whole.with_name("seed1"), 1)]


def test_lines_of_a_first_phase_are_no_figures(tmp_path: Path) -> None:
    folder = write(tmp_path, "m", epochs=4)
    lines = [{"epoch": 1, "phase": "first", "test/top1": 99.0}, {"epoch": 2, "test/top1": 20.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_record(folder)
    assert (record.top1, record.done, len(record.metrics)) == (20.0, 2, 1)


def test_seeds_of_one_cell_are_a_series_with_a_band(tmp_path: Path) -> None:
    for seed, top1 in enumerate(([10.0, 20.0, 30.0], [14.0, 24.0, 36.0], [50.0])):
        write(tmp_path, "m", seed, top1=top1)
    (each,) = series(read_records([tmp_path]))
    assert each.values == [30.0, 36.0]
    found = band(each, "test/top1")
    assert (found.seeds, found.epochs, found.mean) == (2, [1, 2, 3], [12.0, 22.0, 33.0])
    assert found.deviation == pytest.approx([math.sqrt(8), math.sqrt(8), math.sqrt(18)])
    assert found.last == "33.00 ± 4.24"


def test_thin_curves_keep_their_end(tmp_path: Path) -> None:
    write(tmp_path, "m", top1=[float(epoch) for epoch in range(1, 11)], epochs=10)
    (each,) = series(read_records([tmp_path]))
    assert band(each, "test/top1", 4).epochs == [1, 4, 7, 10]
    assert band(each, "test/top1", 5).mean == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert band(each, "test/top1", 99) == band(each, "test/top1")
    points = thinned(range(1, 1001), 120)
    assert (len(points), points[-1]) == (112, 1000)
    assert thinned([], 120) == []


def test_runs_without_a_metric_are_no_part_of_its_curve(tmp_path: Path) -> None:
    write(tmp_path, "m", 0, top1=[10.0, 20.0], epochs=9)
    first = {"epoch": 1, "first_steps": {"terms": {"ce": [1.0]}, "weights": "0" * 16}}
    (write(tmp_path, "m", 1, epochs=9) / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    (write(tmp_path, "n", 0, epochs=1) / "metrics.jsonl").write_text('{"epoch": 1, "val/top1": 50.0}\n')
    groups = series(read_records([tmp_path]))
    (found,) = learning(groups, "test/top1")
    assert (found.label, found.seeds, found.mean) == ("m (small)", 1, [10.0, 20.0])
    assert learning(groups, "first_steps") == []
    assert metrics_of(groups) == ["best/epoch", "best/top1", "images_per_second", "test/top1", "val/top1"]


def test_runs_of_other_cells_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "a", "m", 0, teacher="big", cell="0123456789")
    write(tmp_path / "b", "m", 0, teacher="big", cell="abcdefghij")
    assert [each.label for each in series(read_records([tmp_path]))] == ["m [012345]", "m [abcdef]"]


def test_pairs_have_the_student_alone_beside_them(tmp_path: Path) -> None:
    for method, teacher, student in (
        ("m", "big", "small"),
        ("n", "huge", "small"),
        ("v", "", "small"),
        ("v", "", "big"),
    ):
        write(tmp_path, method, teacher=teacher, student=student)
    groups = {title: [each.label for each in groups] for title, groups in by_pair(read_records([tmp_path])).items()}
    assert groups == {
        "big → small": ["m", "v (small)"],
        "huge → small": ["n", "v (small)"],
        "without a teacher": ["v (big)"],
    }


def test_cost_and_teachers(tmp_path: Path) -> None:
    alone = write(tmp_path, "v", student="big", top1=[1.0, 2.0, 60.0])
    files = {"teacher": {"top1": None, "files": [{"path": str(alone / "student.pt")}]}, "parameters": {"extra": 5}}
    for seed, last in enumerate((30.0, 40.0)):
        write(tmp_path, "m", seed, teacher="big", top1=[1.0, 2.0, last], session=files)
    write(tmp_path, "m", 0, teacher="huge", top1=[1.0, 2.0, 33.0], session={"teacher": {"top1": 50.0}})
    groups = series(read_records([tmp_path]))
    found = {each.label: each for each in costs(groups)}
    taught = found["m (big → small)"]
    assert (taught.step_ms, taught.top1, taught.extra) == (pytest.approx(25.0), 35.0, 5)
    assert found["v (big)"].extra is None
    (line,) = by_teacher(groups).values()
    assert [(each.teacher, each.teacher_top1, each.top1) for each in line] == [
        ("huge", 50.0, 33.0),
        ("big", 60.0, 35.0),
    ]


def test_a_line_over_teachers_is_of_one_choice_of_settings(tmp_path: Path) -> None:
    for epochs in (3, 4):
        for teacher, known in (("big", 60.0), ("huge", 70.0)):
            told = {"teacher": {"top1": known, "fingerprint": teacher}}
            top1 = [1.0, 2.0, 30.0 + epochs, 30.0 + epochs][:epochs]
            write(
                tmp_path / str(epochs),
                "m",
                teacher=teacher,
                top1=top1,
                epochs=epochs,
                cell=f"{epochs}{teacher}",
                session=told,
            )
    lines = by_teacher(series(read_records([tmp_path])))
    assert {label: [(each.teacher, each.top1) for each in line] for label, line in lines.items()} == {
        "m [3big]": [("big", 33.0), ("huge", 33.0)],
        "m [4big]": [("big", 34.0), ("huge", 34.0)],
    }


def test_collapsed_runs_do_not_set_the_scale(tmp_path: Path) -> None:
    for seed, last in enumerate((34.0, 36.0, 1.0)):
        write(tmp_path, "m", seed, teacher="big", top1=[1.0, 30.0, last], session={"teacher": {"top1": 60.0}})
    (each,) = groups = series(read_records([tmp_path]))
    assert (each.values, each.sound) == ([34.0, 36.0, 1.0], [34.0, 36.0])
    (point,), ((taught,),) = costs(groups), by_teacher(groups).values()
    assert (point.top1, taught.top1, taught.left_out) == (35.0, 35.0, ", without 1 collapsed run")
    assert "35.00 ± 1.41 %, without 1 collapsed run, " in point.text


def test_classes_fold_into_a_square() -> None:
    assert [len(row) for row in folded([0.0] * 100)] == [10] * 10
    assert folded([1.0, 2.0, 3.0, 4.0, 5.0]) == [[1.0, 2.0, 3.0], [4.0, 5.0, None]]


def test_bins_of_confidence() -> None:
    """Two images of confidence 3 / 4, one of them right, and one of 9 / 10 that is right."""
    rows, classes = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 9.0]]).log(), torch.tensor([0, 1, 1])
    found = bins(rows, classes, 5)
    assert found.images == [0, 0, 0, 2, 1]
    assert found.confidence == pytest.approx([0, 0, 0, 0.75, 0.9])
    assert found.accuracy == [0, 0, 0, 0.5, 1.0]
    assert found.error == pytest.approx((2 * 0.25 + 0.1) / 3)


def test_labels_do_not_lie_on_each_other() -> None:
    points = [(50.0 + number % 3, 50.0 + 2 * (number // 3), 4.0) for number in range(12)]
    sizes = [(30.0 + 5 * (number % 4), 8.0) for number in range(12)]
    places = place_labels(points, sizes, (0.0, 0.0, 400.0, 300.0))
    boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(places, sizes, strict=True)]
    for number, (a, b, c, d) in enumerate(boxes):
        assert a >= 0
        assert b >= 0
        assert c <= 400
        assert d <= 300
        for e, f, g, h in boxes[:number]:
            assert c <= e or g <= a or d <= f or h <= b


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no metrics", r"seed0 holds no metrics.jsonl, so it is no record of a run"),
        ("no epoch", r"seed0 holds no finished epoch: nothing"),
        ("no config", r"seed0 holds no config.yaml, so it is no record of a run"),
        ("newer", r"env.json is of format 2, which a newer version of mdistill wrote; this one, .* reads format 1: "),
        ("damaged", r"config.yaml is damaged: it is not the complete configuration of a run"),
        ("no YAML", r"config.yaml: not valid YAML: "),
        ("no run", r"nothing: no run in it or below \(config.yaml and metrics.jsonl would be in its folder\)"),
        ("typing", r"sed0 does not exist; did you mean 'seed0'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, damage: str, message: str) -> None:
    folder = write(tmp_path, "m")
    asked = folder
    if damage == "no metrics":
        (folder / "metrics.jsonl").unlink()
    elif damage == "no epoch":
        (folder / "metrics.jsonl").write_text("")
    elif damage == "no config":
        (folder / "config.yaml").unlink()
    elif damage == "newer":
        (folder / "env.json").write_text('{"format": 2, "runs": []}')
    elif damage == "damaged":
        (folder / "config.yaml").write_text("data: {name: tiny, batch_size: 3}\n")
    elif damage == "no YAML":
        (folder / "config.yaml").write_text("data: [\n")
    elif damage == "no run":
        asked = tmp_path / "nothing"
        asked.mkdir()
    else:
        asked = folder.with_name("sed0")
    with pytest.raises(UserError, match=message) as raised:
        read_records([asked])
    assert "\n" not in str(raised.value)


def test_a_folder_half_replaced_is_no_run(tmp_path: Path) -> None:
    folder = write(tmp_path, "m")
    write(folder / ".replaced.x", "m")
    assert [record.folder for record in find_named([tmp_path, folder]).records] == [folder]


def test_links_are_followed_and_lead_nowhere_twice(tmp_path: Path) -> None:
    far = write(tmp_path / "far", "m")
    near = write(tmp_path / "runs", "n")
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "runs" / "zz").symlink_to(far)
    (tmp_path / "far" / "back").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "tiny" / "up").symlink_to(tmp_path)
    write(tmp_path / "beside", "o")  # above the folder that is named, so that it is none of its runs
    linked = tmp_path / "runs" / "linked" / far.relative_to(tmp_path / "far")
    assert [record.folder for record in find_named([tmp_path / "runs"]).records] == [linked, near]
    assert len(find_named([tmp_path / "runs", tmp_path]).records) == 3
