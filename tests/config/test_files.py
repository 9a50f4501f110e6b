"""From files, bases and overrides to a configuration: what is merged, what is told, and what names the run folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mdistill import config, settings
from mdistill.config import files
from mdistill.errors import UserError

from ..distillers.examples import SETTINGS


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    return str(caught.value).splitlines()


def test_base_is_merged_key_by_key(student_cfg: Path) -> None:
    student_cfg.write_text(student_cfg.read_text() + "solver: {lr: 0.01}\n")
    loaded = config.load(student_cfg)
    assert loaded.solver.lr == 0.01
    assert loaded.solver.epochs == 3
    assert loaded.student.name == "tiny_net"


def test_resolved_yaml_holds_every_default_and_reads_back_unchanged(student_cfg: Path, tmp_path: Path) -> None:
    loaded = config.load(student_cfg, ["student.width=8"], seed=3)
    assert loaded.student.arguments == {"width": 8}
    shared = {"ce_weight": 1.0, "warmup_epochs": 0, "standardize_logits": False}
    assert shared.items() <= loaded.distiller.arguments.items()
    again = tmp_path / "resolved.yaml"
    again.write_text(loaded.to_yaml())
    assert config.load(again) == loaded


def test_numeric_text_becomes_a_number(student_cfg: Path) -> None:
    loaded = config.load(student_cfg, ["solver.lr=5e-4", 'solver.gamma="1e-1"'])
    assert (loaded.solver.lr, loaded.solver.gamma) == (5e-4, 0.1)
    assert loaded.solver.arguments["weight_decay"] == 5e-4


def test_alias_becomes_the_canonical_name(student_cfg: Path) -> None:
    student_cfg.write_text(student_cfg.read_text().replace("tiny_net", "ShuffleV2"))
    assert config.load(student_cfg).student.name == "shufflenet_v2"


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        ([], "tiny/kd/tiny_net_tiny_net/seed0"),
        (["distiller.temperature=4"], "tiny/kd/tiny_net_tiny_net/seed0"),
        (
            ["distiller.temperature=2.0", "distiller.kd_weight=1"],
            "tiny/kd/tiny_net_tiny_net/kd_weight=1,temperature=2/seed0",
        ),
        (["student.width=8", "teacher.width=64"], "tiny/kd/tiny_net_tiny_net/student.width=8,teacher.width=64/seed0"),
        (["student.name=resnet8", "teacher=null"], "tiny/kd/resnet8/name=resnet8,teacher=null/seed0"),
        (["data.eval_batch_size=7", "distiller.ce_weight=1"], "tiny/kd/tiny_net_tiny_net/ce_weight=1/seed0"),
        (["solver.milestones=[1,2]", "solver.epochs=9"], "tiny/kd/tiny_net_tiny_net/milestones=1+2/seed0"),
        (
            ["data.mixing={name: mixup, alpha: 1.0}"],
            "tiny/kd/tiny_net_tiny_net/mixing=name=mixup+alpha=1/seed0",
        ),
    ],
)
def test_run_folder_names_what_overrides_change(kd_cfg: Path, overrides: list[str], folder: str) -> None:
    assert config.load(kd_cfg, overrides).run_folder() == Path(folder)


@pytest.mark.parametrize(
    "override",
    [
        "teacher.checkpoint=runs/a/b",
        "teacher.expected_top1=null",
        "run.engine=eager",
        "run.evaluate_every=2",
        "data.eval_batch_size=7",
        "seed=3",
        "imports=[json]",
    ],
)
def test_what_changes_no_result_names_no_folder(kd_cfg: Path, override: str) -> None:
    assert config.load(kd_cfg, [override]).variant == ""


def test_a_grid_never_shares_a_folder(kd_cfg: Path) -> None:
    grid = [[f"distiller.temperature={t}"] for t in (2, 2.5, 3)]
    member = "{{name: tiny_net, width: {}, checkpoint: a.pt}}"
    long = [[f"teacher.ensemble=[{','.join([*10 * [member.format(8)], member.format(last)])}]"] for last in (1, 2)]
    folders = {config.load(kd_cfg, overrides).run_folder() for overrides in [*grid, *long]}
    assert any("~" in folder.parts[-2] for folder in folders)
    assert len(folders) == 5
    assert all(len(part.encode()) <= 255 for folder in folders for part in folder.parts)


def test_the_folder_follows_the_final_values(kd_cfg: Path) -> None:
    """Back to the file's value is no change; null where the file has nothing is one."""
    overrides = ["distiller.temperature=2", "distiller.temperature=4.0"]
    assert config.load(kd_cfg, overrides).variant == ""
    assert config.load(kd_cfg, ["data.mixing=null"]).variant == "mixing=null"
    kd_cfg.write_text(kd_cfg.read_text() + "variant: mine\n")
    assert config.load(kd_cfg, ["distiller.temperature=2"]).variant == "mine,temperature=2"


