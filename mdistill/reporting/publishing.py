"""Copy the record of a run into ``results/``: what a number is defended with, and nothing of the machine it ran on."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mdistill.engine.run_folder import read_sessions
from mdistill.errors import UserError
from mdistill.files import read_text, write_text
from mdistill.reporting.records import Record
from mdistill.reporting.transfers import FOLDER, transfers_of

MAX_BYTES = 1_000_000  # of a file
MESSAGES = ("failed", "notes")  # entries of a session that are text
_CHARACTER = r"[^\s'\"<>|()]"  # of a path within a text
_PART = r"/[^\s/'\"<>|()]+"
SEARCHES = "searches"  # the folder of what was searched, below the runs and below the results


def destination(record: Record, output: Path) -> Path:
    """Where a record belongs below the results: as it lies below ``output``, else as its configuration says."""
    folder, root = record.folder.resolve(), output.resolve()
    if folder.is_relative_to(root):
        return folder.relative_to(root)
    dataset, method, teacher, student = record.key
    pair = (f"{teacher}_{student}" if teacher else student).replace("/", "-")
    return Path(dataset, method, pair, record.variant, f"seed{record.seed}")


def publish(record: Record, target: Path, roots: Sequence[Path] = ()) -> bool:
    """Write configuration, environment, metrics and transfers of ``record`` into ``target``; whether any changed.

    Absolute paths become relative to the current folder, else to the first of ``roots`` that they lie below, else their
    last part.

    Args:
        roots: folders of teachers and runs, which a reader names by a flag.

    Raises:
        UserError: the run has not ended, a file is too large, or another run's record is there.
    """
    if not (record.complete or record.failure):
        raise UserError(f"{record.folder} is at epoch {record.done} of {record.epochs}: publish it when it is complete")
    portable = _Portable([Path.cwd(), *roots])
    files = {"metrics.jsonl": read_text(record.folder / "metrics.jsonl")}
    sessions = read_sessions(record.folder)
    if not sessions:
        raise UserError(f"{record.folder} has no env.json, which says what its result was made with")
    files["env.json"] = _text({"sessions": portable(sessions)}, record.folder / "env.json")
    config = portable(record.config)
    if config == record.config:
        files["config.yaml"] = read_text(record.folder / "config.yaml")
    else:
        import yaml  # slow to import

        files["config.yaml"] = yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=120)
    for name, transfer in transfers_of(record).items():
        content = transfer.model_dump(mode="json")
        files[f"{FOLDER}/{name}"] = _text(portable(content), record.folder / FOLDER / name)
    for name, text in files.items():
        _check_size(record.folder / name, text)
    if (target / "env.json").is_file():
        there = read_sessions(target)
        if there and there[0].get("started") != sessions[0].get("started"):
            raise UserError(
                f"{target} holds another run, begun {there[0].get('started')} and not {sessions[0].get('started')}:"
                " move it away to publish this one"
            )
    changed = False
    for name, text in files.items():
        if not (target / name).is_file() or read_text(target / name) != text:
            write_text(target / name, text)
            changed = True
    return changed


def _text(content: Any, path: Path) -> str:
    """``content`` of ``path`` as JSON.

    Raises:
        UserError: it holds a number that JSON has not.
    """
    try:
        return json.dumps(content, indent=2, allow_nan=False) + "\n"
    except ValueError:
        raise UserError(f"{path} is damaged: it holds a number that is not finite") from None


def searches_of(table: str, output: Path) -> list[Path]:
    """The records of searches for the table called ``table``."""
    folder = output / SEARCHES
    paths = [folder / f"{table}.json", *sorted(folder.glob(f"{table}-epochs[0-9]*.json"))]
    return [path for path in paths if path.is_file()]


def publish_search(path: Path, results: Path) -> Path:
    """Copy the record of a search; where it is then.

    Raises:
        UserError: it is too large.
    """
    _check_size(path, text := read_text(path))
    target = results / SEARCHES / path.name
    write_text(target, text)
    return target


def _check_size(path: Path, text: str) -> None:
    if (size := len(text.encode())) > MAX_BYTES:
        raise UserError(f"{path} has {size / 1e6:.1f} MB, and a published file at most {MAX_BYTES / 1e6:g}")


class _Portable:
    """Makes copies of values without what absolute paths in them tell of a machine."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = list(dict.fromkeys(str(form) for root in roots for form in (root.absolute(), root.resolve())))
        known = "|".join(re.escape(root) for root in sorted(self._roots, key=len, reverse=True))
        self._in_text = re.compile(
            rf"(?<![\w/.~-])(?:(?:{known})(?:(?:{_PART})+|(?!{_CHARACTER}))|(?:{_PART}){{2,}}|[A-Za-z]:\\{_CHARACTER}+)"
        )

    def __call__(self, value: Any, *, text: bool = False) -> Any:
        """Of ``value``; ``text``: whether it is a message, or a list of them, which may begin with a path."""
        if isinstance(value, Mapping):
            return {key: self(item, text=key in MESSAGES) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(item, text=text) for item in value]
        if not isinstance(value, str):
            return value
        flag, equals, rest = value.partition("=")
        if equals and not _is_path(value) and _is_path(rest):
            return f"{flag}={self._path(rest)}"
        return self._in_text.sub(self._found, value) if text or not _is_path(value) else self._path(value)

    def _found(self, match: re.Match[str]) -> str:
        path = match[0].rstrip(".,:;")
        return self._path(path) + match[0][len(path) :]

    def _path(self, path: str) -> str:
        for number, root in enumerate(self._roots):
            if path.startswith(root + os.sep) or (path == root and number == 0):
                return os.path.relpath(path, root)
        return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name


def _is_path(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
