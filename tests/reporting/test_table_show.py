"""Tables from run records: what is in a cell, what is left out and told, and the five formats."""

import csv
import html.parser
import io
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mdistill.config import Config, load
from mdistill.data import cifar100, imagenet, tiny_imagenet
from mdistill.errors import UserError
from mdistill.reporting import table_cells, table_files
from mdistill.reporting.external import EpochFigures, External
from mdistill.reporting.published import Figure
from mdistill.reporting.records import CLASSES, find_records, read_record
from mdistill.reporting.table_cells import Layout, layout
from mdistill.reporting.table_formats import Format, render
from mdistill.reporting.table_show import Table, build

from .page_check import problems
from .written_records import COMMIT, write_record

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TABLE = """title: "Two & three_rows"
source: a paper
table: "1"
pairs: [res56_res20]
methods:
  - {name: alone, method: vanilla}
  - {name: KD, method: kd}
  - {name: KD bf16, method: kd, set: [run.precision=bf16]}
"""
FIGURES = [
    Figure("cifar100", "vanilla", "", "", "resnet20", 240, "top1", 69.06, "a paper", "1", ""),
    Figure("cifar100", "kd", "", "resnet56", "resnet20", 100, "top1", 70.66, "a paper", "1", ""),
    Figure("cifar100", "kd", "", "resnet56", "resnet20", 240, "top1", 99.0, "another paper", "1", ""),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    folder = tmp_path_factory.mktemp("table")
    (folder / "mine.yaml").write_text(TABLE)
    return layout(str(folder / "mine.yaml"), CONFIGS, folder)


@cache
def config(method: str, seed: int, *overrides: str) -> Config:
    file = "resnet20" if method == "vanilla" else "res56_res20"
    return load(CONFIGS / "cifar100" / method / f"{file}.yaml", overrides, seed=seed)


def write(output: Path, config: Config, last: float, best: float | None = None, **given: Any) -> Path:
    """A record of the last two of 240 epochs."""
    return write_record(output, config, [last if best is None else best, last], first=239, **given)


def shown(whole: Layout, *roots: Path) -> Table:
    return build(whole, find_records(roots), FIGURES)


def test_a_cell_is_mean_and_deviation_over_its_seeds(whole: Layout, tmp_path: Path) -> None:
    for seed, top1 in enumerate((69.0, 70.0, 71.0)):
        write(tmp_path, config("vanilla", seed), top1)
    write(tmp_path, config("kd", 1), 70.5)
    table = shown(whole, tmp_path)
    alone, kd, bf16 = (table.results[row, "res56_res20"] for row in whole.rows)
    assert (alone.text, alone.published, alone.difference_text) == ("70.00 ± 1.00", 69.06, "+0.94")
    assert [trial.seed for trial in alone.trials] == [0, 1, 2]
    assert (kd.text, kd.published, kd.difference_text) == ("70.50 (1 of 3)", 70.66, "")  # of 100 epochs, not 240
    assert (bf16.text, bf16.published) == ("0 of 3", None)
    assert table.ranks("res56_res20") == {"KD": 1, "alone": 2}
    assert "no difference is given where the published run was of another number of epochs" in table.notes


def test_the_best_epoch_is_shown_on_request_and_labelled(whole: Layout, tmp_path: Path) -> None:
    write(tmp_path, config("kd", 0), 70.0, best=71.5)
    table = build(whole, find_records([tmp_path]), [], epoch="best")
    assert table.results["KD", "res56_res20"].text == "71.50 (1 of 3)"
    assert table.headline == "top-1, best epoch"
    assert "best epoch, chosen on the test split: no result to report" in table.notes


def test_no_best_epoch_is_held_against_a_published_figure(whole: Layout, tmp_path: Path) -> None:
    write(tmp_path, config("vanilla", 0), 69.0, best=71.5)
    table = build(whole, find_records([tmp_path]), FIGURES, epoch="best")
    alone = table.results["alone", "res56_res20"]
    assert (alone.published, alone.difference_text) == (69.06, "")
    assert "no difference from published figures is given for best epochs" in table.notes


def test_failed_collapsed_and_unfinished_runs_are_shown(whole: Layout, tmp_path: Path) -> None:
    write_record(tmp_path, config("kd", 0), [10.0] * 7, session={"failed": "loss term 'kd' is not finite"})
    write(tmp_path, config("kd", 1), 1.0, best=60.0, top5=5.0)
    write_record(tmp_path, config("kd", 2), [10.0] * 120)
    table = shown(whole, tmp_path)
    kd = table.results["KD", "res56_res20"]
    assert kd.text == "1.00 (1 of 3) † ‡"
    assert "‡ KD res56_res20 seed 0 failed: loss term 'kd' is not finite" in table.notes
    assert "† KD res56_res20 seed 1 collapsed to 1.00 top-1; it counts in the mean" in table.notes
    assert "unfinished: KD res56_res20 seed 2: 120 of 240 epochs" in table.notes


@pytest.mark.parametrize(
    ("top1", "best", "top5", "collapsed"),
    [
        (70.0, 71.0, 92.0, False),
        (30.0, 70.0, 60.0, True),
        (1.0, 1.0, 5.0, True),
        (2.5, 2.5, 11.3, False),  # as after one epoch
        (12.0, 12.0, 35.0, False),
    ],
)
def test_what_counts_as_collapsed(top1: float, best: float, top5: float, collapsed: bool, tmp_path: Path) -> None:
    assert read_record(write(tmp_path, config("kd", 0), top1, best, top5=top5)).collapsed is collapsed


@pytest.mark.parametrize(("classes", "guess", "learnt"), [(2, 50.0, 52.0), (4, 25.0, 27.0), (1000, 0.1, 0.2)])
def test_a_guess_among_so_many_classes(classes: int, guess: float, learnt: float, tmp_path: Path) -> None:
    for top1, collapsed in ((guess, True), (learnt, False)):
        session = {"data": {"fingerprint": "d" * 64, "classes": classes}}
        folder = write(tmp_path, config("kd", 0), top1, session=session, folder=Path(str(top1)))
        assert read_record(folder).collapsed is collapsed


def test_classes_of_data_sets_are_as_their_code_says() -> None:
    assert CLASSES == {
        "cifar100": cifar100.NUM_CLASSES,
        "imagenet": imagenet.CLASSES,
        "tiny_imagenet": tiny_imagenet.CLASSES,
    }


def test_runs_of_other_settings_and_copies_of_the_data_share_no_cell(whole: Layout, tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path, config("kd", seed), 70.0 + seed)
    write(tmp_path, config("kd", 2), 60.0, data="e" * 64)
    write(tmp_path, config("kd", 0, "run.precision=bf16"), 69.5)
    write(tmp_path, config("kd", 0, "solver.lr=0.1"), 50.0)
    write(tmp_path, config("kd", 1, "solver.lr=0.1"), 50.5)
    write(tmp_path, config("kd", 7), 70.0)
    table = shown(whole, tmp_path)
    assert table.results["KD", "res56_res20"].text == "70.50 ± 0.71 (2 of 3)"
    assert table.results["KD bf16", "res56_res20"].text == "69.50 (1 of 3)"
    told = [note for note in table.notes if note.startswith("left out")]
    lr = "2 runs (seed 0: 50.00, seed 1: 50.50) of other settings (solver.lr 0.1 instead of 0.05)"
    copy = "1 run (seed 2: 60.00) with another copy of the data (fingerprint eeeeeeeeeeee instead of dddddddddddd)"
    assert told[:2] == [f"left out of KD res56_res20: {lr}", f"left out of KD res56_res20: {copy}"]
    assert "runs of further seeds are there, 7: --seeds takes them in" in table.notes


def test_rows_that_differ_in_the_teacher_alone_have_runs_of_their_own(tmp_path: Path) -> None:
    row = "  - {name: NAME, method: kd, set: [teacher.checkpoint=NAME.pth, variant=NAME]}\n"
    path = tmp_path / "mine.yaml"
    path.write_text("title: mine\npairs: [res56_res20]\nmethods:\n" + "".join(row.replace("NAME", n) for n in "ab"))
    both = layout(str(path), CONFIGS, tmp_path)
    for number, name in enumerate("ab"):
        for seed in (0, 1):
            settings = config("kd", seed, f"teacher.checkpoint={name}.pth", f"variant={name}")
            write(tmp_path, settings, 70.0 + 2 * number + seed / 5, teacher=name * 64)
    write(tmp_path, config("kd", 0, "teacher.checkpoint=c.pth"), 60.0, teacher="c" * 64)
    table = shown(both, tmp_path)
    assert [table.results[name, "res56_res20"].mean for name in "ab"] == [70.1, 72.1]
    assert any("(teacher.checkpoint c.pth instead of a.pth)" in note for note in table.notes)
    records = {record.folder: record for record in find_records([tmp_path]).records}.values()
    assert sorted(both.holds(record) for record in records) == [False, *[True] * 4]  # which publish and transfer ask
    one = path.read_text().replace("a.pth", "t.pth").replace("b.pth", "t.pth")
    path.write_text(one)
    both = layout(str(path), CONFIGS, tmp_path)
    own = config("kd", 0, "teacher.checkpoint=x/t.pth", "variant=b")
    record = read_record(write(tmp_path / "more", own, 60.0))
    assert [both.difference(cell, record) for cell in both.cells] == ["variant b instead of a", None]
    write(tmp_path / "own", config("kd", 0, "teacher.checkpoint=/there/tiny/vanilla/resnet56/seed0", "variant=b"), 61.0)
    note = "b res56_res20: its teacher is /there/tiny/vanilla/resnet56/seed0, not t.pth"
    assert note in shown(both, tmp_path / "own").notes  # as --train-teachers has it
    path.write_text(one.replace("t.pth, variant=a", "u.pth, variant=b"))
    with pytest.raises(UserError, match=r"a res56_res20 and b res56_res20 would write the same folder"):
        layout(str(path), CONFIGS, tmp_path)


def test_a_part_of_a_table_has_the_runs_that_the_whole_table_has(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    rows = "methods:\n  - {name: A, method: kd}\n  - {name: B, method: kd, set: [variant=again]}\n"
    path.write_text(f"title: mine\npairs: [res56_res20]\n{rows}")
    write(tmp_path, config("kd", 0), 70.0)
    for seed in (0, 1):
        session = {"started": f"2026-01-02T00:00:0{seed}+0000"}
        write(tmp_path, config("kd", seed, "variant=again"), 60.0, session=session)
    whole = layout(str(path), CONFIGS, tmp_path)
    for part in (whole, whole.part(["A"], None, None), whole.part(["B", "A"], None, None).part(["A"], None, None)):
        table = shown(part, tmp_path)
        assert table.results["A", "res56_res20"].values == [70.0]
        assert not [note for note in table.notes if note.startswith("left out")]
    assert sum(map(whole.part(["A"], None, None).holds, find_records([tmp_path]).records)) == 1


def test_complete_runs_of_the_table_s_seeds_decide_which_copy_it_shows(whole: Layout, tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path, config("kd", seed), 70.0)
    for seed in (2, 7, 8):
        write_record(tmp_path, config("kd", seed), [10.0], data="e" * 64)
    assert shown(whole, tmp_path).results["KD", "res56_res20"].values == [70.0, 70.0]


def test_a_run_without_the_figure_that_is_asked_for_is_told(whole: Layout, tmp_path: Path) -> None:
    path = write(tmp_path, config("kd", 0), 70.0) / "metrics.jsonl"
    path.write_text(path.read_text().replace("test/top5", "test/top9"))
    table = build(whole, find_records([tmp_path]), [], metrics=["top5"])
    assert "unfinished: KD res56_res20 seed 0: records no top-5 of the last epoch" in table.notes


def test_a_renamed_setting_is_no_other_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("title: mine\npairs: [res56_res20]\nmethods: [mlkd]\n")
    (cell,) = layout(str(path), CONFIGS, tmp_path).cells
    folder = write(tmp_path, config("mlkd", 0), 70.0)
    recorded = (folder / "config.yaml").read_text()
    start, _, distiller = recorded.partition("distiller:")
    (folder / "config.yaml").write_text(start + "distiller:" + distiller.replace(" variant:", " reading:", 1))
    record = read_record(folder)
    assert "distiller.reading" in record.settings
    assert cell.difference(record) is None


def test_rows_of_other_copies_of_the_data_are_told(whole: Layout, tmp_path: Path) -> None:
    write(tmp_path, config("kd", 0), 70.0)
    write(tmp_path, config("vanilla", 0), 69.0, data="e" * 64)
    note = "res56_res20: its rows were trained on 2 copies of the data, so do not compare them; none is marked as best"
    table = shown(whole, tmp_path)
    assert note in table.notes
    assert table.ranks("res56_res20") == {}


def test_a_published_copy_of_a_run_counts_once(whole: Layout, tmp_path: Path) -> None:
    folder = write(tmp_path / "runs", config("kd", 0), 70.0)
    shutil.copytree(folder, tmp_path / "results" / "copy")
    write(tmp_path / "again", config("kd", 0), 71.0, session={"started": "2026-01-02T00:00:00+0000"})
    table = shown(whole, tmp_path / "runs", tmp_path / "results", tmp_path / "again", tmp_path / "runs")
    assert table.results["KD", "res56_res20"].values == [70.0]
    assert len([note for note in table.notes if "a second run of this seed" in note]) == 1


def test_a_record_of_a_version_without_a_setting_is_of_its_default(whole: Layout, tmp_path: Path) -> None:
    folder = write(tmp_path, config("kd", 0), 70.0)
    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["solver"]["decay_norms"]
    path.write_text(yaml.safe_dump(settings))
    assert shown(whole, tmp_path).results["KD", "res56_res20"].values == [70.0]
    del settings["solver"]["momentum"]
    path.write_text(yaml.safe_dump({**settings, "nothing": None}))
    notes = shown(whole, tmp_path).notes
    assert any("(no solver.momentum instead of 0.9)" in note for note in notes)


def test_what_cannot_be_read_is_a_line(whole: Layout, tmp_path: Path) -> None:
    paths = [write(tmp_path, config("kd", seed), 70.0) for seed in range(6)]
    (paths[4] / "metrics.jsonl").write_text("none\n{}\n")
    (paths[5] / "env.json").write_text("{")
    (paths[0] / "env.json").write_text(json.dumps({"format": 2, "sessions": [], "more": 1}))
    (paths[1] / "config.yaml").write_text("a: &x [1]\nb: *x\n")
    (paths[2] / "metrics.jsonl").unlink()
    (paths[3] / "config.yaml").write_text("seed: 3\n")
    newer, alias, without, incomplete, garbage, cut = shown(whole, tmp_path).notes[-6:]
    assert garbage == f"{paths[4]}/metrics.jsonl is damaged: it has no line of an epoch"
    assert cut.startswith(f"{paths[5]}/env.json is damaged: Invalid JSON: EOF while parsing")
    assert "goes on" not in cut
    assert "env.json is of format 2, which a newer version of mdistill wrote" in newer
    assert newer.endswith("reads format 1: update mdistill")
    assert "config.yaml: not valid YAML: aliases (*name) are not read" in alias
    assert without == f"{paths[2]} holds no metrics.jsonl, so it is no record of a run"
    assert "config.yaml is damaged: it is not the complete configuration of a run" in incomplete
    with pytest.raises(UserError, match="no such run folder"):
        read_record(tmp_path / "nowhere")


ODD = [
    "",
    "[]",
    "{}",
    "null",
    "a: b",
    '{"sessions": [{"failed": 1}]}',
    '{"epoch": 1e999}',
    "\0\x1b[2J",
    "seed: [1]",
    "- 1",
]


@pytest.mark.parametrize("name", ["config.yaml", "env.json", "metrics.jsonl"])
def test_whatever_a_record_holds_the_table_is_shown(name: str, whole: Layout, tmp_path: Path) -> None:
    sound = write(tmp_path / "sound", config("kd", 0), 70.0)
    text = (sound / name).read_text()
    cut = [text[: len(text) * part // 7] for part in range(1, 7)]
    values = [
        text.replace(old, new) for old in ("240", "239", "70.0", "kd", "resnet20", "'") for new in ("[1]", "-1", "x")
    ]
    for number, content in enumerate([*ODD, *cut, *values]):
        folder = Path(shutil.copytree(sound, tmp_path / "damaged" / str(number)))
        (folder / name).write_text(content)
    table = shown(whole, tmp_path)
    forms: tuple[Format, ...] = ("text", "html", "csv")
    for form in forms:
        assert "\x1b" not in render(table, form)


def test_epochs_of_a_first_phase_are_no_figures(tmp_path: Path) -> None:
    folder = write_record(tmp_path, config("kd", 0), [10.0, 20.0])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "phase": "first", "train/loss": 1.0}\n{"epoch": 4, "lr"')
    record = read_record(folder)
    assert (record.done, record.top1, record.complete) == (3, None, False)


def external(top1: float, trial: str) -> External:
    last, best = EpochFigures(240, top1), EpochFigures(200, top1 + 0.5)
    networks = {"teacher": "resnet56", "student": "resnet20"}
    return External(
        "mdistiller", "a lab", "cifar100", "kd", **networks, trial=trial, epochs=240, last=last, best=best, files={}
    )


@pytest.fixture
def full(whole: Layout, tmp_path: Path) -> Table:
    """A table with figures in two rows, and one of others."""
    for seed in range(3):
        write(tmp_path, config("vanilla", seed), 69.0 + seed / 10)
        write(tmp_path, config("kd", seed), 70.0 + seed / 10)
    for number in range(2):
        folder = tmp_path / "external" / str(number)
        folder.mkdir(parents=True)
        (folder / "external.json").write_text(external(70.0 + number, str(number)).to_json())
    return shown(whole, tmp_path)


def test_runs_of_others_have_a_row_of_their_own(full: Table) -> None:
    (row,) = full.external
    assert row.name == "KD (external: a lab)"
    assert row.text("res56_res20", "last", "top1") == "70.50 ± 0.71 (n = 2)"
    assert row.text("res56_res20", "best", "top1") == "71.00 ± 0.71 (n = 2)"
    assert full.ranks("res56_res20") == {"KD": 1, "alone": 2}


def write_external(root: Path, name: str, **changes: Any) -> None:
    folder = root / "external" / name
    folder.mkdir(parents=True)
    (folder / "external.json").write_text(replace(external(70.0, name), **changes).to_json())


def test_runs_of_others_with_other_settings_or_lengths_share_no_row(whole: Layout, tmp_path: Path) -> None:
    write_external(tmp_path, "1", settings="r:0.1 a:0.9")
    write_external(tmp_path, "2", settings="r:1.0 a:3.0")
    write_external(tmp_path, "3", epochs=12)
    write_external(tmp_path, "4", last=None)
    rows = {row.name: row.text("res56_res20", "best", "top1") for row in shown(whole, tmp_path).external}
    more = ("12 epochs", "epochs not told", "r:0.1 a:0.9", "r:1.0 a:3.0")
    assert list(rows) == [f"KD (external: a lab, {each})" for each in more]
    assert set(rows.values()) == {"70.50 (n = 1)"}


def test_a_network_of_others_alone_stands_in_every_pair_with_it(whole: Layout, tmp_path: Path) -> None:
    write_external(tmp_path, "1", method="vanilla", teacher="")
    again = tuple(replace(cell, pair="again") for cell in whole.cells)
    both = replace(whole, pairs=(*whole.pairs, "again"), cells=(*whole.cells, *again))
    (row,) = shown(both, tmp_path).external
    assert list(row.cells) == ["res56_res20", "again"]


def test_as_text(full: Table) -> None:
    lines = render(full, "text").splitlines()
    assert lines[0] == "Two & three_rows"
    assert lines[4].split() == ["alone", "69.10", "±", "0.10", "'"]
    assert lines[5].split() == ["published", "69.06"]
    assert lines[7].split() == ["KD", "70.10", "±", "0.10", "*"]


def test_as_markdown(full: Table) -> None:
    lines = render(full, "markdown").splitlines()
    assert lines[0] == r"**Two & three\_rows**"
    assert "| alone | <u>69.10 ± 0.10</u> |" in lines
    assert "| difference | +0.04 |" in lines
    assert "| KD | **70.10 ± 0.10** |" in lines


def test_as_latex(full: Table) -> None:
    text = render(full, "latex")
    assert r"\caption{Two \& three\_rows. Top-1, last epoch, percent.}" in text
    assert "teacher & resnet56 \\\\\nstudent & resnet20 \\\\" in text
    assert r"KD & \textbf{70.10 $\pm$ 0.10} \\" in text
    assert r"alone & \underline{69.10 $\pm$ 0.10} \\" in text
    body = text.split(r"\begin{tabular}{lc}")[1].split(r"\end{tabular}")[0]
    assert all(line.count("&") - line.count(r"\&") == 1 for line in body.splitlines() if line.endswith(r"\\"))


def test_no_name_is_an_argument_of_the_last_line_in_latex(full: Table) -> None:
    rows = {"alone": "[4] alone", "KD": "*KD", "KD bf16": "KD"}
    layout = replace(full.layout, rows=tuple(rows.values()))
    results = {(rows[row], pair): each for (row, pair), each in full.results.items()}
    lines = render(replace(full, layout=layout, results=results), "latex").splitlines()
    assert [line.split(" &")[0] for line in lines if " & " in line][2:10:3] == ["{}[4] alone", "{}*KD", "KD"]


def test_as_csv(full: Table) -> None:
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(render(full, "csv")))}
    kd = rows["KD"]
    assert (kd["mean"], kd["std"], kd["runs"], kd["wanted"]) == ("70.1000", "0.1000", "3", "3")
    assert (kd["values"], kd["commits"]) == ("0:70.0000 1:70.1000 2:70.2000", COMMIT)
    assert len(kd["configs"]) == 16
    assert (rows["KD bf16"]["mean"], rows["KD bf16"]["runs"]) == ("", "0")
    assert (rows["KD (external: a lab)"]["kind"], rows["KD (external: a lab)"]["mean"]) == ("external", "70.5000")


class Page(html.parser.HTMLParser):
    """What a page holds, and whether every element is closed."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_as_a_page_of_its_own(full: Table) -> None:
    text = render(full, "html")
    page = Page(text)
    assert page.open == []
    attributes = [(tag, key, value) for tag, given in page.found for key, value in given.items()]
    assert not [each for each in attributes if each[1] in {"src", "style"} or each[0] in {"link", "script", "img"}]
    ids = [value for _, key, value in attributes if key == "id"]
    links = [value for _, key, value in attributes if key == "href"]
    told = [value for _, key, value in attributes if key == "aria-describedby"]
    assert len(set(ids)) == len(ids) == 4  # two cells have runs
    assert {f"#{each}" for each in ids if each not in told} == set(links)
    assert len({each for each in ids if each in told}) == len(links) == 2
    assert problems(text) == []
    assert "<small>resnet20</small><small>res56_res20</small>" in text
    assert all("data-label" in given for tag, given in page.found if tag == "td")
    assert '<html lang="en">' in text
    assert 'name="viewport"' in text
    assert "Two &amp; three_rows" in text
    for what in (COMMIT[:12], "seed 1: 70.10", "69.06 (+0.04)", 'class="best"', 'class="second"'):
        assert what in text


def test_the_page_tells_of_changes_to_the_code(whole: Layout, tmp_path: Path) -> None:
    write(tmp_path, config("kd", 0), 70.0, session={"commit": f"{COMMIT}+changes"})
    assert render(shown(whole, tmp_path), "html").count(f"{COMMIT[:12]}+changes<") == 2  # the figure, and below


def test_a_table_with_pairs_and_settings_of_its_own_is_resolved_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.yaml"
    own = "{name: own, teacher: {name: resnet56, checkpoint: t.pth}, student: {name: resnet20}}"
    row = "{name: KD, method: kd, settings: {temperature: 2.0, kd_weight: 0.9, ce_weight: 0.1}}"
    path.write_text(f"title: Mine\npairs: [{own}]\nmethods: [{row}]\n")
    first = layout(str(path), CONFIGS, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(table_files, "read_table", None)
        assert layout(str(path), CONFIGS, tmp_path) == first
    path.write_text(path.read_text().replace("2.0", "3.0"))
    assert layout(str(path), CONFIGS, tmp_path).cells[0].settings["distiller.temperature"] == 3.0


def test_a_table_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, runs = tmp_path / "mine.yaml", tmp_path / "runs"
    path.write_text(TABLE)
    runs.mkdir()
    first = layout(str(path), CONFIGS, runs)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(table_files, "read_table", again)
        assert layout(str(path), CONFIGS, runs) == first
        for other in ({"epochs": 5}, {"imports": ["string"]}):
            with pytest.raises(AssertionError):
                layout(str(path), CONFIGS, runs, **other)
    with_module = layout(str(path), CONFIGS, runs, imports=["string"])  # what it imports is not watched
    assert (with_module.cells, len([*(runs / table_cells.MEMORY).iterdir()])) == (first.cells, 1)
    path.write_text(TABLE.replace("  - {name: alone, method: vanilla}\n", ""))
    assert layout(str(path), CONFIGS, runs).rows == ("KD", "KD bf16")
    for memory in (runs / table_cells.MEMORY).iterdir():
        memory.write_text("{}")
    assert layout(str(path), CONFIGS, runs).rows == ("KD", "KD bf16")


def test_schedules_that_were_shortened(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TABLE)
    whole = layout(str(path), CONFIGS, tmp_path, epochs=4)
    run = config("vanilla", 0, "solver.epochs=4", "solver.milestones=[2,3]")
    write_record(tmp_path / "runs", run, [1.0, 2.0, 3.0, 9.0], top5=30.0)
    table = shown(whole, tmp_path / "runs")
    alone = table.results["alone", "res56_res20"]
    assert table.title == "Two & three_rows, schedules shortened to 4 epochs"
    assert (alone.text, alone.published, alone.difference) == ("9.00 (1 of 3)", 69.06, None)


def test_notes_of_rows_and_pairs_that_are_not_shown_are_left_out(whole: Layout) -> None:
    notes = ("alone: one", "KD, res56_res20: two", "KD bf16, KD: three", "all: four", "KD, other: five", "six")
    noted = replace(whole, notes=notes)
    assert noted.part(["KD"], None, None).notes == notes[1:]
    assert noted.part(["alone"], None, None).notes == (notes[0], *notes[3:])
    assert noted.part(None, None, None).notes == notes


def test_a_part_of_a_table(whole: Layout) -> None:
    part = whole.part(["KD"], None, [5])
    assert (part.rows, part.seeds, [cell.row for cell in part.cells]) == (("KD",), (5,), ["KD"])
    with pytest.raises(
        UserError, match=r"--methods: unknown 'KD bf61'; did you mean 'KD bf16'\? \(in this table: alone"
    ):
        whole.part(["KD bf61"], None, None)
    with pytest.raises(UserError, match="--pairs: unknown 'res56_res2'; did you mean 'res56_res20'"):
        whole.part(None, ["res56_res2"], None)