def test_a_section_given_whole_is_blamed_on_the_command_line(kd_cfg: Path) -> None:
    lines = problems(kd_cfg, "distiller={name: kd, ce_weight: -1, kd_weight: 1, temperature: 2}")
    assert lines == ["command line: distiller.ce_weight: should be greater than or equal to 0, found -1"]


def test_an_empty_section_changes_nothing(student_cfg: Path) -> None:
    student_cfg.write_text(student_cfg.read_text() + "solver: {}\n")
    assert config.load(student_cfg).solver.epochs == 3


def test_seed_flag_wins_and_is_kept(kd_cfg: Path) -> None:
    loaded = config.load(kd_cfg, seed=7)
    assert loaded.run_folder().name == "seed7"
    assert yaml.safe_load(loaded.to_yaml())["seed"] == 7


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("solver.epohcs=3", r"command line: solver.epohcs: unknown key \(value 3\).*did you mean 'epochs'"),
        (
            "distiller.temprature=2",
            r"distiller.temprature: unknown key .*did you mean 'temperature'\?.*allowed: .*ce_weight",
        ),
        ("dsitiller.beta=2", r"dsitiller: unknown key.*did you mean 'distiller'"),
        ("temperature=2", r"unknown key 'temperature'; did you mean distiller.temperature\?"),
        ("solver.lr=nan", r"command line: solver.lr: .*found nan"),
        ("solver.lr=-1", r"solver.lr: should be greater than 0, found -1"),
        ("solver.lr=fast", r"solver.lr: should be a valid number, found 'fast'"),
        ("solver.epochs=-5", r"solver.epochs: should be greater than 0, found -5"),
        ("solver.epochs=2.5", r"solver.epochs: should be a valid integer, found 2.5"),
        ("solver.nesterov=1", r"solver.nesterov: should be a valid boolean, found 1"),
        ("solver.milestones=[2,1]", r"solver.milestones: should be epochs from 1 in rising order, found \[2, 1\]"),
        ("solver.milestones=3", r"solver.milestones: should be a valid tuple, found 3"),
        ("data.batch_size=0", r"command line: data.batch_size: should be greater than 0, found 0"),
        ("data.batch_size=true", r"data.batch_size: should be a valid integer, found True"),
        ("data.holdout=-1", r"data.holdout: should be greater than or equal to 0, found -1"),
        ("run.precision=fp8", r"run.precision: should be 'fp32', 'tf32' or 'bf16', found 'fp8'"),
        ("run.precission=fp32", r"run.precission: unknown key .*did you mean 'precision'"),
        (
            "student.name=resnet8x5",
            r"student.name: unknown model 'resnet8x5'; did you mean 'resnet8x4'\? \(known: .*wrn_40_2",
        ),
        ("distiller.name=kdd", r"distiller.name: unknown method 'kdd'; did you mean 'dkd|kd'"),
        ("data.name=cifar10", r"data.name: unknown data set 'cifar10'; did you mean 'cifar100'"),
        (
            "solver.name=adam",
            r"solver.name: unknown solver 'adam'; did you mean 'adamw'\? \(known: adamw, aligned_sgd, dot, sgd",
        ),
        ("student=7", r"student: should be a section of `key: value` lines, found 7"),
        ("student.name.x=7", r"student.name.x: student.name is not a section, it holds 'tiny_net'"),
        ("distiller.temperature", r"'distiller.temperature' is not an override; write key=value"),
        ("solver.lr=[1", r"not a YAML value: line 1"),
        ("variant=../up", r"variant: should be usable as the name of one folder, found '../up'"),
        ("seed=9223372036854775808", r"'seed=9223372036854775808': not a YAML value: a whole number beyond 64 bits"),
        ("solver.lr={{4}}", r"'solver.lr=\{\{4\}\}': not a YAML value: line 1, column 2: a key should be a word"),
        ("variant=2024-13-45", r"not a YAML value: month must be in 1..12"),
        ("seed=-1", r"seed: should be greater than or equal to 0, found -1"),
        ("teacher.expected_top1=101", r"teacher.expected_top1: should be less than or equal to 100, found 101"),
    ],
)
def test_bad_values_are_one_clear_line(kd_cfg: Path, override: str, pattern: str) -> None:
    lines = problems(kd_cfg, override)
    assert len(lines) == 1, lines
    assert re.search(pattern, lines[0]), lines[0]


