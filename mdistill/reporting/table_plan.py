"""The runs of a table: what is there of each, what is missing, and where its teacher comes from."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mdistill.engine.run_folder import read_metrics
from mdistill.errors import UserError, shown
from mdistill.files import sha256_of, signature_of
from mdistill.reporting.table_files import Cell, Row, Table, as_overrides, runs_of, shared_folder, short
from mdistill.settings import leaves

if TYPE_CHECKING:
    from mdistill.config import Config

MOST_BYTES = 200  # of a run's key, which names files
TEACHER = "teacher"  # the row that a missing teacher's run is of

State = Literal["complete", "begun", "missing", "other"]


@dataclass(frozen=True)
class Run:
    """One training of a table."""

    cell: Cell
    seed: int
    config: "Config"
    folder: Path
    key: str  # its name among all runs below one output folder
    needs: str | None = None  # key of the run that trains its teacher
    missing: str | None = None  # why its teacher cannot be had
    weights: Mapping[str, Path] = field(default_factory=dict, compare=False)  # files that it begins from, by key
    _seen: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.cell.row.name} {self.cell.pair} seed {self.seed}"

    @property
    def epochs(self) -> int:
        """Of all its phases."""
        return self.config.epochs

    @property
    def epochs_done(self) -> int:
        """Whole lines of its record."""
        self._look()
        return min(int(self._seen["lines"]), self.epochs)

    @property
    def state(self) -> State:
        """Complete: the last epoch is in its record and its student is there. Other: a run of other settings is."""
        self._look()
        state: State = self._seen["state"]
        return state

    @property
    def difference(self) -> str:
        """In what a run of other settings is another one."""
        self._look()
        return str(self._seen["difference"])

    def _look(self) -> None:
        """Read what is in the folder, where it has changed since."""
        names = ("metrics.jsonl", "config.yaml", "student.pt", "env.json")
        signature = [signature_of(self.folder / name) for name in names]
        if self._seen.get("signature") == signature:
            return
        lines = _count_lines(self.folder / "metrics.jsonl") if signature[0] else 0
        difference = _difference(self) if signature[1] else ""
        state: State = "begun" if lines or signature[1] else "missing"
        if difference:
            state = "other"
        elif lines >= self.epochs and signature[1] and signature[2]:
            with suppress(UserError):  # it has gone this moment, so it is being begun anew
                metrics = read_metrics(self.folder)
                state = "complete" if metrics and metrics[-1]["epoch"] == self.epochs else "begun"
        self._seen.update(signature=signature, lines=lines, state=state, difference=difference)


def _count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _difference(run: Run) -> str:
    """The settings in which the run that is recorded in its folder is another one; "" where there are none."""
    from mdistill.reporting.records import read_record
    from mdistill.reporting.table_cells import wanted

    try:
        record = read_record(run.folder)
    except UserError as error:
        whole = all((run.folder / name).exists() for name in ("config.yaml", "metrics.jsonl"))
        return str(error).splitlines()[0] if whole else ""  # else it is being written
    weights = {key: digest for key, path in run.weights.items() if key in record.weights and (digest := _sha256(path))}
    changed = wanted(run.cell, run.config, run.config).changes(record, weights)
    was, now = changed.get("solver.epochs", (None, None))
    if run.config.solver.schedule != "cosine" and isinstance(was, int) and isinstance(now, int) and was < now:
        del changed["solver.epochs"]  # it may grow
    listed = [f"{key}: {shown(old, 80)} there, {shown(new, 80)} here" for key, (old, new) in changed.items()]
    return "; ".join([*listed[:3], *(["..."] if listed[3:] else [])])


def _sha256(path: Path) -> str:
    """Of the weights in ``path``, a file or a run folder; "" where there are none."""
    file = path / "student.pt" if path.is_dir() else path
    signature = signature_of(file)
    return "" if signature is None else _digest(file, signature)


@cache
def _digest(file: Path, signature: tuple[int, int]) -> str:
    """As long as its time and size, which are its ``signature``, are the same."""
    try:
        return sha256_of(file)
    except OSError:
        return ""


def plan(table: Table, *, output: Path, checkpoint_root: Path, configs: Path, train_teachers: bool) -> list[Run]:
    """Every run of ``table``, teachers that have to be trained first, then seed by seed; one of several cells once.

    A teacher whose file is missing and which an earlier call has trained below ``output`` is taken from there.

    Raises:
        UserError: a configuration does not fit, or two rows would share a run folder.
    """
    runs: list[Run] = []
    teachers: list[Run] = []
    sources: dict[tuple[str, str], Run | None] = {}
    configurations: dict[tuple[Row, str], tuple[Cell, Config]] = {}
    for cell, seed in runs_of(table):
        place = (cell.row, cell.pair)
        if place not in configurations:
            configurations[place] = _configured(cell, table.seeds[0], table.epochs)
        shortened, config = configurations[place]
        run = _run(shortened, config.model_copy(update={"seed": seed}), output)
        weights, missing = _weights(config, checkpoint_root)
        run = replace(run, weights=weights)
        if missing is not None and config.teacher is not None:
            known = (cell.pair, config.teacher.model_dump_json())
            if known not in sources:
                sources[known] = _teacher(run, table, output, configs)
            source = sources[known]
            if source is not None and (train_teachers or source.state == "complete"):
                override = (f"teacher.checkpoint={source.folder.resolve()}", "teacher.expected_top1=null")
                teachers.append(source)
                own = replace(run.cell, overrides=(*run.cell.overrides, *override))
                trained = {**weights, "teacher.checkpoint": source.folder}
                run = replace(run, cell=own, needs=source.key, weights=trained)
            else:
                hint = "" if source is None else "; or train it here, with --train-teachers"
                run = replace(run, missing=f"{missing}{hint}")
        runs.append(run)
    folders: dict[Path, Run] = {}
    for run in [*runs, *teachers]:
        other = folders.setdefault(run.folder, run)
        if other.config.model_copy(update={"imports": run.config.imports}) != run.config:
            raise shared_folder(table.path, other.label, run.label, run.folder)
    first = {each.folder: folders.pop(each.folder) for each in teachers if each.folder in folders}
    return [*first.values(), *folders.values()]


def _configured(cell: Cell, seed: int, epochs: int | None) -> "tuple[Cell, Config]":
    try:
        if epochs is not None:
            cell = short(cell, epochs)
        return cell, cell.config(seed)
    except UserError as error:
        lines = str(error).splitlines()
        raise UserError("\n".join(f"{cell.row.name} {cell.pair}: {line}" for line in lines)) from None


def _run(cell: Cell, config: "Config", output: Path) -> Run:
    folder = config.run_folder()
    return Run(cell, config.seed, config, output / folder, claim_key(folder))


def claim_key(folder: Path) -> str:
    """The name by which the run in ``folder``, as it lies below the output folder, is claimed."""
    key = "--".join(folder.parts)
    if len(key.encode()) > MOST_BYTES:
        key = f"{key[:60]}~{hashlib.sha256(key.encode()).hexdigest()[:16]}--{folder.name}"
    return key


def _weights(config: "Config", checkpoint_root: Path) -> tuple[dict[str, Path], str | None]:
    """The teacher's files of a run, by setting, and why one is missing; without those that the run itself downloads."""
    from mdistill.models.pretrained import published_weights
    from mdistill.models.teachers import locate

    found: dict[str, Path] = {}
    members = config.teacher.members if config.teacher is not None else ()
    places = ["teacher", *(f"teacher.ensemble.{number}" for number in range(len(members)))]
    try:
        for place, member in zip(places, members, strict=False):
            if published_weights(member.name, member.checkpoint, "teacher") is None:
                path = locate(member.checkpoint, checkpoint_root, model=member.name, dataset=config.data.name)
                found[f"{place}.checkpoint"] = path
    except UserError as error:
        return found, str(error).splitlines()[0]
    return found, None


