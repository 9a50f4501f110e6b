"""Table files, the plan of a table, and what becomes of its runs; processes are stood in for."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mdistill.cli import table as table_cli
from mdistill.cli.train import main as train_main
from mdistill.engine.claims import Claims
from mdistill.errors import UserError
from mdistill.files import lock_folder
from mdistill.reporting import table_runs
from mdistill.reporting.published import Figure, disagreeing, figure_of, read_published
from mdistill.reporting.table_files import Table, cell_of, find_table, read_table, runs_of, short
from mdistill.reporting.table_plan import Run, plan
from mdistill.reporting.table_runs import Outcome, WorkerLost, train
from mdistill.reporting.table_speeds import Speeds

from ..tables import write_configs

ROOT = Path(__file__).resolve().parents[2]
FIGURES = read_published(ROOT / "results" / "published.csv")
RECIPE = """
data: {name: tiny, batch_size: 64}
solver: {name: sgd, epochs: 40, lr: 0.05, milestones: [20, 30], gamma: 0.1, momentum: 0.9, weight_decay: 5e-4}
"""
TABLE = """
title: a table
dataset: small
pairs: [wide_narrow, {name: wide_deep, teacher: {name: tiny_net, width: 32, checkpoint: teacher.pt}, student: {name:
  resnet8x4}}]
methods:
  - {name: alone, method: vanilla, without: {wide_deep: there is no need}}
  - kd
  - {name: hot, method: kd, set: [distiller.temperature=8]}
  - {name: mine, method: kd, settings: {ce_weight: 1.0, kd_weight: 1.0, temperature: 2.0}, set: [variant=mine]}
seeds: [0, 1]
"""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder of configurations with a data set, a pair and two methods."""
    return write_configs(tmp_path, RECIPE, distiller="warmup_epochs: 8")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "table.yaml"
    path.write_text(TABLE)
    return path


@pytest.fixture
def planned(file: Path, configs: Path, tmp_path: Path) -> Callable[..., list[Run]]:
    """The runs of the table, or of a part of it; the teacher is there unless ``teacher`` says otherwise."""

    def make(
        *, teacher: bool = True, train_teachers: bool = False, epochs: int | None = None, **part: Any
    ) -> list[Run]:
        if teacher:
            (tmp_path / "teacher.pt").write_text("")
        return plan(
            read_table(file, configs, epochs=epochs, **part),
            output=tmp_path / "runs",
            checkpoint_root=tmp_path,
            configs=configs,
            train_teachers=train_teachers,
        )

    return make