LAUGHS = "a: &a [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1 or ''}, *a{n - 1 or ''}]\n" for n in range(1, 60))

ABSURD = {
    "a billion laughs": (LAUGHS, "aliases (*name) are not read"),
    "deep nesting": (f"seed: {'[' * 50}{']' * 50}", "nested deeper than 16 levels"),
    "very deep nesting": (f"seed: {'[' * 20_000}{']' * 20_000}", "RecursionError: "),
    "a huge whole number": (f"seed: {'9' * 4000}", "a whole number beyond 64 bits"),
    "a huge number in base 16": (f"seed: 0x{'f' * 20_000}", "a whole number beyond 64 bits"),
    "a number in base 60": (f"seed: 1{':59' * 3000}.5", "OverflowError: "),
    "a number beyond floats": ("seed: 1e999", "1e999 is beyond what a number can be"),
    "a bad tag": ("seed: !!bool x", "KeyError: 'x'"),
    "a surrogate": ('variant: "\\ud800"', r"holds a character that no file can hold"),
    "a null character": ('variant: "a\\0b"', r"holds a character that no file can hold"),
    "a key that is a surrogate": ('"\\ud800": 1', r"holds a character that no file can hold"),
    "too much of it": ("#" * 300_000, "longer than 262,144 characters"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ABSURD)
def test_absurd_yaml_is_one_short_line(name: str, tmp_path: Path, kd_cfg: Path) -> None:
    text, expected = ABSURD[name]
    path = tmp_path / "x.yaml"
    path.write_text(text)
    (line,) = problems(path)
    assert expected in line
    assert len(line) < 500
    (line,) = problems(
        kd_cfg, f"data={{{text}}}" if name == "a billion laughs" else f"variant={text.partition(': ')[2]}"
    )
    assert len(line) < 500


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("a" + ".b" * 1200 + "=1", r"a key of 1201 parts; no section is nested deeper than 16"),
        ("x" * 100_000, r"\.\.\. is not an override"),
        ("distiller.temperature=1e308", r"temperature: should be less than or equal to 1000000000, found 1e\+308"),
        ("data.batch_size=2147483648", r"batch_size: should be less than 2147483648"),
    ],
)
def test_absurd_overrides_are_one_short_line(override: str, pattern: str, kd_cfg: Path) -> None:
    (line,) = problems(kd_cfg, override)
    assert re.search(pattern, line), line
    assert len(line) < 500


def test_every_problem_is_reported_at_once_with_its_file(kd_cfg: Path, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("epochs: 3", "epochs: three"))
    kd_cfg.write_text(kd_cfg.read_text().replace("temperature: 4.0", "temp: 4.0"))
    lines = problems(kd_cfg, "data.batch_size=0")
    assert len(lines) == 4
    text = "\n".join(lines)
    assert f"{recipe}: solver.epochs: should be a valid integer, found 'three'" in text
    assert f"{kd_cfg}: distiller.temp: unknown key" in text
    assert f"{kd_cfg}: distiller.temperature: missing; method 'kd' needs it" in text
    assert "command line: data.batch_size: should be greater than 0, found 0" in text


