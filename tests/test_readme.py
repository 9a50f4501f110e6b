"""The README's examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def files() -> dict[str, str]:
    """Every Python or YAML block that starts with a comment naming its file."""
    named = {}
    for block in [*blocks("python"), *blocks("yaml")]:
        match = re.match(r"# (my_\S+\.(?:py|yaml))\n", block)
        if match:
            named[match[1]] = block
    return named


def test_examples_are_there_and_short() -> None:
    assert set(files()) == {"my_method.py", "my_network.py", "my_data.py", "my_teacher.yaml", "my_student.yaml"}
    assert all(len(text.strip().splitlines()) <= 21 for text in files().values())


def test_own_method_network_and_data_work_like_built_in_ones(tmp_path: Path) -> None:
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    student = "runs/my_data/my_method/my_network_my_network/seed0"
    out = ""
    for words in (["train", "--cfg", "my_teacher.yaml"], ["train", "--cfg", "my_student.yaml"], ["eval", student]):
        command = [sys.executable, str(ROOT / "tools" / f"{words[0]}.py"), *words[1:], "--device", "cpu"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        out += result.stdout
    assert (tmp_path / student / "student.pt").is_file()
    assert "my_network  test" in out


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:configs|tools|benchmarks|tests)/[\w/.]+\.(?:py|yaml)", README)))
)
def test_files_that_the_readme_names_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def test_make_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"quickstart", "test"} <= set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)) <= targets
