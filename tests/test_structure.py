"""The rooms of the project keep to their rules."""

import ast
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mdistill
from mdistill.distillers import DISTILLERS
from mdistill.engine.trainer import train_step

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(mdistill.__path__, "mdistill."))
LIGHT = [name for name in MODULES if re.match(r"mdistill\.(cli|reporting)\b", name)]
HEAVY = ["torch", "torchvision", "numpy", "pydantic", "matplotlib", "yaml", "tensorboard"]
NEUTRAL = [
    *(ROOT / "mdistill").glob("*.py"),
    *(ROOT / "tools").glob("*.py"),
    *(
        path
        for room in ("cli", "config", "data", "engine", "optim", "reporting")
        for path in sorted((ROOT / "mdistill" / room).rglob("*.py"))
    ),
]
RANKS = {
    "cli": 6,
    "reporting": 5,
    "engine": 5,
    "optim": 4,
    "config": 4,
    "losses": 3,
    "distillers": 3,
    "models": 2,
    "data": 2,
    "file_schemas": 1,
    "settings": 1,
    "registry": 1,
    "errors": 1,
    "files": 1,
    "pickles": 1,
    "user_code": 1,
    "precision": 1,
    "distributed": 1,
}


def test_finds_the_modules() -> None:
    assert len(MODULES) > 25
    assert len(NEUTRAL) > 20
    assert len(LIGHT) > 8


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


def in_a_fresh_process(code: str) -> str:
    """What ``code`` prints in an interpreter that has imported nothing."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_package_its_commands_and_reports_import_nothing_slow() -> None:
    """So that help and signals are answered at once."""
    code = f"import json, sys, mdistill, {', '.join(LIGHT)}; print(json.dumps([*sys.modules]))"
    imported = json.loads(in_a_fresh_process(code))
    assert not set(HEAVY) & set(imported)
    assert not [name for name in imported if name.startswith(("mdistill.models", "mdistill.distillers"))]


PORTABLE = """
import os, sys
for module in ("fcntl", "resource"):
    sys.modules[module] = None
for name in ("posix_fallocate", "fork", "sysconf", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
import importlib
failed = []
for name in {modules}:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{{name}}: {{error!r}}")
print("; ".join(failed))
"""


@pytest.mark.slow
def test_every_module_imports_where_there_is_no_posix() -> None:
    assert in_a_fresh_process(PORTABLE.format(modules=MODULES)) == "\n"


def test_public_names_are_there_and_come_when_asked_for() -> None:
    assert dir(mdistill) == sorted(mdistill.__all__)
    for name in mdistill.__all__:
        assert getattr(mdistill, name) is not None
    assert mdistill.DISTILLERS is DISTILLERS
    assert mdistill.load_config is importlib.import_module("mdistill.config").load
    with pytest.raises(AttributeError, match="module 'mdistill' has no attribute 'nothing'"):
        _ = mdistill.nothing


def test_losses_have_every_loss_of_every_method_under_one_name() -> None:
    functions = [
        function
        for module in pkgutil.iter_modules(importlib.import_module("mdistill.distillers").__path__)
        for name, function in vars(importlib.import_module(f"mdistill.distillers.{module.name}")).items()
        if name.endswith("_loss") and inspect.isfunction(function) and name[0] != "_"
    ]
    public = [getattr(mdistill.losses, name) for name in dir(mdistill.losses)]
    assert set(public) == set(functions)
    assert len(public) == len(set(public)) > 30
    assert mdistill.losses.dkd_loss is importlib.import_module("mdistill.distillers.dkd").dkd_loss
    with pytest.raises(AttributeError, match="no loss 'dk_loss'; did you mean 'dkd_loss'"):
        _ = mdistill.losses.dk_loss


def module_path(name: str) -> Path:
    """The file of a module of this project."""
    path = ROOT / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of this project in a file, within functions too, but not for type checkers."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    checked = [node for node in nodes if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    for_types = {id(below) for node in checked for below in ast.walk(node)}
    for node in nodes:
        if id(node) in for_types:
            continue
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [name if name in MODULES else node.module for name in below]
        yield from ((node.lineno, target) for target in targets if target.split(".")[0] == "mdistill")


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name: str) -> None:
    room = name.split(".")[1]
    assert room in RANKS, f"{room} has no rank"
    upwards = [
        f"{module_path(name)}:{line} imports {target}"
        for line, target in imports(module_path(name))
        if target != "mdistill" and RANKS[target.split(".")[1]] > RANKS[room]
    ]
    assert not upwards


@pytest.mark.parametrize("path", NEUTRAL, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_method_is_named_outside_its_file(path: Path) -> None:
    """Neither a string that is a method's name nor an import of a method's module; help texts may show an example."""
    modules = {name: DISTILLERS.get(name).__module__ for name in DISTILLERS.names()}
    methods = {name for name, module in modules.items() if module.startswith("mdistill.")}
    files = {modules[name].rpartition(".")[2] for name in methods}
    assert files
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in methods, f"{path}:{node.lineno} names the method {node.value!r}"
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        for module in imported:
            tail = re.match(r"mdistill\.distillers\.(\w+)", module)
            assert tail is None or tail[1] not in files, f"{path}:{node.lineno} imports the method module {module}"


def test_train_step_is_short_and_never_waits() -> None:
    source = inspect.getsource(train_step)
    assert len(source.strip().splitlines()) <= 15
    assert not re.search(r"\.item\(|\.cpu\(|\.tolist\(|print|log", source)
