import re
from pathlib import Path

import pytest
import yaml

from mdistill import config
from mdistill.errors import UserError


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
    shared = {"warmup_epochs": 0, "standardize_logits": False, "ema_decay": None, "average_from": None}
    assert loaded.distiller.arguments == {"ce_weight": 1.0, **shared}
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
        (["teacher.checkpoint=runs/a/b"], "tiny/kd/tiny_net_tiny_net/checkpoint=runs%2Fa%2Fb/seed0"),
        (["solver.milestones=[1,2]", "solver.epochs=9"], "tiny/kd/tiny_net_tiny_net/milestones=1+2/seed0"),
        (
            ["data.mixing={name: mixup, alpha: 1.0}"],
            "tiny/kd/tiny_net_tiny_net/mixing=name=mixup+alpha=1/seed0",
        ),
    ],
)
def test_run_folder_names_what_overrides_change(kd_cfg: Path, overrides: list[str], folder: str) -> None:
    assert config.load(kd_cfg, overrides).run_folder() == Path(folder)


def test_a_grid_never_shares_a_folder(kd_cfg: Path) -> None:
    grid = [f"distiller.temperature={t}" for t in (2, 2.5, 3)]
    long = [f"teacher.checkpoint={'x' * 300}{i}" for i in range(2)]
    folders = {config.load(kd_cfg, [word]).run_folder() for word in [*grid, *long]}
    assert len(folders) == 5
    assert all(len(part.encode()) <= 255 for folder in folders for part in folder.parts)


def test_the_folder_follows_the_final_values(kd_cfg: Path) -> None:
    """Back to the file's value is no change; null where the file has nothing is one."""
    words = ["distiller.temperature=2", "distiller.temperature=4.0"]
    assert config.load(kd_cfg, words).variant == ""
    assert config.load(kd_cfg, ["teacher.expected_top1=null"]).variant == "expected_top1=null"
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
        ("solver.name=adam", r"solver.name: unknown solver 'adam' \(known: dot, sgd"),
        ("student=7", r"student: should be a section of `key: value` lines, found 7"),
        ("student.name.x=7", r"student.name.x: student.name is not a section, it holds 'tiny_net'"),
        ("distiller.temperature", r"'distiller.temperature' is not an override; write key=value"),
        ("solver.lr=[1", r"not a YAML value: line 1"),
        ("variant=../up", r"variant: should be usable as the name of one folder, found '../up'"),
        ("seed=9223372036854775808", r"seed: should be less than 9223372036854775808, found 9223372036854775808"),
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
            "data: &d {name: tiny}\nstudent:\n  <<: *d\n",
            r"not valid YAML: line 3, column 3: merge keys \(<<\) are not read",
        ),
        ("base: nowhere.yaml\n", r"x.yaml: base: no such file .*nowhere.yaml"),
        ("base: [a, b]\n", r"base: should be a path relative to this file, found \['a', 'b'\]"),
        ("a: !!python/object/apply:os.system ['true']\n", r"x.yaml: not valid YAML: line 1"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, pattern: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    lines = problems(path)
    assert len(lines) == 1
    assert re.search(pattern, lines[0]), lines[0]


def test_a_base_of_a_base_is_refused(tmp_path: Path, student_cfg: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"base: {student_cfg.name}\n")
    assert "a base has no base of its own" in problems(path)[0]


def test_missing_file_suggests_a_sibling(kd_cfg: Path) -> None:
    lines = problems(kd_cfg.with_name("kdd.yaml"))
    assert "no such configuration file" in lines[0]
    assert "did you mean" in lines[0]
    assert "kd.yaml" in lines[0]


def test_milestones_past_the_end_warn(student_cfg: Path) -> None:
    assert config.load(student_cfg).warnings() == []
    (warning,) = config.load(student_cfg, ["solver.milestones=[1,3,9]"]).warnings()
    assert warning == "solver.milestones: [3, 9] lie at or past the last epoch (3) and have no effect"


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
