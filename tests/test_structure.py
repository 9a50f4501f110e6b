"""The rooms of the project keep to their rules."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import mdistill
from mdistill.distillers import DISTILLERS
from mdistill.engine.trainer import train_step

ROOT = Path(__file__).resolve().parents[1]
NEUTRAL = [
    path
    for folder in ("mdistill/engine", "mdistill/data", "mdistill/reporting", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
] + [ROOT / "mdistill" / "config.py", ROOT / "mdistill" / "cli.py", ROOT / "mdistill" / "registry.py"]
MODULES = sorted(module.name for module in pkgutil.walk_packages(mdistill.__path__, "mdistill."))


def test_finds_the_modules() -> None:
    assert len(MODULES) > 25
    assert len(NEUTRAL) > 20


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("path", NEUTRAL, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_method_is_named_outside_its_file(path: Path) -> None:
    """Neither a string that is a method's name nor an import of a method's module; help texts may show an example."""
    methods = {name for name in DISTILLERS.names() if DISTILLERS.get(name).__module__.startswith("mdistill.")}
    assert methods
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in methods, f"{path}:{node.lineno} names the method {node.value!r}"
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        for module in modules:
            tail = re.match(r"mdistill\.distillers\.(\w+)", module)
            assert tail is None or tail[1] not in methods, f"{path}:{node.lineno} imports the method module {module}"


def test_train_step_is_short_and_never_waits() -> None:
    source = inspect.getsource(train_step)
    assert len(source.strip().splitlines()) <= 15
    assert not re.search(r"\.item\(|\.cpu\(|\.tolist\(|print|log", source)
