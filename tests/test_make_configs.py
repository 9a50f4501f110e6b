"""``tools/make_configs.py``: the configurations are what the data file says, and mistakes are told in one line."""

import shutil
from pathlib import Path

import pytest

from .conftest import load_tool

CIFAR100 = Path(__file__).resolve().parents[1] / "configs" / "cifar100"
FACTS = "_published.yaml"
main = load_tool("tools/make_configs").main

SMALL = """by_hand: [vanilla]
teachers: {resnet32x4: {checkpoint: teacher.pth, top1: 79.42}}
students: {resnet8x4: {top1: 72.50}, shufflenet_v2: {top1: 71.82, lr: 0.01}}
pairs: {different: [[resnet32x4, shufflenet_v2]], same: [[resnet32x4, resnet8x4]]}
sources: {paper: {different: "Table 1", same: "Table 2"}, other: a README}
folders:
  kd:
    method: kd
    published: [{source: paper, top1: [74.45, null]}, {source: other, mark: with a star, top1: {res32x4_shuv2: 70.0}}]
    distiller: {kd_weight: 0.9}
    solver: {name: sgd}
    files: {res32x4_res8x4: {distiller: {kd_weight: 1.0, temperature: 4.0}, solver: {lr: 0.025}, note: Another one.}}
  kd_long:
    method: kd
    alone: true
    distiller: {first: LONG, second: [1.0, null], third: true}
    data: {mixing: {name: mixup}}
    note: "One.\\nTwo."
""".replace("LONG", 75 * "a")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder that holds nothing but a short data file."""
    folder = tmp_path / "somewhere" / "some_data"
    folder.mkdir(parents=True)
    (folder / FACTS).write_text(SMALL)
    return folder


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed to standard error, line by line."""
    return capsys.readouterr().err.splitlines()


def test_the_repository_is_as_its_data_file_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--folder", str(CIFAR100)]) == 0, capsys.readouterr().err


