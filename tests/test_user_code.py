"""The user's modules: what is found, what is refused by name, and whose frames a traceback shows."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mdistill import user_code
from mdistill.errors import UserError
from mdistill.user_code import import_user_module, traceback_of


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(user_code, "_places", [])  # those of other tests
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    importlib.invalidate_caches()


def write(folder: Path, name: str, text: str = "LOADED = True\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_the_first_folder_that_has_it_wins(tmp_path: Path) -> None:
    write(tmp_path / "a", "other.py")
    write(tmp_path / "b", "my_module_a.py", "PLACE = 'b'\n")
    write(tmp_path / "c", "my_module_a.py", "PLACE = 'c'\n")
    import_user_module("my_module_a", [tmp_path / "none", tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert sys.modules["my_module_a"].PLACE == "b"
    assert str(tmp_path / "b") in sys.path
    assert not {str(tmp_path / "a"), str(tmp_path / "c")} & {*sys.path}  # nothing there can hide anything


def test_modules_beside_it_and_packages_are_found(tmp_path: Path) -> None:
    write(tmp_path, "my_helper_b.py")
    write(tmp_path / "my_package_b", "inner.py", "import my_helper_b\n")
    import_user_module("my_package_b.inner", [tmp_path])
    assert sys.modules["my_helper_b"].LOADED


@pytest.mark.parametrize("name", ["random.py", "tensorboard.py", "numpy/__init__.py", "mdistill.py", "types.py"])
def test_a_module_that_hides_a_needed_package_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name)
    write(tmp_path, "my_module_c.py")
    package = name.removesuffix(".py").partition("/")[0]
    for module, what in ((package, ""), ("my_module_c", ", beside your module 'my_module_c',")):
        with pytest.raises(UserError) as caught:
            import_user_module(module, [tmp_path])
        place = path if path.parent == tmp_path else path.parent
        assert str(caught.value).startswith(f"imports: {place}{what} has the name of ")
        assert f"'{package}'" in str(caught.value)
        assert str(caught.value).endswith("rename it")
    assert str(tmp_path) not in sys.path


def test_a_folder_without_modules_hides_nothing(tmp_path: Path) -> None:
    write(tmp_path / "tensorboard", "events.txt")
    write(tmp_path / "numpy", "notes.py")  # no __init__.py: the installed package is found first
    write(tmp_path, "my_module_d.py")
    import_user_module("my_module_d", [tmp_path])


def test_a_name_that_is_loaded_from_elsewhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", "my_module_e.py")
    write(tmp_path / "b", "my_module_e.py")
    import_user_module("my_module_e", [tmp_path / "a"])
    with pytest.raises(UserError, match=r"'my_module_e' is loaded from .*a.my_module_e.py already, so the module of"):
        import_user_module("my_module_e", [tmp_path / "b"])


def test_an_installed_package_needs_no_folder() -> None:
    import_user_module("json.tool", [])


def error_of(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception, match=r".") as caught:
        call()
    return caught.value


def test_a_traceback_shows_the_user_s_frames_alone(tmp_path: Path) -> None:
    text = "import json\ndef broken(text):\n    return json.loads(text)\ndef outer(text):\n    return broken(text)\n"
    path = write(tmp_path, "my_module_f.py", text)
    import_user_module("my_module_f", [tmp_path])
    shown = traceback_of(error_of(lambda: sys.modules["my_module_f"].outer("{")))
    assert (
        shown.splitlines()
        == [
            "Traceback (most recent call last), in your code:",
            f'  File "{path}", line 5, in outer',
            "    return broken(text)",
            f'  File "{path}", line 3, in broken',
            "    return json.loads(text)",
        ]
        or "^^^" in shown
    )
    assert "decoder.py" not in shown
    assert traceback_of(error_of(lambda: int("x"))) == ""
    assert traceback_of(None) == ""


def test_an_error_while_it_loads_has_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "my_module_g.py", "def half():\n    return 1 / 0\nhalf()\n")
    error = error_of(lambda: import_user_module("my_module_g", [tmp_path]))
    assert str(error) == "imports: module 'my_module_g' failed to load: ZeroDivisionError: division by zero"
    assert f'File "{path}", line 2, in half' in traceback_of(error.__cause__)
