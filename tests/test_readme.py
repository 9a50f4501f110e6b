"""The README and the guide: their examples run as they stand, and what they name exists."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mdistill.distillers import DISTILLERS
from mdistill.user_code import import_user_module

from . import runs
from .distillers.examples import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")])
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


def examples() -> dict[str, str]:
    """Every Python or YAML block that starts with a comment naming its file."""
    blocks = (block for text in TEXT.values() for block in re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL))
    return {match[1]: block for block in blocks if (match := re.match(r"# (my_\S+\.(?:py|yaml))\n", block))}


def write_examples(folder: Path) -> None:
    for name, text in examples().items():
        (folder / name).write_text(text.replace("base: configs/", f"base: {ROOT}/configs/"))


def run(folder: Path, tool: str, arguments: Sequence[str]) -> str:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 130


def test_the_examples_are_there_and_the_readme_method_has_12_lines() -> None:
    modules = {f"my_{name}.py" for name in ("method", "features", "phases", "network", "data", "stream")}
    assert examples().keys() == modules | {"my_method.yaml", "my_teacher.yaml", "my_student.yaml", "my_table.yaml"}
    assert "# my_method.py" in TEXT["README.md"]
    assert len(examples()["my_method.py"].strip().splitlines()) <= 12


@pytest.mark.slow
def test_own_method_network_and_data_work_like_built_in_ones(tmp_path: Path) -> None:
    write_examples(tmp_path)
    student = "runs/my_data/my_method/my_network_my_network/seed0"
    for config in ("my_teacher.yaml", "my_student.yaml"):
        run(tmp_path, "train", ["--cfg", config, "--device", "cpu"])
    assert "my_network  test" in run(tmp_path, "eval", [student, "--trust", "--device", "cpu"])
    assert (tmp_path / student / "student.pt").is_file()


@pytest.mark.slow
def test_the_readme_configuration_is_complete(tmp_path: Path) -> None:
    write_examples(tmp_path)
    config = run(tmp_path, "train", ["--cfg", "my_method.yaml", "--print-config"])
    assert "distiller: {name: my_method, " in config
    assert "weight: 0.5" in config


@pytest.mark.slow
def test_own_features_modules_state_and_draws_work_on_streamed_images(tmp_path: Path) -> None:
    write_examples(tmp_path)
    solver = "{name: sgd, epochs: 1, lr: 0.05, milestones: [], gamma: 0.1, momentum: 0.9, weight_decay: 5e-4}"
    common = f"imports: [my_features, my_stream]\ndata: {{name: my_stream, batch_size: 96}}\nsolver: {solver}\n"
    teacher = "teacher: {name: resnet14, checkpoint: runs/my_stream/vanilla/resnet14/seed0}\n"
    (tmp_path / "first.yaml").write_text(
        f"{common}student: {{name: resnet14}}\ndistiller: {{name: vanilla, ce_weight: 1.0}}\n"
    )
    (tmp_path / "second.yaml").write_text(
        f"{common}{teacher}student: {{name: resnet8}}\ndistiller: {{name: my_features, ce_weight: 1.0, weight: 1.0}}\n"
    )
    for config in ("first.yaml", "second.yaml"):
        run(tmp_path, "train", ["--cfg", config, "--device", "cpu"])
    assert (tmp_path / "runs/my_stream/my_features/resnet14_resnet8/seed0/student.pt").is_file()


def test_the_method_with_a_first_phase_trains(tmp_path: Path) -> None:
    write_examples(tmp_path)
    import_user_module("my_phases", [tmp_path])
    cfg = runs.write_config(tmp_path, "my_phases", distiller={"weight": 1.0})
    ((first, *_, last),) = runs.train(cfg, tmp_path)
    assert (first["phase"], last["epoch"]) == ("autoencoder", 5)
    assert "train/loss_autoencoder" in first
    assert "train/loss_code" in last


def named_paths() -> list[str]:
    """Every path of the project that a page names; those with <placeholders> or * are patterns, not paths.

    Where a setting comes from is a path of another project.
    """
    rooms = "configs|tools|benchmarks|tests|mdistill|results|docs"
    text = re.sub(r"runs/\S+", "", "\n".join(TEXT.values()))
    text = re.sub(r"(?m)^- .*` (certain|inferred|ours): .*$", "", text)
    paths = re.findall(rf"(?<![\w/.<])(?:{rooms})/[\w/.]*(?![\w/.]*[<*])", text)
    return sorted({path.rstrip(".") for path in paths})


@pytest.mark.parametrize("path", named_paths())
def test_what_the_pages_name_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_methods_whose_cache_holds_pooled_features_are_listed() -> None:
    listed = re.search(r"pooled features and nothing further inside it \(([^)]*)\)", TEXT["docs/teacher.md"])
    assert listed
    reading = {name for name in METHODS if DISTILLERS.get(name).needs.teacher == "pooled"}
    assert set(re.findall(r"\w+", listed[1])) == reading


@pytest.mark.parametrize("page", TEXT)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", TEXT[page]):
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page} links to {target}#{anchor}; {target} has {sorted(anchors)}"


def test_the_guide_names_each_of_its_pages() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert set(re.findall(r"(\w+\.md)", nav)) == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_make_targets_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", "\n".join(TEXT.values()), re.MULTILINE))
    assert {"quickstart", "test"} <= named
    assert named <= targets
