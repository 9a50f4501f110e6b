"""``mdistill plot`` and ``mdistill report``: pictures and pages of tiny runs, and one line for each mistake."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import yaml

from mdistill import config
from mdistill.cli.plot import main as plot_main
from mdistill.cli.report import main as report_main
from mdistill.errors import UserError
from mdistill.reporting import html_page, plots
from mdistill.reporting.drawing import COLOURS, INK
from mdistill.reporting.outputs import Networks
from mdistill.reporting.plots import KINDS
from mdistill.reporting.records import read_records
from mdistill.reporting.report import report

from .. import runs
from ..conftest import refused
from ..reporting.page_check import contrast, problems
from ..reporting.written_records import write_plain as write

pytestmark = pytest.mark.xdist_group("pictures")  # matplotlib and the runs below take a second each


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two seeds of a taught network."""
    folder = tmp_path_factory.mktemp("trained")
    runs.train(runs.write_config(folder, "kd", solver={"epochs": 1}), folder, seeds=(0, 1))
    return folder


def networks_below(root: Path) -> Networks:
    return Networks(
        device=torch.device("cpu"),
        data_root=root,
        checkpoint_root=root,
        configuration=lambda folder: config.load(folder / "config.yaml"),
    )


def draw(kind: str, folders: Sequence[Path], output: Path, *flags: str) -> int:
    root = folders[0].parent
    roots = ["--checkpoint-root", str(root), "--data-root", str(root), "--device", "cpu"]
    return plot_main([kind, *map(str, folders), "-o", str(output), *roots, *flags])


