"""Records of what students' features are worth on other data: ``transfer/<target>.json`` in a run folder."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistill.engine.run_folder import read_sessions
from mdistill.errors import UserError, printable
from mdistill.files import write_text
from mdistill.reporting.records import Record

if TYPE_CHECKING:
    from mdistill.file_schemas import TransferRecord

FOLDER = "transfer"


@dataclass(frozen=True)
class Found:
    """What a run folder says of a target."""

    values: Mapping[str, float] = field(default_factory=dict)  # percent, by ``top1`` and ``top5``; empty without record
    why: str = ""  # there is none that counts
    other: str = ""  # in what the settings are others than those asked for
    data: str = ""  # fingerprint of the target's images


def path_of(folder: Path, target: str) -> Path:
    """Where the record of ``target`` lies in a run folder."""
    return folder / FOLDER / f"{target}.json"


def split_metric(metric: str) -> tuple[str, str]:
    """``stl10/top1`` as target and accuracy; of a run's own test split the target is ""."""
    target, _, accuracy = metric.rpartition("/")
    return target, accuracy


def targets_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """The targets that some of ``metrics`` are on."""
    return tuple(dict.fromkeys(target for metric in metrics if (target := split_metric(metric)[0])))


def read_transfer(path: Path) -> "TransferRecord":
    """The record ``path``.

    Raises:
        UserError: it cannot be read, is damaged, or of a newer version.
    """
    from mdistill.file_schemas import TransferRecord, read_json

    record = read_json(TransferRecord, path, "run mdistill transfer again")
    if record.target != path.stem:
        raise UserError(f"{path} is damaged: it is of the target {record.target}; run mdistill transfer again")
    return record


def write_transfer(path: Path, record: "TransferRecord") -> None:
    """Write ``record``, all or nothing.

    Raises:
        RunFailed: the disk is full or the folder is not writable.
    """
    write_text(path, record.model_dump_json(indent=2) + "\n")


def begun(folder: Path) -> str:
    """When the run in ``folder`` was begun, as its first session says; "" where it does not."""
    sessions = read_sessions(folder)
    return str(sessions[0].get("started") or "") if sessions else ""


def belongs(transfer: "TransferRecord", record: Record) -> bool:
    """Whether ``transfer`` is of the run as it is recorded now, and not of an earlier one in its folder."""
    run = transfer.run
    return run is not None and (run.started, run.epoch) == (begun(record.folder), record.done)


def find_transfer(record: Record, target: str, settings: Mapping[str, Any]) -> Found:
    """What the folder of ``record`` says of ``target`` with ``settings``, of which every one is given."""
    path = path_of(record.folder, target)
    if not path.is_file():
        return Found(why=f"no transfer to {target} yet")
    try:
        transfer = read_transfer(path)
        if not belongs(transfer, record):
            return Found(why=f"{path} is of an earlier run in its folder")
    except UserError as error:
        return Found(why=printable(str(error).splitlines()[0], 300))
    return Found(
        {"top1": transfer.top1, "top5": transfer.top5},
        other=other_setting(transfer.settings.model_dump(mode="json"), settings),
        data=transfer.data.fingerprint,
    )


def other_setting(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first of ``wanted`` that ``found`` has another value of, with both; "" where there is none."""
    name = next((name for name in wanted if name in found and found[name] != wanted[name]), None)
    return "" if name is None else f"transfer.{name} {found[name]} instead of {wanted[name]}"


def is_done(record: Record, target: str, settings: Mapping[str, Any]) -> bool:
    """Whether a run has the record of ``target`` with these settings."""
    found = find_transfer(record, target, settings)
    return bool(found.values) and not found.other


def transfers_of(record: Record) -> dict[str, "TransferRecord"]:
    """Those that belong to the run of ``record``, by the names of their files.

    Raises:
        UserError: one is damaged, or of a newer version.
    """
    paths = sorted((record.folder / FOLDER).glob("*.json"))
    found = {path.name: read_transfer(path) for path in paths if not path.name.startswith(".")}
    return {name: transfer for name, transfer in found.items() if belongs(transfer, record)}