def _teacher(run: Run, table: Table, output: Path, configs: Path) -> Run | None:
    """The run that trains the teacher of ``run`` alone; None where no configuration has it."""
    assert run.config.teacher is not None
    cell = None if run.config.teacher.ensemble else _teacher_cell(run, table, configs)
    return None if cell is None else _run(*_configured(cell, 0, table.epochs), output)


def _teacher_cell(run: Run, table: Table, configs: Path) -> Cell | None:
    """The teacher alone, on the data of its pair, with what the table changes of data and arithmetic."""
    from mdistill.config import Inline, load, without_defaults
    from mdistill.config.files import read_tree
    from mdistill.models.names import student_file_name

    teacher = run.config.teacher
    assert teacher is not None
    cfg = configs / table.dataset / f"vanilla/{student_file_name(teacher.name)}"
    if not cfg.is_file():
        return None
    pair_file = configs / table.dataset / "_pairs" / f"{run.cell.pair}.yaml"
    data = run.cell.data or (read_tree(pair_file).get("data") if pair_file.is_file() else None) or {}
    own = dict(leaves(read_tree(cfg).get("data") or {}))
    given = {".".join(("data", *key)): value for key, value in leaves(data) if own.get(key) != value}
    network, plain = without_defaults(run.config)["teacher"], without_defaults(load(cfg))["student"]
    arguments = [key for key in teacher.arguments if network.get(key) != plain.get(key)]
    given |= {f"student.{key}": teacher.arguments[key] for key in arguments}
    modules = run.config.imports if "data.name" in given else ()  # one of them has it
    every_run = tuple(each for each in table.every_run if each.startswith(("data.", "run.")))
    return Cell(
        Row(TEACHER, str(cfg)),
        teacher.name,
        (cfg, *([Inline(table.path, {"imports": list(modules)})] if modules else [])),
        ("--cfg", str(cfg), *(word for module in modules for word in ("--import", module))),
        overrides=(*as_overrides(given), *every_run),
        folders=run.cell.folders,
    )