FLAGS = {
    "tsne": ["--perplexity", "5", "--classes", "1,2,3"],
    "correlation": ["--matrix", "means", "--scale", "3"],
    "classes": ["--classes", "0,4", "--image", "7", "--top", "3", "--role", "teacher"],
    "reliability": ["--role", "teacher", "--bins", "5"],
    "agreement": ["--temperature", "4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_and_told(
    kind: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = kind in ("curves", "time", "agreement", "reliability")
    folders = [trained / f"seed{seed}" for seed in ((0, 1) if several else (0,))]
    if kind == "teachers":
        folders = [write(tmp_path, "m", teacher=name, session={"teacher": {"top1": 70.0}}) for name in ("a", "b")]
    assert draw(kind, folders, tmp_path / "picture.svg", *FLAGS.get(kind, [])) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines
    assert last == f"picture: {tmp_path / 'picture.svg'}"
    assert (tmp_path / "picture.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.slow
def test_a_method_has_one_colour_in_all_pictures(tmp_path: Path) -> None:
    for method, top1 in {"c": [50.0], "a": [10.0], "b": [40.0, 60.0, 70.0], "d": [1.0, 2.0, 30.0]}.items():
        write(tmp_path, method, teacher="big", top1=top1)  # a and c have no end yet: they have curves alone
    write(tmp_path, "e", teacher="big", top1=[], session={"failed": "no memory"})
    records = sorted(read_records([tmp_path]), key=lambda each: -(each.top1 or 0.0))
    (curves,) = plots.draw("curves", records, plots.Options()).figure.axes
    lines = {str(line.get_label())[0]: line.get_color() for line in curves.lines}
    assert [len(lines), len(set(lines.values()))] == [4, 4]
    (axes,) = plots.draw("time", records, plots.Options()).figure.axes
    circles = [bytes(round(255 * part) for part in each.get_edgecolor()[0][:3]) for each in axes.collections]
    assert [f"#{circle.hex()}" for circle in circles] == [lines["b"], lines["d"]]


@pytest.mark.slow
def test_a_student_agrees_with_itself(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher's own weights as a student: every prediction is the same and nothing differs."""
    folder = tmp_path / "seed0"
    shutil.copytree(trained / "seed0", folder)
    shutil.copy(trained / "teacher.pt", tmp_path)
    shutil.copy(trained / "teacher.pt", folder / "student.pt")
    assert draw("agreement", [folder], tmp_path / "a.png") == 0
    assert draw("correlation", [folder], tmp_path / "c.png") == 0
    out = capsys.readouterr().out
    assert "kd: agreement 100.00 %, KL 0.0000 nats, 1 seed" in out
    assert "kd: mean 0.0000, largest 0.0000" in out


def test_the_page_is_accessible_and_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    for seed in (0, 1):
        write(root, "m<b>", seed, teacher="big", top1=[1.0, 2.0, 30.0 + seed], session={"teacher": {"top1": 70.0}})
    write(root, "m<b>", teacher="huge", session={"teacher": {"top1": 75.0}})
    write(root, "fell", teacher="huge", top1=[50.0, 50.0, 1.0])
    write(root, "begun", teacher="huge", top1=[])
    write(root, "v", student="small", top1=[20.0])
    write(root, "w", student="small", top1=[20.0], session={"failed": "<out of memory>"})
    (write(root, "later", student="small") / "env.json").write_text('{"format": 2}')
    page = tmp_path / "report.html"
    assert report_main([str(root), "-o", str(page), "--title", "A & B"]) == 0
    text = page.read_text(encoding="utf-8")
    assert problems(text) == []
    assert "<h1>A &amp; B</h1>" in text
    assert "7 runs of 5 methods: 3 complete, " in text
    for words in (
        "1 failed",
        "&lt;out of memory&gt;",
        "1.00</span> †",
        "env.json is of format 2, which a newer version",
    ):
        assert words in text
    assert "left out: " in capsys.readouterr().err
    for words in ("1 unfinished", "1 collapsed", "1 without an epoch", "30.50 ± 0.71", "m&lt;b&gt;", "commit abc"):
        assert words in text
    for caption in ("Learning curves", "Time of a batch and accuracy", "small by its teachers"):
        assert f"<figcaption>{caption}" in text


@pytest.mark.slow
def test_a_page_with_what_networks_compute(trained: Path, tmp_path: Path) -> None:
    roots = ["--checkpoint-root", str(trained), "--data-root", str(trained), "--device", "cpu"]
    assert report_main([str(trained), "-o", str(tmp_path / "r.html"), "--networks", *roots]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert problems(text) == []
    for caption in (
        "Agreement with the teacher",
        "Calibration: kd",
        "Correlations of logits: kd",
        "Logits of each class",
    ):
        assert f"<figcaption>{caption}" in text
    assert 'alt="Agreement with the teacher, tiny_net → tiny_net: kd: agreement ' in text


def test_a_page_without_a_picture_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = {"first": '{"epoch": 1, "phase": "first", "test/top1": 9.0}', "held": '{"epoch": 3, "val/top1": 50.0}'}
    for name, line in lines.items():
        folder = write(tmp_path / "runs", name, teacher="big", student=name)
        (folder / "metrics.jsonl").write_text(f"{line}\n")
    for name in ("m", "n"):
        (write(tmp_path / "runs", name, teacher="big") / "metrics.jsonl").write_text('{"epoch": 3, "test/top1": 30}\n')
    write(tmp_path / "runs", "later", teacher="big", top1=[]).joinpath("metrics.jsonl").write_text('{"epoch": 1}\n')
    page = tmp_path / "report.html"
    assert report_main([str(tmp_path / "runs"), "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert problems(text) == []
    for words in (
        "Learning curves left out: ",
        "is at no epoch here (there is: nothing yet)",
        "is at no epoch here (there is: val/top1)",
        "big → small: later: &#x27;test/top1&#x27; is at no common epoch of its runs",
        "Time of a batch and accuracy left out: ",
    ):
        assert words in text, words
    assert plot_main(["curves", str(tmp_path / "runs"), "-o", str(tmp_path / "x.svg")]) == 0
    assert "left out: big → small: later: 'test/top1' is at no common epoch" in capsys.readouterr().err


def test_the_check_of_pages_finds_what_is_wrong() -> None:
    page = '<html><head></head><body><h1>a</h1><h3>b</h3><img src="http://x/y"><table></table><a href="#z">c</a></html>'
    found = " ".join(problems(page))
    for words in ("no language", "no title", "no viewport", "no main", "headings [1, 3]", "without words", "caption"):
        assert words in found
    for words in ("leads nowhere: #z", "not in the file: http://x/y", "</html> closes nothing", "without a size"):
        assert words in found
    assert (contrast("#000000", "#ffffff"), contrast("#777777", "#777777")) == (21.0, 1.0)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


def test_colours_stand_out() -> None:
    from mdistill.reporting.report import STYLE as OWN

    style = html_page.STYLE + OWN
    for name in ("ink", "faint", "link", "warn"):
        for ground in ("paper", "band"):
            assert contrast(html_page.PALETTE[name], html_page.PALETTE[ground]) >= 4.5
    assert all(contrast(colour, "#ffffff") >= 4.5 for colour in (*COLOURS, INK))
    assert not re.search(r"#[0-9a-f]{3}", style)  # colours are in the palette alone
    assert set(re.findall(r"var\(--(\w+)\)", style)) == set(html_page.PALETTE)


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("curve", [], r"unknown kind of picture 'curve'; did you mean 'curves'\? \(kinds: curves, time, "),
        ("curves", ["--metric", "test/tp1"], r"'test/tp1' is at no epoch here; did you mean 'test/top1'"),
        ("curves", ["--metric", "first_steps"], r"'first_steps' is at no epoch here \(there is: "),
        ("classes", [], r"name the classes to show"),
        ("classes", ["--classes", "leopard"], r"no class 'leopard' .*a number from 0 to 9"),
        ("classes", ["--classes", "1", "--image", "99"], r"--image: found 99, the images are 0 to 59"),
        pytest.param(
            *("tsne", ["--perplexity", "90"], r"t-SNE with perplexity 90 needs more images than that, found 60"),
            marks=pytest.mark.slow,
        ),
        ("logits", ["--split", "tset"], r"--split: no split 'tset' here; did you mean 'test'"),
    ],
)
def test_a_mistake_is_one_line(
    kind: str, flags: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refused(capsys, draw(kind, [trained / "seed0"], tmp_path / "x.png", *flags)))
    assert not list(tmp_path.iterdir())


def test_an_ending_that_is_no_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, "m")
    line = refused(capsys, plot_main(["curves", str(folder), "-o", str(tmp_path / "x.pgn")]))
    assert line.endswith("a picture ends in .png, .svg, .pdf; found '.pgn'; did you mean 'png'?")
    assert "is a folder" in refused(capsys, report_main([str(folder), "-o", str(tmp_path)]))


@pytest.mark.parametrize(("kind", "module"), [("tsne", "sklearn.manifold"), ("curves", "matplotlib")])
def test_a_library_that_is_not_installed_is_named(
    kind: str,
    module: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    line = refused(capsys, draw(kind, [trained / "seed0"], tmp_path / "x.png"))
    assert "cannot be imported" in line
    assert line.endswith("pip install 'mdistill[plots]'")
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_teacher_has_nothing_to_agree_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = runs.write_config(tmp_path, "vanilla", solver={"epochs": 1})
    runs.train(cfg, tmp_path)
    for kind in ("agreement", "correlation"):
        assert "a run without a teacher" in refused(capsys, draw(kind, [tmp_path / "seed0"], tmp_path / "x.png"))


def test_a_method_without_its_network_is_left_out(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "seed0"
    shutil.copytree(trained / "seed1", other)
    (other / "student.pt").unlink()
    settings = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub("(?m)^variant: .*", "variant: other", settings))
    assert draw("agreement", [trained / "seed0", other], tmp_path / "x.svg") == 0
    told = capsys.readouterr()
    assert "kd: agreement " in told.out
    assert re.fullmatch(r"left out: kd, other: .*student.pt.*\n", told.err)
    assert "kd, other: " in refused(capsys, draw("agreement", [other], tmp_path / "y.svg"))


def test_what_is_kept_of_a_teacher_is_of_runs_that_had_its_weights(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "seed0"
    shutil.copytree(trained / "seed0", other)
    environment = json.loads((other / "env.json").read_text())
    environment["sessions"][0]["teacher"]["fingerprint"] = "0" * 64
    (other / "env.json").write_text(json.dumps(environment))
    networks = networks_below(trained)
    networks.teacher(trained / "seed0")
    with pytest.raises(UserError, match=r"is not the teacher that the run in .* had: its fingerprint was 000000000000"):
        networks.teacher(other)
    assert networks.teacher(trained / "seed1") is networks.teacher(trained / "seed0")


def test_what_is_kept_of_a_data_set_has_the_splits_of_the_run(trained: Path, tmp_path: Path) -> None:
    for name, test in (("both", True), ("held", False)):
        shutil.copytree(trained / "seed0", tmp_path / name)
        settings = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        settings["data"]["holdout"], settings["run"]["evaluate_test"] = 10, test
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(settings))
    networks = networks_below(trained)
    networks.student(tmp_path / "both")
    with pytest.raises(UserError, match=r"--split: no split 'test' here \(there is: val\)"):
        networks.student(tmp_path / "held")


def test_a_page_whose_networks_are_gone_says_so(tmp_path: Path) -> None:
    class Gone(Networks):
        def __init__(self) -> None: ...

        def student(self, folder: Path, *, pooled: bool = False) -> NoReturn:
            raise UserError(f"{folder} holds no student.pt")

    records = read_records([write(tmp_path, "m", teacher="big")])
    text = report(records, title="a", networks=Gone())
    assert problems(text) == []
    assert "<figcaption>Learning curves" in text
    for caption in (
        "Agreement with the teacher",
        "Calibration: m",
        "Correlations of logits: m",
        "Logits of each class",
    ):
        assert re.search(f'<p class="warn">{caption}[^<]* left out: [^<]* holds no student.pt</p>', text)


def test_time_needs_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("time", [write(tmp_path, "m", teacher="big")], tmp_path / "x.svg") == 0
    told = capsys.readouterr()
    assert "m: 25.0 ms a batch, 30.00 %, extra parameters not recorded" in told.out
    assert told.err.startswith(f"left out: extra parameters of {tmp_path}")


def test_panels_of_runs_that_only_their_folders_tell_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / place, "m") for place in ("a", "b")]
    panels = plots._panels(read_records([tmp_path]))
    assert {title: run.folder for title, run in panels.items()} == {
        f"m (small), seed 0, {folder}": folder for folder in folders
    }


def test_too_many_panels_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path, "m", seed) for seed in range(5)]
    assert "at most 4, found 5 runs" in refused(capsys, draw("tsne", folders, tmp_path / "x.png"))