def test_check_names_each_difference_and_a_run_mends_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = tmp_path / "cifar100"
    shutil.copytree(CIFAR100, root)
    changed, missing, extra = (root / "kd" / f"{name}.yaml" for name in ("vgg13_vgg8", "res56_res20", "mine"))
    before = {path: path.read_text() for path in (changed, missing)}
    changed.write_text(before[changed].replace("0.9", "0.8"))
    missing.unlink()
    extra.write_text(before[missing])
    (root / "vanilla" / "mine.yaml").write_text("by hand")
    assert main(["--check", "--folder", str(root)]) == 1
    assert errors(capsys) == [
        f"error: {extra}: unexpected, {FACTS} does not have it",
        f"error: {missing}: missing",
        f"error: {changed}: differs from what {FACTS} says",
    ]
    assert (missing.exists(), extra.exists()) == (False, True)
    assert main(["--folder", str(root)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [f"written: {missing}", f"written: {changed}"]
    assert printed.err == f"error: {extra}: unexpected, {FACTS} does not have it\n"
    assert {path: path.read_text() for path in (changed, missing)} == before
    assert extra.read_text() == before[missing]
    extra.unlink()
    assert (root / "vanilla" / "mine.yaml").exists()
    assert main(["--check", "--folder", str(root)]) == 0


def test_a_folder_that_the_data_file_does_not_know_is_told_and_kept(
    capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    mine = small / "mine" / "res32x4_res8x4.yaml"
    mine.parent.mkdir()
    mine.write_text("base: ../_recipe.yaml\n")
    for words in ([], ["--check"]):
        assert main([*words, "--folder", str(small)]) == 1
        assert errors(capsys) == [f"error: {mine}: its folder is neither in folders nor in by_hand of {FACTS}"]
    assert mine.exists()


def test_what_a_file_holds(small: Path) -> None:
    assert main(["--folder", str(small)]) == 0
    assert (small / "kd" / "res32x4_shuv2.yaml").read_text() == (
        "# python tools/train.py --cfg configs/some_data/kd/res32x4_shuv2.yaml\n"
        "# Published top-1: 74.45 (Table 1); 70.00 (a README, with a star). Teacher 79.42, student alone 71.82.\n"
        "base: ../_recipe.yaml\n"
        "teacher: {name: resnet32x4, checkpoint: teacher.pth, expected_top1: 79.42}\n"
        "student: {name: shufflenet_v2}\n"
        "distiller: {name: kd, kd_weight: 0.9}\n"
        "solver: {name: sgd, lr: 0.01}\n"
    )
    assert (small / "kd" / "res32x4_res8x4.yaml").read_text() == (
        "# python tools/train.py --cfg configs/some_data/kd/res32x4_res8x4.yaml\n"
        "# Top-1: teacher 79.42, student alone 72.50.\n"
        "# Another one.\n"
        "base: ../_recipe.yaml\n"
        "teacher: {name: resnet32x4, checkpoint: teacher.pth, expected_top1: 79.42}\n"
        "student: {name: resnet8x4}\n"
        "distiller: {name: kd, kd_weight: 1.0, temperature: 4.0}\n"
        "solver: {name: sgd, lr: 0.025}\n"
    )
    assert (small / "kd_long" / "resnet8x4.yaml").read_text() == (
        "# python tools/train.py --cfg configs/some_data/kd_long/resnet8x4.yaml\n"
        "# Top-1: student alone 72.50.\n"
        "# One.\n"
        "# Two.\n"
        "base: ../_recipe.yaml\n"
        "variant: long\n"
        "data: {mixing: {name: mixup}}\n"
        "student: {name: resnet8x4}\n"
        "distiller:\n"
        "  name: kd\n"
        f"  first: {75 * 'a'}\n"
        "  second: [1.0, null]\n"
        "  third: true\n"
    )


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("[[resnet32x4, resnet8x4]]", "[[resnet32x5, resnet8x4]]",
         "pairs.same: unknown teacher 'resnet32x5'; did you mean 'resnet32x4'?"),
        ("[[resnet32x4, resnet8x4]]", "[[resnet32x4, resnet8]]",
         "pairs.same: unknown student 'resnet8'; did you mean 'resnet8x4'?"),
        ("files: {res32x4_res8x4", "files: {res32x4_res8",
         "folders.kd.files: unknown file 'res32x4_res8'; did you mean 'res32x4_res8x4'?"),
        ("top1: {res32x4_shuv2", "top1: {vgg8", "folders.kd.published: unknown file 'vgg8'"),
        ("source: other", "source: others", "folders.kd.published: unknown source 'others'; did you mean 'other'?"),
        ("[74.45, null]", "[74.45]", "folders.kd.published: 1 values of 'paper', should be 2"),
        ("  kd_long:", "  kdlong:", "folders.kdlong: should be called kd or kd_<variant>"),
        ("alone: true", "alone: 7", "folders.kd_long.alone: "),
        ("lr: 0.01", "rate: 0.01", "students.shufflenet_v2.rate: Extra inputs are not permitted, found 0.01"),
        ("by_hand: [vanilla]", "by_hand: [vanilla", "cannot be read as a YAML file: "),
    ],
)  # fmt: skip
def test_a_mistake_in_the_data_file_is_one_line(
    old: str, new: str, line: str, capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    assert SMALL.count(old) == 1
    (small / FACTS).write_text(SMALL.replace(old, new))
    code = main(["--folder", str(small)])
    found = errors(capsys)
    assert code == 2
    assert len(found) == 1
    assert found[0].startswith(f"error: {small / FACTS}: {line}")
    assert [path.name for path in small.iterdir()] == [FACTS]


def test_a_missing_data_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--folder", str(tmp_path)]) == 2
    (line,) = errors(capsys)
    assert line.startswith(f"error: {tmp_path / FACTS}: cannot be read as a YAML file: ")
