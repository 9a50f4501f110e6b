"""The user's own modules: finding them, loading them, and telling errors in them apart from ours."""

import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from mdistill.errors import UserError

OURS = Path(__file__).resolve().parent
NEEDED = {  # packages that this one imports, some of them late
    *("mdistill", "torch", "torchvision", "numpy", "yaml", "tqdm", "tensorboard", "pydantic", "safetensors"),
    *("typing_extensions", "matplotlib", "filelock", "timm", "huggingface_hub"),
    *(
        "PIL",
        "google",
        "sympy",
        "mpmath",
        "networkx",
        "jinja2",
        "fsspec",
        "packaging",
        "setuptools",
        "triton",
    ),  # by them
}

_places: list[Path] = []  # folders, or single files, of what was loaded


def import_user_module(module: str, folders: Sequence[Path]) -> None:
    """Import ``module`` from the first of ``folders`` that has it, else from the installed packages.

    Raises:
        UserError: there is no such module, it fails to load, or it or a file beside it has the name of a package that
            Python or mdistill needs.
    """
    if module.endswith(".py") or "/" in module:
        raise UserError(f"imports: {module!r} is a file; name the module, {Path(module).stem!r}")
    name = module.partition(".")[0]
    home = next((folder.resolve() for folder in folders if name in _modules_in(folder)), None)
    if home is not None:
        _refuse_hidden_packages(home, name)
        if str(home) not in sys.path:
            sys.path.insert(0, str(home))
        _places.append(home)
    try:
        loaded = importlib.import_module(module)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"imports: module {module!r} was found but needs {error.name!r}, which is missing"
            ) from None
        raise UserError(
            f"imports: no module {module!r} in {', '.join(map(str, folders))} or among the installed packages"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(f"imports: module {module!r} failed to load: {type(error).__name__}: {error}") from error
    place = _file_of(loaded)
    if home is None and place is not None and name not in sys.stdlib_module_names:
        _places.append(place.parent if place.name == "__init__.py" else place)
    elif home is not None and place is not None and not any(parent.samefile(home) for parent in place.parents):
        raise UserError(
            f"imports: {module!r} is loaded from {place} already, so the module of this name in {home} cannot be;"
            " rename it"
        )


def code_fingerprint(module: str) -> str | None:
    """SHA-256 (hex) of the Python files of an imported module or package and their names; None where it has none."""
    place = _file_of(sys.modules[module]) if module in sys.modules else None
    if place is None:
        return None
    folder = place if place.is_dir() else place.parent
    package = place.is_dir() or place.name == "__init__.py"
    digest = hashlib.sha256()
    try:
        for file in sorted(folder.rglob("*.py")) if package else [place]:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    except OSError:  # gone since, or not to be read
        return None
    return digest.hexdigest()


def traceback_of(error: BaseException | None) -> str:
    """Where in the user's modules ``error`` was raised, as Python prints it, without frames of others; else nothing."""
    frames = [] if error is None else [each for each in traceback.extract_tb(error.__traceback__) if _is_theirs(each)]
    if not frames:
        return ""
    return "".join(["Traceback (most recent call last), in your code:\n", *traceback.format_list(frames)])


def _is_theirs(frame: traceback.FrameSummary) -> bool:
    file = Path(frame.filename)
    within = [place for place in _places if place in (file, *file.parents)]
    return OURS not in file.parents and any("site-packages" not in file.relative_to(place).parts for place in within)


def _modules_in(folder: Path) -> Iterator[str]:
    """Names of the modules and packages in ``folder``; packages need no ``__init__.py``."""
    try:
        for entry in folder.iterdir():
            if entry.suffix == ".py" or (entry.is_dir() and any(entry.glob("*.py"))):
                yield entry.stem
    except OSError:  # not there
        return


def _refuse_hidden_packages(home: Path, name: str) -> None:
    """Refuse a module in ``home`` that would be imported in place of a package that is needed."""
    for entry in sorted(home.iterdir()):
        module = entry.suffix == ".py" or (entry / "__init__.py").is_file()
        if not module or entry == OURS or entry.stem not in {*sys.stdlib_module_names, *NEEDED}:
            continue
        whose = "Python's standard library" if entry.stem in sys.stdlib_module_names else "an installed package"
        if entry.stem == name:
            raise UserError(f"imports: {entry} has the name of {whose}'s {name!r}; rename it")
        raise UserError(
            f"imports: {entry}, beside your module {name!r}, has the name of {whose}'s {entry.stem!r} and would be"
            " imported in its place; rename it"
        )


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
    return Path(file).absolute() if file else None