def write_run(run: Run, epochs: int | None = None, seconds: float = 2.0, **changed: Any) -> None:
    """Its folder, as if it had trained for some of its epochs."""
    done = run.epochs if epochs is None else epochs
    run.folder.mkdir(parents=True, exist_ok=True)
    config = run.config.model_copy(update=changed)
    (run.folder / "config.yaml").write_text(config.to_yaml())
    lines = [{"epoch": epoch, "seconds/train": seconds, "seconds/eval": 0.5} for epoch in range(1, done + 1)]
    (run.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if done == run.epochs:
        (run.folder / "student.pt").write_text("")


# ---- table files ---------------------------------------------------------------------------------------------------


def test_runs_come_seed_by_seed_and_a_run_of_two_cells_once(planned: Callable[..., list[Run]], tmp_path: Path) -> None:
    runs = planned(pairs=["wide_narrow"])
    assert [run.label for run in runs] == [
        f"{row} wide_narrow seed {seed}" for seed in (0, 1) for row in ("alone", "kd", "hot", "mine")
    ]
    assert [str(run.folder.relative_to(tmp_path / "runs")) for run in runs[:4]] == [
        "tiny/vanilla/tiny_net/seed0",
        "tiny/kd/tiny_net_tiny_net/seed0",
        "tiny/kd/tiny_net_tiny_net/temperature=8/seed0",
        "tiny/kd/tiny_net_tiny_net/mine/seed0",
    ]
    assert [run.cell.arguments(1)[:2] for run in runs[:4]] == [
        ["--cfg", str(tmp_path / "configs/small/vanilla/tiny_net.yaml")],
        ["--cfg", str(tmp_path / "configs/small/kd")],
        ["--cfg", str(tmp_path / "configs/small/kd")],
        ["--cfg", str(tmp_path / "table.yaml")],
    ]


def test_a_pair_of_the_table_file(file: Path, configs: Path) -> None:
    file.write_text(TABLE.replace(", without: {wide_deep: there is no need}", ""))
    table = read_table(file, configs, pairs=["wide_deep"])
    by_row = {cell.row.name: cell.config(3) for cell in table.cells}
    assert by_row["alone"].teacher is None
    assert {config.student.name for config in by_row.values()} == {"resnet8x4"}
    assert by_row["kd"].distiller.arguments["temperature"] == 4.0
    assert by_row["hot"].distiller.arguments["temperature"] == 8.0
    assert by_row["mine"].distiller.arguments["warmup_epochs"] == 0
    teacher = by_row["mine"].teacher
    assert teacher is not None
    assert (teacher.arguments["width"], by_row["mine"].seed) == (32, 3)


@pytest.mark.parametrize("epochs", [None, 10, 4])
def test_what_the_table_file_holds_is_trained_from_it(
    epochs: int | None, file: Path, configs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arguments that a run is begun with say the same as the cell, in a table that shortens its schedules too."""
    file.write_text(TABLE + ("" if epochs is None else "epochs: 10\n"))
    monkeypatch.setattr("mdistill.cli.common.project_root", lambda: configs.parent)
    for cell, seed in runs_of(read_table(file, configs, seeds=[1], overrides=["solver.lr=0.1"])):
        cell = cell if epochs is None else short(cell, epochs)
        assert train_main([*cell.arguments(seed), "--print-config"]) == 0
        assert capsys.readouterr().out == cell.config(seed).to_yaml()


def test_a_row_that_was_changed_while_its_table_runs_is_not_trained(
    file: Path, configs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdistill.cli.common.project_root", lambda: configs.parent)
    (cell,) = read_table(file, configs, methods=["mine"], pairs=["wide_narrow"]).cells
    file.write_text(TABLE.replace("temperature: 2.0", "temperature: 3.0"))
    assert train_main([*cell.arguments(0), "--print-config"]) == 2
    line = f"error: {file}: mine wide_narrow was changed while its table ran; start the table again\n"
    assert capsys.readouterr().err == line


def test_epochs_of_a_shortened_table_are_changed_by_its_flag(file: Path, configs: Path) -> None:
    with pytest.raises(UserError, match=r"^solver.epochs: schedules are shortened to 4 here; give --epochs N instead$"):
        read_table(file, configs, overrides=["solver.epochs=3"], epochs=4)
    file.write_text(TABLE + "epochs: 10\n")
    config = cell_of(file, configs, "mine", "wide_narrow", overrides=["solver.epochs=6"]).config(0)
    assert (config.epochs, config.solver.milestones) == (6, (5, 8))  # of one run alone they are as asked for


def test_one_cell(file: Path, configs: Path) -> None:
    assert cell_of(file, configs, "mine", "wide_narrow").config(None).seed == 0
    with pytest.raises(UserError, match=r"^--pair: .*table.yaml has 2 pairs; name one of wide_narrow, wide_deep$"):
        cell_of(file, configs, "mine", None)
    with pytest.raises(UserError, match=r"^--row: unknown 'mind'; did you mean 'mine'\?"):
        cell_of(file, configs, "mind", None)
    with pytest.raises(UserError, match=r"table.yaml: alone wide_deep: left out, there is no need$"):
        cell_of(file, configs, "alone", "wide_deep")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("title: a table", "titel: a table", "title: missing"),
        ("title: a table", "title: a\nseads: [1]", "seads: unknown key; did you mean 'seeds'? (allowed: "),
        ("method: vanilla,", "metod: vanilla,", "methods.0.metod: unknown key; did you mean 'method'? (allowed: "),
        ("seeds: [0, 1]", "seeds: [0, one]", "seeds.1: should be a valid integer, found 'one'"),
        ("seeds: [0, 1]", "seeds: [1, 1]", "seeds: 1 is given twice"),
        ("  - kd\n", "  - kd\n  - kd\n", "methods: 'kd' is given twice"),
        ("  - kd\n", "  - 3\n", "methods.1: should be a name, or a section of `key: value` lines, found 3"),
        ("  - kd\n", "  - kdd\n", "methods: 'kdd' is neither a folder of "),
        ("dataset: small", "dataset: smal", "dataset: no folder "),
        ("[wide_narrow,", "[wide_narow,", "pairs: unknown pair 'wide_narow' in "),
        ("{wide_deep: there", "{wide: there", "methods: alone: without: 'wide' is no pair of this table"),
        ("method: kd, settings", "method: kdd, settings", "unknown method 'kdd' in "),
    ],
)
def test_a_mistake_in_a_table_file_is_one_line(file: Path, configs: Path, old: str, new: str, line: str) -> None:
    assert old in TABLE
    file.write_text(TABLE.replace(old, new))
    with pytest.raises(UserError) as caught:
        read_table(file, configs)
    lines = [each for each in str(caught.value).splitlines() if line in each]
    assert len(lines) == 1
    assert str(file) in lines[0]


def test_settings_that_a_method_does_not_take_are_told_with_their_place(file: Path, configs: Path) -> None:
    file.write_text(TABLE.replace("kd_weight: 1.0,", "kd_wait: 1.0,"))
    (cell,) = read_table(file, configs, methods=["mine"], pairs=["wide_narrow"]).cells
    with pytest.raises(UserError) as caught:
        cell.config(0)
    assert f"{file}: methods: mine: distiller.kd_wait: " in str(caught.value)


def test_two_rows_that_would_share_a_folder_are_told(planned: Callable[..., list[Run]], file: Path) -> None:
    file.write_text(TABLE.replace(", set: [variant=mine]", ""))
    with pytest.raises(UserError, match=r"kd wide_narrow seed 0 and mine wide_narrow seed 0 would write the same fold"):
        planned()


def test_unknown_tables_are_told(configs: Path) -> None:
    with pytest.raises(
        UserError, match=r"^unknown table 'mcld_tabel2'; did you mean 'mcld_table2'\? \(known: cifar100_cpu, mcld_tab"
    ):
        find_table("mcld_tabel2", ROOT / "configs")
    with pytest.raises(UserError, match=r"^no such table file: nothing.yaml$"):
        find_table("nothing.yaml", configs)


# ---- shipped ones --------------------------------------------------------------------------------------------------

TABLES = sorted((ROOT / "configs" / "tables").glob("*.yaml"))
PAPERS = [path for path in TABLES if path.stem != "cifar100_cpu"]
UNPUBLISHED = {  # rows without a figure: which of the printed ones is theirs is not known
    "mcld_table7": {"MCLD: instance", "MCLD: sample", "MCLD: category"}
    | {"MCLD: instance + sample", "MCLD: instance + category", "MCLD: sample + category"},
}
BY_HAND = {  # of the papers
    ("mcld_table1", "LSKD + MLKD", "res32x4_shuv2"): 72.13,
    ("mcld_table2", "CTKD", "res32x4_res8x4"): 76.67,
    ("mcld_table2", "student alone", "res56_res20"): 69.06,
    ("mcld_table3", "LSKD + MLKD (240 epochs)", "vgg13_vgg8"): 57.88,
    ("mcld_table3", "LSKD + MLKD (480 epochs)", "vgg13_vgg8"): 74.55,
    ("mcld_table4", "LSKD + MLKD (240 epochs)", "res50_mv2"): 19.63,
    ("mcld_table4", "MCLD", "res50_mv2"): 72.41,
    ("mcld_table5", "MCLD", "res50_mv1"): 72.98,
    ("mcld_table5", "CTKD", "res34_res18"): 71.38,
    ("mcld_table6", "MCLD", "res110_res20"): 71.36,
    ("mcld_table6", "DKD", "res32x4_mv2"): 69.72,
    ("mcld_table7", "MCLD", "res32x4_res8x4"): 77.89,
    ("mcld_table8", "student alone", "res32x4_res8x4"): 65.18,
    ("mcld_table8", "DKD", "res32x4_res8x4"): 70.09,
    ("mcld_table8", "DOT + DKD", "res32x4_res8x4"): 68.88,
    ("mcld_table8", "MCLD", "res32x4_res8x4"): 70.61,
    ("mcld_table8", "teacher alone", "res32x4_res8x4"): 65.78,
    ("mcld_table9", "student alone", "res110_res20"): 62.45,
    ("mcld_table9", "DOT + DKD", "res110_res20"): 64.79,
    ("mcld_table9", "LSKD + DKD", "res110_res20"): 65.40,
    ("mcld_table9", "MCLD", "res110_res20"): 66.97,
    ("mcld_table9", "teacher alone", "res110_res20"): 63.99,
    ("mcld_table10", "KD", "wrn28_4_wrn16_2"): 75.04,
    ("mcld_table11", "DKD", "wrn16_4_wrn16_2"): 76.00,
    ("rld_table1", "mask g alone", "res32x4_res8x4"): 75.50,
    ("rld_table1", "mask ge alone", "res32x4_res8x4"): 75.64,
    ("rld_table1", "mask g + confidence", "res32x4_res8x4"): 75.53,
    ("rld_table1", "RLD", "res32x4_res8x4"): 76.64,
    ("rld_table2", "LR", "res50_mv2"): 70.38,
    ("rld_table4", "RC", "res34_res18"): 71.59,
    ("rld_table5", "sample confidence", "res32x4_res8x4"): 73.55,
    ("rld_table6", "LSKD + RLD", "vgg13_mv2"): 70.63,
}


def published(table: Table, cell: Any, metric: str = "top1") -> Figure | None:
    config = cell.config(0)
    teacher = config.teacher.name if config.teacher else ""
    variant = config.variant if cell.row.published is None else cell.row.published
    key = (config.data.name, config.distiller.name, variant, teacher, config.student.name)
    return figure_of(FIGURES, key, epochs=config.solver.epochs, source=table.source, table=table.number, metric=metric)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_cell_of_a_paper_has_a_configuration_and_its_figure(path: Path) -> None:
    table = read_table(path, ROOT / "configs")
    assert path.read_text().startswith(f"# mdistill table run {path.stem}\n")
    assert {row.name for row in table.rows} >= UNPUBLISHED.get(path.stem, set())
    missing = set()
    for cell in table.cells:
        for metric in table.metrics:
            figure = published(table, cell, metric)
            if figure is None:
                missing.add(cell.row.name)
                continue
            wanted = BY_HAND.get((path.stem, cell.row.name, cell.pair))
            assert metric != table.metrics[0] or wanted in (None, figure.value)
    gap = {"LSKD + MLKD"} if path.stem == "mcld_table1" else set()  # one cell is empty, and stands in Table 4
    assert missing - gap == UNPUBLISHED.get(path.stem, set())


def test_all_tables_are_there() -> None:
    wanted = [f"mcld_table{number}" for number in range(1, 12)]
    assert {path.stem for path in PAPERS} == {*wanted, *(f"rld_table{number}" for number in range(1, 7))}


def test_the_table_of_real_runs_is_of_a_shortened_schedule() -> None:
    table = read_table(ROOT / "configs" / "tables" / "cifar100_cpu.yaml", ROOT / "configs")
    assert table.epochs == 8
    for cell in table.cells:
        solver = short(cell, table.epochs).config(0).solver
        assert (solver.epochs, solver.milestones, solver.lr) == (8, (5, 6, 7), 0.05)
    row = table.rows[1]
    one = cell_of(table.path, ROOT / "configs", row.name, None)
    assert one.config(0).solver.milestones == (5, 6, 7)  # one of its runs alone is of that schedule too


@pytest.mark.slow
def test_where_papers_disagree() -> None:
    """On four cells of their tables, and the MCLD paper on one with itself."""
    papers = [figure for figure in FIGURES if figure.source in {"MCLD paper", "RLD paper"}]
    cells = {
        (figure.method, figure.variant, figure.teacher, figure.student)
        for figure in papers
        if figure.epochs == 240 and disagreeing(papers, figure)
    }
    assert cells == {
        ("kd", "", "wrn_40_2", "resnet8x4"),
        ("ctkd", "", "resnet32x4", "resnet8x4"),
        ("dkd", "lskd", "wrn_40_2", "mobilenet_v2"),
        ("dkd", "lskd", "resnet50", "mobilenet_v2"),
        ("mcld", "", "resnet110", "resnet20"),
    }


def test_the_example_of_the_guide_is_a_table(tmp_path: Path) -> None:
    blocks = re.findall(r"```(?:yaml|python)\n(.*?)```", "".join(
        (ROOT / "docs" / name).read_text() for name in ("tables.md", "extending.md")
    ), re.DOTALL)  # fmt: skip
    (table,) = (block for block in blocks if block.startswith("# my_table.yaml"))
    (module,) = (block for block in blocks if block.startswith("# my_features.py"))
    (tmp_path / "my_table.yaml").write_text(table.replace("my_features", "my_features_of_a_table"))
    (tmp_path / "my_features_of_a_table.py").write_text(module.replace("my_features", "my_features_of_a_table"))
    found = read_table(tmp_path / "my_table.yaml", ROOT / "configs")
    assert len(found.cells) == 8
    configurations = [cell.config(0) for cell in found.cells if cell.row.name.startswith("mine")]
    assert [config.distiller.arguments["weight"] for config in configurations] == [0.5, 0.5, 2.0, 2.0]
    assert {config.imports for config in configurations} == {("my_features_of_a_table",)}


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_what_is_there(planned: Callable[..., list[Run]]) -> None:
    first, second, third, fourth, *others = planned(pairs=["wide_narrow"])
    write_run(first)
    write_run(second, 12)
    write_run(third, distiller=second.config.distiller)
    write_run(fourth, epochs=40, solver=fourth.config.solver.model_copy(update={"epochs": 80}))
    with open(second.folder / "metrics.jsonl", "a") as metrics:
        metrics.write('{"epoch": 13, "seconds/tr')  # as a kill leaves it
    assert [run.state for run in planned(pairs=["wide_narrow"])] == [
        *("complete", "begun", "other", "other"),
        *["missing"] * len(others),
    ]
    assert (second.epochs_done, third.difference) == (12, "distiller.temperature: 4.0 there, 8.0 here")
    assert fourth.difference == "solver.epochs: 80 there, 40 here"
    write_run(second)  # what has changed is looked at again
    assert second.state == "complete"
    (second.folder / "student.pt").unlink()
    assert second.state == "begun"


def test_a_run_may_have_grown(planned: Callable[..., list[Run]]) -> None:
    run = planned(pairs=["wide_narrow"], methods=["kd"])[0]
    write_run(run, 20, solver=run.config.solver.model_copy(update={"epochs": 20}))
    assert (run.state, run.epochs_done) == ("begun", 20)


def test_a_shortened_schedule_keeps_its_proportions(file: Path, configs: Path) -> None:
    (cell,) = read_table(file, configs, methods=["kd"], pairs=["wide_narrow"]).cells
    config = short(cell, 10).config(0)
    assert (config.solver.epochs, config.solver.milestones) == (10, (5, 8))
    assert config.distiller.arguments["warmup_epochs"] == 2
    assert short(cell, 1).config(0).solver.milestones == ()


def test_a_missing_teacher_is_told_or_trained(planned: Callable[..., list[Run]], tmp_path: Path) -> None:
    part = {"methods": ["kd"], "pairs": ["wide_narrow"], "seeds": [0]}
    (run,) = planned(teacher=False, **part)
    assert run.missing is not None
    assert re.match(
        r"teacher\.checkpoint: no tiny_net weights at .*teacher\.pt .*, with --train-teachers$", run.missing
    )
    teacher, run = planned(teacher=False, train_teachers=True, **part)
    folder = tmp_path / "runs/tiny/vanilla/tiny_net/width=32/seed0"  # as the pair has it
    assert (teacher.label, teacher.folder) == ("teacher tiny_net seed 0", folder)
    assert teacher.config.student.arguments == {"width": 32}
    assert (run.needs, run.missing) == (teacher.key, None)
    assert f"teacher.checkpoint={teacher.folder}" in run.cell.arguments(0)
    write_run(teacher)
    assert planned(teacher=False, **part)[-1].missing is None  # it is there now


OWN_PAIR = """
title: a table
dataset: small
pairs: [{name: own, teacher: {name: tiny_net, checkpoint: gone.pt}, student: {name: resnet8x4}, data: {name: synthetic,
  fine_classes: 2}, solver: {lr: 0.2}}, {name: plain, teacher: {name: tiny_net, checkpoint: gone.pt}, student: {name:
  resnet8x4}}]
methods: [kd, {name: tuned, method: kd, set: [data.batch_size=8, variant=tuned]}]
seeds: [0]
"""


def test_a_teacher_is_trained_on_the_data_of_its_pair(planned: Callable[..., list[Run]], file: Path) -> None:
    file.write_text(OWN_PAIR)
    own, plain, *students = planned(teacher=False, train_teachers=True)
    assert (own.label, plain.label) == ("teacher tiny_net seed 0", "teacher tiny_net seed 0")
    assert own.config.data == students[0].config.data  # not of a row that has another
    assert own.config.data.arguments["fine_classes"] == 2
    assert (own.config.solver.lr, plain.config.data.name) == (0.05, "tiny")
    assert [run.needs for run in students] == [own.key, plain.key] * 2


def test_a_teacher_and_a_row_share_a_folder_only_where_they_are_one_run(
    planned: Callable[..., list[Run]], file: Path
) -> None:
    row = "{name: alone, method: vanilla, settings: {ce_weight: 1.0}, set: [SET]}"
    text = OWN_PAIR.replace("resnet8x4", "tiny_net").replace("methods: [kd", f"methods: [{row}, kd")
    file.write_text(text.replace("SET", "solver.epochs=2"))
    with pytest.raises(UserError, match=r"alone plain seed 0 and teacher tiny_net seed 0 would write the same folder"):
        planned(teacher=False, train_teachers=True, pairs=["plain"])
    file.write_text(text.replace(", set: [SET]", ""))
    runs = planned(teacher=False, train_teachers=True, pairs=["plain"])
    assert [run.label for run in runs] == ["alone plain seed 0", "kd plain seed 0", "tuned plain seed 0"]
    assert runs[1].needs == runs[0].key


def test_a_run_of_another_teacher_is_another_run(planned: Callable[..., list[Run]], tmp_path: Path) -> None:
    part = {"methods": ["kd"], "pairs": ["wide_narrow"], "seeds": [0]}
    (run,) = planned(**part)
    teacher = run.config.teacher
    assert teacher is not None
    write_run(run, teacher=teacher.model_copy(update={"checkpoint": "other.pt"}))
    assert run.state == "other"
    assert run.difference == "teacher.checkpoint: 'other.pt' there, 'teacher.pt' here"
    own = hashlib.sha256(b"").hexdigest()
    for name, digest, state in (("teacher.pt", "b" * 64, "other"), ("moved.pt", own, "complete")):
        write_run(run, teacher=teacher.model_copy(update={"checkpoint": name}))
        sessions = [{"teacher": {"files": [{"sha256": digest}]}}]
        (run.folder / "env.json").write_text(json.dumps({"sessions": sessions}))
        assert run.state == state
    (tmp_path / "teacher.pt").unlink()
    (run,) = planned(teacher=False, **part)
    assert run.state == "other"  # nothing but the name can be told now


def test_time_left_by_what_is_recorded(planned: Callable[..., list[Run]], tmp_path: Path) -> None:
    runs = planned(pairs=["wide_narrow"], methods=["kd", "hot"], seeds=[0])
    assert Speeds(runs, [tmp_path / "runs"]).left(runs) == (0, 80)
    write_run(runs[0], 10, seconds=1.5)
    assert Speeds(runs, [tmp_path / "runs"]).left(runs) == (70 * 2.0, 0)  # the other one is of the same pair
    write_run(runs[0])
    assert Speeds(runs, [tmp_path / "runs"]).left(runs)[1] == 0


def test_time_left_by_the_threads_of_a_cpu(
    planned: Callable[..., list[Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs at a time with half the cores each take as long as one after the other with all of them."""
    runs = planned(pairs=["wide_narrow"], methods=["kd", "hot"], seeds=[0])
    write_run(runs[0], 10, seconds=1.5)
    environment = {"kernels": "AVX512", "threads": 12}
    (runs[0].folder / "env.json").write_text(json.dumps({"sessions": [environment]}))
    monkeypatch.setattr(table_runs.os, "sched_getaffinity", lambda process: range(12), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seconds = [Speeds(runs, [tmp_path / "runs"], table_runs.threads_of(jobs)).left(runs)[0] / jobs for jobs in (1, 2)]
    assert seconds == [140.0, 140.0]
    environment["kernels"] = None  # on a GPU
    (runs[0].folder / "env.json").write_text(json.dumps({"sessions": [environment]}))
    assert Speeds(runs, [tmp_path / "runs"], 6).left(runs)[0] == 140.0


# ---- training ------------------------------------------------------------------------------------------------------


class Trained:
    """A process that has done its run, or failed, by the time it is asked."""

    def __init__(self, code: int) -> None:
        self.code, self.terminated = code, 0

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.terminated += 1


class Endless(Trained):
    """A process that ends when it is asked to."""

    def poll(self) -> int | None:
        return 75 if self.terminated else None


Work = Callable[..., Outcome]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """Train runs: ``errors`` says what those print that fail, by label; all others are done at once."""
    monkeypatch.setattr(table_runs, "POLL", 0)
    monkeypatch.setattr(table_runs, "SCAN", 0)
    claims = Claims(tmp_path / "runs" / ".claims")

    def make(
        runs: Sequence[Run],
        errors: Mapping[str, str] | None = None,
        *,
        begun: list[str] | None = None,
        told: list[str] | None = None,
        process: Callable[[int], Trained] = Trained,
        stop: Callable[[], bool] = lambda: False,
        jobs: int = 1,
    ) -> Outcome:
        def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Trained:
            run = next(run for run in runs if run.key == log.stem)
            assert arguments[: len(run.cell.arguments(run.seed))] == run.cell.arguments(run.seed)
            (begun if begun is not None else []).append(run.label)
            error = (errors or {}).get(run.label)
            log.write_text(f"hello\n{error}\n" if error else "")
            if error is None and process is Trained:
                write_run(run)
            return process(1 if error else 0)

        return train(
            runs,
            claims,
            logs=tmp_path / "runs" / ".logs",
            jobs=jobs,
            flags=["--device", "cpu"],
            asked_to_stop=stop,
            report=lambda active, outcome: None,
            tell=(told if told is not None else []).append,
            start=start,
        )

    yield make
    claims.close()


def test_what_fails_does_not_keep_the_others(planned: Callable[..., list[Run]], work: Work) -> None:
    runs = planned(pairs=["wide_narrow"])
    errors = {
        "kd wide_narrow seed 0": "error: loss is not finite\nerror: and more",
        "hot wide_narrow seed 1": "Traceback\nValueError: odd",
    }
    outcome = work(runs, errors)
    assert len(outcome.complete) == len(runs) - 2
    assert outcome.failures() == [
        "kd wide_narrow seed 0: loss is not finite",
        "hot wide_narrow seed 1: ValueError: odd",
    ]
    begun: list[str] = []
    outcome = work(runs, begun=begun)  # once more: only those
    assert begun == [*errors]
    assert not outcome.failed


def test_runs_without_a_teacher_or_of_other_settings_are_listed_once_for_each_reason(
    planned: Callable[..., list[Run]], work: Work
) -> None:
    runs = planned(teacher=False, pairs=["wide_narrow"])
    write_run(runs[0], 3, solver=runs[0].config.solver.model_copy(update={"lr": 1.0}))
    begun: list[str] = []
    outcome = work(runs, begun=begun)
    assert begun == ["alone wide_narrow seed 1"]
    other, missing = outcome.failures()
    assert re.match(
        r"alone wide_narrow seed 0: .*seed0 holds a run of other settings \(solver.lr: 1.0 there, 0.05 h", other
    )
    assert missing.startswith(
        "kd wide_narrow seed 0, hot wide_narrow seed 0, mine wide_narrow seed 0, kd wide_narrow seed 1 and 2 more: "
    )


def test_a_teacher_is_trained_first_and_its_failure_is_that_of_its_students(
    planned: Callable[..., list[Run]], work: Work
) -> None:
    runs = planned(teacher=False, train_teachers=True, methods=["kd"], pairs=["wide_narrow"])
    outcome = work(runs, {"teacher tiny_net seed 0": "error: no memory"}, jobs=2)
    assert outcome.failures()[1] == "kd wide_narrow seed 0, kd wide_narrow seed 1: its teacher failed: no memory"
    begun: list[str] = []
    assert len(work(runs, begun=begun, jobs=2).complete) == 3
    assert begun[0] == "teacher tiny_net seed 0"


def test_a_stop_asks_every_run_once(planned: Callable[..., list[Run]], work: Work) -> None:
    runs = planned(pairs=["wide_narrow"])
    started: list[Endless] = []

    def process(code: int) -> Endless:
        started.append(Endless(code))
        return started[-1]

    asked = iter([False, False, *[True] * 9])
    outcome = work(runs, process=process, stop=lambda: next(asked), jobs=2)
    assert [each.terminated for each in started] == [1, 1]
    assert len(outcome.stopped) == len(runs)
    assert not outcome.failed


def test_a_claim_of_a_dead_host_is_one_line(
    planned: Callable[..., list[Run]], work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = planned(pairs=["wide_narrow"], methods=["kd"], seeds=[0])
    other = Claims(tmp_path / "runs" / ".claims")
    other.take(runs[0].key)
    claim = other.last(runs[0].key)
    assert claim is not None
    owner = claim.path / "owner.json"
    owner.write_text(json.dumps({**json.loads(owner.read_text()), "host": "gone", "process": 77}))
    silent = iter([200.0, 250.0, 310.0, 310.0])
    real = Claims.last
    monkeypatch.setattr(
        Claims,
        "last",
        lambda claims, key: (found := real(claims, key)) and replace(found, silent=next(silent, 310.0)),
    )
    told: list[str] = []
    assert len(work(runs, told=told).complete) == 1
    assert told == [
        "kd wide_narrow seed 0: claimed by process 77 on gone, silent for 250 s; if it stays so, it is taken over after"
        " 300 s",
        "kd wide_narrow seed 0: taken over from process 77 on gone, silent for 310 s",
        "complete: kd wide_narrow seed 0",
    ]
    other.close()


def test_a_folder_that_is_in_use_is_told_once_and_waited_for(planned: Callable[..., list[Run]], work: Work) -> None:
    (run,) = planned(pairs=["wide_narrow"], methods=["kd"], seeds=[0])
    lock = lock_folder(run.folder, "run folder")
    looks = iter(range(9))

    def stop() -> bool:
        if next(looks) == 3:
            lock.release()
        return False

    told: list[str] = []
    assert len(work([run], told=told, stop=stop).complete) == 1
    assert told == [
        f"kd wide_narrow seed 0: waits for another process, which trains into {run.folder}",
        "complete: kd wide_narrow seed 0",
    ]


def test_a_folder_that_cannot_be_locked_fails(planned: Callable[..., list[Run]], work: Work) -> None:
    (run,) = planned(pairs=["wide_narrow"], methods=["kd"], seeds=[0])
    (run.folder / ".lock").mkdir(parents=True)
    (line,) = work([run]).failures()
    assert line.startswith(f"kd wide_narrow seed 0: run folder {run.folder} cannot be written: ")


class Remote(Trained):
    """A process on another machine: what it has come to, each time that it is asked; then how it ended."""

    def __init__(self, code: int, *steps: Callable[[], None]) -> None:
        super().__init__(code)
        self.steps = iter(steps)

    def poll(self) -> int | None:
        for step in self.steps:
            step()
            return None if self.terminated else self.code
        return self.code

    def has_begun(self) -> bool:
        return True


def lose() -> None:
    raise WorkerLost("its node is gone")


def test_a_run_whose_worker_is_lost_is_handed_out_again(planned: Callable[..., list[Run]], work: Work) -> None:
    runs = planned(pairs=["wide_narrow"], methods=["kd"], seeds=[0])
    started: list[Remote] = []
    told: list[str] = []

    def process(code: int) -> Remote:
        ends = [lambda: Remote(0, lose), lambda: Remote(75), lambda: Remote(0, lambda: write_run(runs[0]))]
        started.append(ends[len(started)]())
        return started[-1]

    assert len(work(runs, process=process, told=told).complete) == 1
    assert told == [
        "kd wide_narrow seed 0: its node is gone, so it is resumed",
        "kd wide_narrow seed 0: its process was told to stop, as where a machine is taken away, so it is resumed",
        "complete: kd wide_narrow seed 0",
    ]


def test_a_run_that_loses_every_worker_fails(planned: Callable[..., list[Run]], work: Work) -> None:
    runs = planned(pairs=["wide_narrow"], methods=["kd"], seeds=[0])
    begun: list[str] = []
    outcome = work(runs, process=lambda code: Remote(0, lose), begun=begun)
    assert len(begun) == table_runs.LOSSES
    assert outcome.failures() == ["kd wide_narrow seed 0: its node is gone"]


def test_what_another_machine_has_written_may_be_seen_later(
    planned: Callable[..., list[Run]], work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = planned(pairs=["wide_narrow"], methods=["kd"], seeds=[0])
    late: list[Callable[[], None]] = [lambda: None, lambda: None, lambda: write_run(runs[0])]
    assert len(work(runs, process=lambda code: Remote(0, *late)).complete) == 1
    runs = planned(pairs=["wide_narrow"], methods=["kd"], seeds=[1])
    monkeypatch.setattr(table_runs, "SETTLE", 0)
    outcome = work(runs, process=lambda code: Remote(0))
    assert outcome.failures() == ["kd wide_narrow seed 1: exit code 0, nothing printed"]


def test_what_waits_for_room_is_not_running(planned: Callable[..., list[Run]]) -> None:
    (run,) = planned(pairs=["wide_narrow"], methods=["kd"], seeds=[0])

    class Waiting(Remote):
        def has_begun(self) -> bool:
            return False

    assert table_runs._Job(run, Remote(0), Path("log")).has_begun
    assert not table_runs._Job(run, Waiting(0), Path("log")).has_begun
    assert table_runs._Job(run, Trained(0), Path("log")).has_begun


def test_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_runs.os, "sched_getaffinity", lambda process: range(12), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [table_runs._environment(jobs)["OMP_NUM_THREADS"] for jobs in (1, 3, 50)] == ["12", "4", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert table_runs._environment(1)["OMP_NUM_THREADS"] == "2"


# ---- the command ---------------------------------------------------------------------------------------------------


def test_a_plan_is_printed_and_nothing_is_written(
    file: Path, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mdistill.cli.common.project_root", lambda: configs.parent)
    flags = ["--output", str(tmp_path / "runs"), "--checkpoint-root", str(tmp_path / "nowhere")]
    assert table_cli.main(["run", str(file), "--dry-run", "--seeds", "0", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"alone wide_narrow seed 0: 40 epochs to do  {tmp_path}/runs/tiny/vanilla/tiny_net/seed0"
    assert lines[-2] == "left out: alone wide_deep: there is no need"
    assert lines[-1] == "7 runs, 0 complete, 6 cannot be trained; 40 epochs to do, of pairs that nobody has timed"
    assert not (tmp_path / "runs").exists()


def test_how_far_a_table_is_told_in_lines_where_there_is_no_terminal(
    file: Path, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end it is worked out for ``show``, with the modules that the command names."""

    def trained(runs: Sequence[Run], *_: Any, report: Callable[..., None], **__: Any) -> Outcome:
        write_run(runs[0])
        write_run(runs[1], epochs=10)
        outcome = Outcome([runs[0]])
        report(runs[1:2], outcome)
        outcome.failed["mine"] = (runs[-1], "why")
        report(runs[1:2], outcome)
        return Outcome([*runs])

    layouts: list[Any] = []
    monkeypatch.setattr(table_cli, "LOOK", 0.0)
    monkeypatch.setattr(table_cli, "EVERY", 0.0)
    monkeypatch.setattr("mdistill.cli.common.project_root", lambda: configs.parent)
    monkeypatch.setattr(table_runs, "train", trained)
    monkeypatch.setattr("mdistill.reporting.table_cells.layout", lambda *_, **given: layouts.append(given))
    part = ["--pairs", "wide_narrow", "--methods", "alone,kd", "--seeds", "0", "--import", "string"]
    assert table_cli.main(["run", str(file), *part, "--output", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "50 of 80 epochs, 1 of 2 complete, 1 running",
        "50 of 80 epochs, 1 of 2 complete, 1 running, 1 failed",
        "2 of 2 runs are complete",
    ]
    assert layouts == [{"overrides": [], "imports": ["string"], "epochs": None}]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["run", "mcld_tabel2"],
            "error: unknown table 'mcld_tabel2'; did you mean 'mcld_table2'? (known: cifar100_cpu, mcld_table1",
        ),
        (["run", "mcld_table2", "--methods", "MCLDD"], "error: --methods: unknown 'MCLDD'; did you mean 'MCLD'? (in"),
        (["run", "mcld_table2", "--pairs", "res56"], "error: --pairs: unknown 'res56'; did you mean 'res56_res20'? (i"),
        (["run", "mcld_table2", "--seeds", "0,x"], "error: argument --seeds: 'x' in '0,x' is not a seed; write whole"),
        (["run", "mcld_table2", "--jobs", "0"], "error: argument --jobs: should be a number from 1, found '0' (see --"),
        (["run", "mcld_table2", "--methods", "KD,"], "error: argument --methods: found 'KD,'; write names, such as kd"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = table_cli.main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(line)