def test_missing_section_and_key(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("student: {name: resnet8}\ndistiller: {name: vanilla, ce_weight: 1}\nsolver: {name: sgd}\n")
    lines = problems(path)
    assert f"{path}: data: missing" in lines
    assert f"{path}: solver.epochs: missing" in lines
    assert f"{path}: solver.momentum: missing; solver 'sgd' needs it" in lines


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("a: [1", r"x.yaml: not valid YAML: line 1"),
        ("- a\n- b\n", r"x.yaml: should hold `key: value` lines, found list"),
        ("", r"x.yaml: should hold `key: value` lines, found NoneType"),
        ("seed: 1\nseed: 2\n", r"x.yaml: not valid YAML: line 2, column 1: key 'seed' is given twice"),
        ("seed: &a [*a]\n", r"x.yaml: not valid YAML: "),
        (
            "student:\n  <<: {name: tiny}\n",
            r"not valid YAML: line 2, column 3: merge keys \(<<\) are not read",
        ),
        ("base: nowhere.yaml\n", r"x.yaml: base: no such file .*nowhere.yaml"),
        ("base: 7\n", r"x.yaml: base: should be a path or a list of paths relative to this file, found 7"),
        ("base: [a, 7]\n", r"base: should be a path or a list of paths relative to this file, found \['a', 7\]"),
        ("base: x.yaml\n", r"x.yaml: base: .*x.yaml is based on this file in turn"),
        ("a: !!python/object/apply:os.system ['true']\n", r"x.yaml: not valid YAML: line 1"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, pattern: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    lines = problems(path)
    assert len(lines) == 1
    assert re.search(pattern, lines[0]), lines[0]


class TestBases:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[..., Path]:
        def write(name: str, *lines: str) -> Path:
            path = tmp_path / f"{name}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
            return path

        return write

    @pytest.fixture
    def pair(self, recipe: Path, write: Callable[..., Path]) -> Path:
        teacher = "teacher: {name: tiny_net, width: 32, checkpoint: teacher.pt}"
        return write("pair", f"base: {recipe.name}", teacher, "student: {name: tiny_net}", "solver: {lr: 0.01}")

    def test_are_merged_in_order_and_the_file_s_own_keys_win(self, pair: Path, write: Callable[..., Path]) -> None:
        write("method", "distiller: {name: kd, ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}", "solver: {gamma: 1}")
        write("later", "distiller: {kd_weight: 0.5, temperature: 3.0}", "variant: later")
        path = write("own", "base: [pair.yaml, method.yaml, later.yaml]", "distiller: {temperature: 2.0}")
        loaded = config.load(path)
        assert (loaded.solver.epochs, loaded.solver.lr, loaded.solver.gamma) == (3, 0.01, 1.0)
        expected = {"ce_weight": 0.1, "kd_weight": 0.5, "temperature": 2.0}
        assert expected.items() <= loaded.distiller.arguments.items()
        assert loaded.run_folder() == Path("tiny/kd/tiny_net_tiny_net/later/seed0")

    def test_of_a_base_come_before_it(self, pair: Path, write: Callable[..., Path]) -> None:
        write("first", "distiller: {name: kd, ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}")
        write("second", "base: first.yaml", "distiller: {temperature: 3.0}")
        loaded = config.load(write("own", "base: [second.yaml, pair.yaml, first.yaml]"))
        assert loaded.distiller.arguments["temperature"] == 4.0, "first.yaml comes again, last"

    def test_are_relative_to_the_file_that_names_them(self, kd_cfg: Path, write: Callable[..., Path]) -> None:
        write("below/middle", f"base: ../{kd_cfg.name}")
        assert config.load(write("own", "base: below/middle.yaml")) == config.load(kd_cfg)

    def test_each_key_is_blamed_on_its_file(self, recipe: Path, pair: Path, write: Callable[..., Path]) -> None:
        method = write(
            "method", "distiller: {name: kd, ce_weight: -1, kd_weight: 0.9, temp: 4.0}", "solver: {gamma: x}"
        )
        own = write("own", "base: [pair.yaml, method.yaml]", "student: {widht: 3}")
        pair.write_text(pair.read_text().replace("lr: 0.01", "lr: 0"))
        lines = problems(own, "solver.epochs=0")
        assert {tuple(line.split(": ")[:2]) for line in lines} == {
            (str(own), "student.widht"),
            (str(own), "distiller.temperature"),
            (str(method), "distiller.temp"),
            (str(method), "distiller.ce_weight"),
            (str(method), "solver.gamma"),
            (str(pair), "solver.lr"),
            ("command line", "solver.epochs"),
        }
        assert len(lines) == 7

    def test_that_lead_back_are_refused(self, write: Callable[..., Path]) -> None:
        path, other = write("one", "base: two.yaml"), write("two", "base: one.yaml")
        assert problems(path) == [f"{other}: base: {path} is based on this file in turn"]

    def test_may_be_16_files_deep(self, kd_cfg: Path, write: Callable[..., Path]) -> None:
        below = kd_cfg  # on the recipe: two files
        for number in range(14):
            below = write(str(number), f"base: {below.name}")
        assert config.load(below) == config.load(kd_cfg)
        top = write("top", f"base: {below.name}")
        assert problems(top) == [
            f"{kd_cfg}: base: more than 16 files are based on each other, from {top} on",
        ]

    def test_a_missing_one_is_told_with_its_nearest(self, pair: Path, write: Callable[..., Path]) -> None:
        path = write("own", "base: [pair.yaml, recip.yaml]")
        assert problems(path) == [
            f"{path}: base: no such file {path.with_name('recip.yaml')}; did you mean 'recipe.yaml'?"
        ]

    def test_a_section_may_be_taken_back(self, kd_cfg: Path, write: Callable[..., Path]) -> None:
        path = write("own", f"base: {kd_cfg.name}", "teacher: null", "distiller: {name: vanilla}")
        assert config.load(path).teacher is None


class TestANewName:
    """Where a file names another component than its base."""

    @pytest.fixture
    def own(self, kd_cfg: Path) -> Callable[..., Path]:
        def own(*lines: str) -> Path:
            path = kd_cfg.with_name("own.yaml")
            path.write_text("\n".join([f"base: {kd_cfg.name}", *lines]) + "\n")
            return path

        return own

    def test_drops_what_was_written_for_the_old_one_and_does_not_apply(self, own: Callable[..., Path]) -> None:
        arguments = config.load(own("distiller: {name: rc, rc_weight: 0.1}")).distiller.arguments
        assert {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0, "rc_weight": 0.1}.items() <= arguments.items()
        arguments = config.load(own("distiller: {name: dkd, alpha: 1, beta: 2}")).distiller.arguments
        assert {"ce_weight": 0.1, "temperature": 4.0, "alpha": 1.0, "beta": 2.0}.items() <= arguments.items()
        assert "kd_weight" not in arguments

    def test_keeps_what_is_written_for_the_new_one(self, own: Callable[..., Path]) -> None:
        (line,) = problems(own("distiller: {name: dkd, alpha: 1, beta: 2, kd_weight: 1}"))
        assert "own.yaml: distiller.kd_weight: unknown key (value 1) for method 'dkd'" in line

    def test_keeps_what_neither_knows(self, kd_cfg: Path, own: Callable[..., Path]) -> None:
        kd_cfg.write_text(kd_cfg.read_text().replace("kd_weight", "kdweight"))
        (line,) = problems(own("distiller: {name: dkd, alpha: 1, beta: 2}"))
        assert line.startswith(f"{kd_cfg}: distiller.kdweight: unknown key (value 0.9) for method 'dkd'")

    def test_of_a_teacher_drops_the_old_one_s_weights(self, kd_cfg: Path, own: Callable[..., Path]) -> None:
        kd_cfg.write_text(kd_cfg.read_text().replace("teacher.pt", "teacher.pt, expected_top1: 50"))
        path = own("teacher: {name: resnet8}")
        assert problems(path) == [f"{path}: teacher.checkpoint: missing"]
        teacher = config.load(own("teacher: {name: resnet8, checkpoint: other.pt}")).teacher
        assert teacher is not None
        assert (teacher.arguments, teacher.expected_top1) == ({}, None)

    def test_that_is_an_alias_is_no_new_name(self, kd_cfg: Path, own: Callable[..., Path]) -> None:
        kd_cfg.write_text(kd_cfg.read_text().replace("{name: tiny_net}", "{name: ShuffleV2, width: 3}"))
        (line,) = problems(own("student: {name: shufflenet_v2}"))
        assert "student.width: unknown key (value 3) for model 'shufflenet_v2'" in line

    def test_on_the_command_line_drops_nothing(self, kd_cfg: Path) -> None:
        (line,) = problems(kd_cfg, "distiller.name=dkd", "distiller.alpha=1", "distiller.beta=2")
        assert line.startswith(f"{kd_cfg}: distiller.kd_weight: unknown key (value 0.9) for method 'dkd'")


class TestPair:
    @pytest.fixture
    def method(self, tmp_path: Path, recipe: Path) -> Path:
        """The folder of a method with settings of one of two pairs."""
        folder, pairs = tmp_path / "dkd", tmp_path / "_pairs"
        folder.mkdir()
        pairs.mkdir()
        for width in (8, 12):
            (pairs / f"tiny{width}_tiny.yaml").write_text(
                "base: ../recipe.yaml\nstudent: {name: tiny_net}\n"
                f"teacher: {{name: tiny_net, width: {width}, checkpoint: a.pt}}\n"
            )
        (folder / "_method.yaml").write_text("distiller: {name: dkd, ce_weight: 1, alpha: 1, temperature: 4}\n")
        (folder / "tiny8_tiny.yaml").write_text(
            "base: [../_pairs/tiny8_tiny.yaml, _method.yaml]\ndistiller: {beta: 6}\n"
        )
        return folder

    @pytest.mark.parametrize("given", [".", "tiny8_tiny.yaml", "_method.yaml"])
    def test_takes_the_method_s_file_if_there_is_one(self, method: Path, given: str) -> None:
        files, note = config.for_pair(method / given, "tiny8_tiny")
        assert note == f"pair tiny8_tiny: {method / 'tiny8_tiny.yaml'}"
        assert config.load(files) == config.load(method / "tiny8_tiny.yaml")

    def test_else_takes_the_pair_and_the_method_without_settings_of_a_pair(self, method: Path) -> None:
        files, note = config.for_pair(method, "tiny12_tiny")
        assert files == [method.parent / "_pairs" / "tiny12_tiny.yaml", method / "_method.yaml"]
        assert note == (
            f"pair tiny12_tiny: {method} has no file for it, so {files[0]} and {files[1]};"
            " settings published for other pairs are left out"
        )
        with pytest.raises(UserError) as caught:
            config.load(files)
        assert str(caught.value) == f"{method / '_method.yaml'}: distiller.beta: missing; method 'dkd' needs it"
        loaded = config.load(files, ["distiller.beta=2"])
        assert loaded.teacher is not None
        assert loaded.teacher.arguments == {"width": 12}
        assert loaded.run_folder() == Path("tiny/dkd/tiny_net_tiny_net/beta=2/seed0")

    def test_an_unknown_one_is_told_with_the_nearest_and_all(self, method: Path) -> None:
        with pytest.raises(UserError) as caught:
            config.for_pair(method / "tiny8_tiny.yaml", "tiny9_tiny")
        assert str(caught.value) == (
            f"--pair: unknown pair 'tiny9_tiny' in {method}; did you mean 'tiny8_tiny'?"
            " (known: tiny12_tiny, tiny8_tiny)"
        )

    def test_needs_a_folder_that_is_there(self, method: Path) -> None:
        with pytest.raises(UserError, match=r"^no such configuration file or folder: .*dkdd$"):
            config.for_pair(method.with_name("dkdd"), "tiny8_tiny")

    def test_a_folder_alone_is_no_configuration(self, method: Path) -> None:
        assert problems(method) == [f"{method} is a folder: name a file in it, or one of its pairs with --pair"]


class TestSettingsOfEarlierVersions:
    @pytest.fixture(autouse=True)
    def retired(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            settings, "RETIRED", {"*.old_decay": (None, "write solver.decay"), "kd.old_target": ("t", "no")}
        )
        monkeypatch.setattr(settings, "RENAMED", {"kd.old_weight": "kd_weight"})

    def test_are_left_out_where_they_do_nothing(self, kd_cfg: Path) -> None:
        before = config.load(kd_cfg)
        kd_cfg.write_text(kd_cfg.read_text().replace("4.0}", "4.0, old_decay: null, old_target: t}"))
        assert config.load(kd_cfg) == before

    def test_else_say_what_to_write_now(self, kd_cfg: Path) -> None:
        kd_cfg.write_text(kd_cfg.read_text().replace("4.0}", "4.0, old_decay: 0.9}"))
        assert problems(kd_cfg, "distiller.old_target=x") == [
            f"{kd_cfg}: distiller.old_decay: 0.9 is no setting of 'kd' any more; write solver.decay",
            "command line: distiller.old_target: 'x' is no setting of 'kd' any more; no",
        ]

    def test_go_by_their_new_names(self, kd_cfg: Path) -> None:
        before = config.load(kd_cfg)
        kd_cfg.write_text(kd_cfg.read_text().replace(" kd_weight", " old_weight"))
        assert config.load(kd_cfg) == before

    def test_of_a_record_are_no_changes(self, kd_cfg: Path) -> None:
        now = config.load(kd_cfg)
        recorded = now.resolved()
        recorded["distiller"]["old_weight"] = recorded["distiller"].pop("kd_weight")
        recorded["distiller"]["old_target"] = "t"
        assert config.changes(recorded, now) == {}
        recorded["distiller"]["old_target"] = "else"
        assert config.changes(recorded, now).keys() >= {"distiller.old_target"}

    def test_of_other_methods_are_unknown(self, kd_cfg: Path) -> None:
        text = "distiller: {name: vanilla, ce_weight: 1, old_target: t, old_weight: 1}\nteacher: null\n"
        path = kd_cfg.with_name("own.yaml")
        path.write_text(f"base: recipe.yaml\nstudent: {{name: tiny_net}}\n{text}")
        assert [line.split(" (")[0] for line in problems(path)] == [
            f"{path}: distiller.old_target: unknown key",
            f"{path}: distiller.old_weight: unknown key",
        ]

    def test_that_a_method_takes_are_its_own(self, kd_cfg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(settings, "RETIRED", {"*.temperature": (None, "no")})
        assert config.load(kd_cfg).distiller.arguments["temperature"] == 4.0


@pytest.mark.parametrize("setting", files.CHANGED)
def test_runs_of_earlier_versions_whose_method_was_another_one_are_told_so(kd_cfg: Path, setting: str) -> None:
    method, key = setting.split(".")
    given = {"name": method, **SETTINGS[method]}
    config.load(kd_cfg, [f"distiller={json.dumps(given)}"])
    del given[key]
    assert problems(kd_cfg, f"distiller={json.dumps(given)}") == [
        f"command line: distiller.{key}: missing; method {method!r} needs it; of earlier versions, where {method!r} had"
        f" none and {files.CHANGED[setting]}, a run is evaluated and resumed by the version that began it (env.json"
        " names its commit)"
    ]


def test_a_run_of_dhkd_before_its_alignment_was_a_solver_s_is_read(kd_cfg: Path) -> None:
    settings = {"name": "dhkd", "ce_weight": 1.0, "kd_weight": 1.0, "temperature": 2.0}
    read = config.load(kd_cfg, [f"distiller={json.dumps({**settings, 'align': False})}"])
    assert read.distiller.arguments["head"] == "linear"
    assert problems(kd_cfg, f"distiller={json.dumps({**settings, 'align': True})}") == [
        "command line: distiller.align: True is no setting of 'dhkd' any more; its alignment, over all weights, is"
        " solver.name: aligned_sgd"
    ]


def test_missing_file_suggests_a_sibling(kd_cfg: Path) -> None:
    lines = problems(kd_cfg.with_name("kdd.yaml"))
    assert "no such configuration file" in lines[0]
    assert "did you mean" in lines[0]
    assert "kd.yaml" in lines[0]


def test_imports_load_user_code_first(tmp_path: Path, student_cfg: Path) -> None:
    (tmp_path / "user_net_for_config.py").write_text(
        "from torch import nn\nfrom mdistill.models import MODELS\n"
        "@MODELS.register('user_net')\ndef user_net(num_classes):\n    return nn.Linear(3, num_classes)\n"
    )
    student_cfg.write_text("imports: [user_net_for_config]\n" + student_cfg.read_text().replace("tiny_net", "user_net"))
    assert config.load(student_cfg).student.name == "user_net"


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        (None, r"imports: no module 'user_module_4' in "),
        ("import not_installed_anywhere\n", r"was found but needs 'not_installed_anywhere', which is missing"),
        ("1 / 0\n", r"failed to load: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)\n", r"failed to load: SystemExit: 3"),
    ],
)
def test_imports_that_fail(
    tmp_path: Path, student_cfg: Path, source: str | None, pattern: str, request: pytest.FixtureRequest
) -> None:
    name = f"user_module_{len(str(source))}"
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(UserError, match=pattern):
        config.load(student_cfg, imports=[name])


@pytest.mark.parametrize("name", ["my_code.py", "./my_code.py"])
def test_an_import_names_a_module_not_a_file(student_cfg: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"is a file; name the module, 'my_code'"):
        config.load(student_cfg, imports=[name])


def test_differences_names_keys_and_values(kd_cfg: Path) -> None:
    old, new = (
        config.load(kd_cfg).resolved(),
        config.load(kd_cfg, ["distiller.temperature=2", "teacher=null"]).resolved(),
    )
    changed = config.differences(old, new)
    assert changed["distiller.temperature"] == (4.0, 2.0)
    assert "teacher.name" in changed
    assert config.differences(old, old) == {}


class TestSources:
    @staticmethod
    def tell(path: Path, settings: dict[str, dict[str, Any]], sources: dict[str, str]) -> None:
        """Add ``settings`` and ``sources`` to the file ``path``."""
        tree = yaml.safe_load(path.read_text())
        for section, values in settings.items():
            tree[section] = tree.get(section, {}) | values
        path.write_text(yaml.safe_dump(tree | {"sources": sources}))

    def test_are_merged_and_no_setting(self, student_cfg: Path, recipe: Path) -> None:
        plain = config.load(student_cfg)
        self.tell(recipe, {}, {"solver.lr": "certain: a table"})
        self.tell(student_cfg, {}, {"student": "inferred: its\n  text"})
        assert config.sources(student_cfg) == {"solver.lr": "certain: a table", "student.name": "inferred: its text"}
        assert config.load(student_cfg) == plain

    def test_a_line_for_a_section_speaks_for_the_keys_that_its_file_sets(self, student_cfg: Path, recipe: Path) -> None:
        before = {"solver": "certain: a", "solver.gamma": "inferred: b"}
        self.tell(recipe, {}, before)
        self.tell(student_cfg, {"solver": {"lr": 0.5, "epochs": 3}}, {"solver": "ours: c", "solver.epochs": "ours: d"})
        told = config.sources(student_cfg)
        assert (told["solver.lr"], told["solver.epochs"]) == ("ours: c", "ours: d")
        assert (told["solver.momentum"], told["solver.gamma"]) == ("certain: a", "inferred: b")

    def test_it_speaks_for_what_the_bases_set_where_its_file_sets_nothing(
        self, student_cfg: Path, recipe: Path
    ) -> None:
        self.tell(recipe, {}, {"solver": "certain: a", "data": "certain: a"})
        self.tell(student_cfg, {}, {"solver": "inferred: those of another pair", "data.batch_size": "ours: b"})
        told = config.sources(student_cfg)
        assert {text for key, text in told.items() if key.startswith("solver.")} == {"inferred: those of another pair"}
        assert (told["data.batch_size"], told["data.name"]) == ("ours: b", "certain: a")

    def test_a_key_that_a_later_file_sets_without_a_line_has_none(self, student_cfg: Path, recipe: Path) -> None:
        self.tell(recipe, {}, {"solver": "certain: a"})
        self.tell(student_cfg, {"solver": {"lr": 0.5}}, {})
        told = config.sources(student_cfg)
        assert "solver.lr" not in told
        assert told["solver.gamma"] == "certain: a"

    @pytest.mark.parametrize(
        ("text", "pattern"),
        [
            ("sources: paper", r"sources: should hold `key: where it comes from` lines, found 'paper'"),
            ("sources: {distiler.beta: 'ours: x'}", r"sources\.distiler\.beta: no section 'distiler'.*'distiller'"),
            ("sources: {solver: a paper}", r"sources\.solver: should begin with one of certain: .*found 'a paper'"),
            ("sources: {solver: [1]}", r"sources\.solver: should begin with one of certain: .*found \[1\]"),
        ],
    )
    def test_that_tell_nothing_are_one_clear_line(self, student_cfg: Path, text: str, pattern: str) -> None:
        student_cfg.write_text(f"{student_cfg.read_text()}{text}\n")
        (line,) = problems(student_cfg)
        assert re.search(pattern, line)
        assert line.startswith(str(student_cfg))
