"""Table files: which pairs, methods and seeds a table has, and the runs behind its cells."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistill.errors import UserError, printable, shown, suggestion

if TYPE_CHECKING:
    from mdistill.config import Config, Inline
    from mdistill.file_schemas import ChosenSettings, SearchSpace, TableFile, TablePair, TableRow

COUNTED = ("epochs", "epoch", "after")  # how names of a method's settings that are counted in epochs end


@dataclass(frozen=True)
class Row:
    """A method of a table."""

    name: str
    method: str  # the folder of its configurations; or, with ``settings``, as it is registered
    overrides: tuple[str, ...] = ()
    settings: dict[str, Any] | None = field(default=None, compare=False)
    published: str | None = None  # variant of its published figures, where it is not that of its runs
    without: dict[str, str] = field(default_factory=dict, compare=False)  # pairs that it has no cell for, and why
    search: "Mapping[str, SearchSpace]" = field(default_factory=dict, compare=False)  # spaces by dotted setting


@dataclass(frozen=True)
class Cell:
    """A method for a pair: runs that differ in their seed alone."""

    row: Row
    pair: str
    parts: "tuple[Path | Inline, ...]" = field(compare=False)  # its configuration, in the order of merging
    train: tuple[str, ...]  # arguments of ``mdistill train`` that name it
    own: tuple[str, ...] = ()  # ``key=value`` that the table file has for it
    overrides: tuple[str, ...] = ()  # and further ones
    folders: tuple[Path, ...] = ()  # where user modules are looked for
    inline: bool = False  # whether the table file is its configuration, and has ``own`` too
    chosen: "ChosenSettings | None" = field(default=None, compare=False)  # by a search; they are in ``own``
    data: Mapping[str, Any] = field(default_factory=dict, compare=False)  # section of a pair of the table file
    of: str = field(default="", compare=False)  # digest of what the table file says of it

    @property
    def cfg(self) -> Path:
        """The file that its configuration begins with; the table's, where that holds a part of it."""
        return Path(self.train[1])

    def config(self, seed: int | None) -> "Config":
        """Of the run with ``seed``; None for the file's."""
        from mdistill.config import load

        return load(self.parts, (*self.own, *self.overrides), seed=seed, folders=self.folders)

    def arguments(self, seed: int) -> list[str]:
        """Of ``mdistill train`` for that run."""
        held = ("--row-digest", self.of) if self.inline else self.own  # what of it the table file has
        return [*self.train, "--seed", str(seed), *held, *self.overrides]


@dataclass(frozen=True)
class Table:
    """A table file, its rows and pairs found."""

    path: Path
    title: str
    source: str
    number: str
    rows: tuple[Row, ...]
    pairs: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]  # row by row; none for ``row.without``
    metrics: tuple[str, ...] = ("top1",)
    notes: tuple[str, ...] = ()
    dataset: str = ""  # the folder of its configurations
    every_run: tuple[str, ...] = ()  # ``key=value`` for all of them, the command line's last
    epochs: int | None = None  # that every schedule is to be shortened to; those of ``cells`` are whole
    transfer: dict[str, Any] = field(default_factory=dict)  # settings of metrics on targets
    names_tuned: str = ""  # the file of chosen settings that it names
    holdout: int | None = None  # training images that a search holds out; None for a tenth of them

    def cell(self, row: Row, pair: str) -> Cell:
        """The cell of ``row`` and ``pair``, which is none of ``row.without``."""
        return next(cell for cell in self.cells if (cell.row, cell.pair) == (row, pair))


def find_table(name: str, configs: Path) -> Path:
    """The table file called ``name``: a path, or a file of ``configs/tables`` without its ending.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        if not path.is_file():
            near = suggestion(path.name, [other.name for other in path.parent.glob("*.yaml")])
            raise UserError(f"no such table file: {path}{near}")
        return path
    known = sorted(file.stem for file in (configs / "tables").glob("*.yaml"))
    if name not in known:
        raise UserError(f"unknown table {name!r}{suggestion(name, known)} (known: {', '.join(known)}; or a path)")
    return configs / "tables" / f"{name}.yaml"


def read_table(
    path: Path,
    configs: Path,
    *,
    methods: Sequence[str] | None = None,
    pairs: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    epochs: int | None = None,
    tuned: bool = True,
) -> Table:
    """The table of ``path``, or the part of it that is asked for.

    Args:
        configs: the folder of all configurations.
        methods: names of rows.
        overrides: ``key=value`` for every run, after the table's own.
        imports: further user modules.
        epochs: what every schedule is shortened to; None for what the file says.
        tuned: whether its runs have the settings that a search has chosen, where it names them; else its own.

    Raises:
        UserError: the file, a row or a pair is none.
    """
    from mdistill.user_code import import_user_module

    given = _parsed(path)
    given = given.model_copy(update={"imports": tuple(dict.fromkeys([*given.imports, *imports]))})
    for module in given.imports:
        import_user_module(module, [path.resolve().parent, Path.cwd()])
    if not (configs / given.dataset).is_dir():
        known = [each.name for each in configs.glob("*") if (each / "_recipe.yaml").is_file()]
        near = suggestion(given.dataset, known)
        raise UserError(f"{path}: dataset: no folder {configs / given.dataset}{near} (known: {', '.join(known)})")
    rows = tuple(_row(each, given, path, configs) for each in given.methods)
    names, pair_names = [row.name for row in rows], [pair.name for pair in given.pairs]
    for kind, listed in (("methods", names), ("pairs", pair_names), ("seeds", list(given.seeds))):
        twice = [each for number, each in enumerate(listed) if each in listed[:number]]
        if twice:
            raise UserError(f"{path}: {kind}: {twice[0]!r} is given twice")
    if methods is not None:
        rows = tuple(rows[names.index(known_to_table(name, names, "--methods"))] for name in dict.fromkeys(methods))
    files = [row for row in rows if row.settings is None and Path(row.method).is_file()]
    if files and len(given.pairs) > 1:
        raise UserError(
            f"{path}: methods: {files[0].method} is a file, which is of one pair, and the table has {len(given.pairs)};"
            " name a folder with _method.yaml"
        )
    if (epochs or given.epochs) and any(each.startswith("solver.epochs=") for each in overrides):
        raise UserError(
            f"solver.epochs: schedules are shortened to {epochs or given.epochs} here; give --epochs N instead"
        )
    wanted = given.pairs
    if pairs is not None:
        asked = [known_to_table(name, pair_names, "--pairs") for name in dict.fromkeys(pairs)]
        wanted = tuple(given.pairs[pair_names.index(name)] for name in asked)
    for row in rows:
        for name in row.without:
            if name not in pair_names:
                near = suggestion(name, pair_names)
                raise UserError(f"{path}: methods: {row.name}: without: {name!r} is no pair of this table{near}")
    told = {row.name: row for row in given.methods}
    digests = {(row.name, pair.name): _digest(told[row.name], pair, given) for row in rows for pair in wanted}
    chosen = _chosen(given, path, names, pair_names) if tuned and given.tuned else {}
    for place, each in chosen.items():
        if each.of != digests.get(place, each.of):
            raise UserError(
                f"{path}: tuned: {given.tuned} was chosen before this file's {place[0]!r} or {place[1]!r} was changed;"
                " run mdistill tune again, or remove the key"
            )
    cells = tuple(
        replace(
            _cell(row, pair, given, path, configs, tuple(overrides), chosen.get((row.name, pair.name)), tuned=tuned),
            of=digests[row.name, pair.name],
        )
        for row in rows
        for pair in wanted
        if pair.name not in row.without
    )
    return Table(
        path,
        given.title,
        given.source,
        given.table,
        rows,
        tuple(pair.name for pair in wanted),
        given.seeds if seeds is None else tuple(seeds),
        cells,
        given.metrics,
        given.notes,
        given.dataset,
        (*given.set, *overrides),
        given.epochs if epochs is None else epochs,
        given.transfer.model_dump(mode="json"),
        given.tuned,
        given.tune.holdout,
    )


def cell_of(
    path: Path,
    configs: Path,
    row: str,
    pair: str | None,
    *,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    tuned: bool = True,
) -> Cell:
    """One cell of the table of ``path``, with the schedule that the file shortens its own to.

    Args:
        pair: may be left out where there is one alone.
        overrides: stay as they are, also where they are counted in epochs.

    Raises:
        UserError: there is no such row or pair, or the file is none of a table.
    """
    pairs = None if pair is None else [pair]
    try:
        table = read_table(path, configs, methods=[row], pairs=pairs, imports=imports, tuned=tuned)
    except UserError as error:
        raise UserError(str(error).replace("--methods", "--row").replace("--pairs", "--pair")) from None
    if not table.cells:
        (why,) = (table.rows[0].without[name] for name in table.pairs)
        raise UserError(f"{path}: {row} {table.pairs[0]}: left out, {why}")
    if len(table.cells) > 1:
        raise UserError(f"--pair: {path} has {len(table.cells)} pairs; name one of {', '.join(table.pairs)}")
    (cell,) = table.cells
    shortened = cell if table.epochs is None else short(cell, table.epochs)
    return replace(shortened, overrides=(*shortened.overrides, *overrides))


def runs_of(table: Table) -> Iterator[tuple[Cell, int]]:
    """Every run: all cells of the first seed, then those of the next, so that a table that is cut short is balanced."""
    for seed in table.seeds:
        for cell in table.cells:
            yield cell, seed


def short(cell: Cell, epochs: int) -> Cell:
    """``cell`` with a schedule of ``epochs``, and all that is counted in epochs in the same proportion."""
    config = cell.config(0)
    solver = config.solver
    factor = epochs / solver.epochs

    def scaled(value: int) -> int:
        return max(1, round(value * factor))

    def schedule(section: str, milestones: Sequence[int], warmup: int, total: int) -> list[str]:
        kept = sorted(each for each in {scaled(each) for each in milestones} if each < total)
        lines = [f"{section}.epochs={total}", f"{section}.milestones={kept}"]
        return [*lines, *([f"{section}.lr_warmup_epochs={scaled(warmup)}"] if warmup else [])]

    overrides = schedule("solver", solver.milestones, solver.lr_warmup_epochs, epochs)
    if solver.average_from:
        overrides.append(f"solver.average_from={scaled(solver.average_from)}")
    for name, phase in config.phases.items():
        overrides += schedule(f"phases.{name}", phase.milestones, phase.lr_warmup_epochs, scaled(phase.epochs))
    for key, value in config.distiller.arguments.items():
        if key.rpartition("_")[2] in COUNTED and isinstance(value, int) and value > 0:
            overrides.append(f"distiller.{key}={scaled(value)}")
    return replace(cell, overrides=(*cell.overrides, *(line.replace(" ", "") for line in overrides)))


def _parsed(path: Path) -> "TableFile":
    from pydantic import BaseModel, ValidationError

    from mdistill.config.files import read_yaml
    from mdistill.file_schemas import SearchSpace, TableFile, TableRow, TransferSettings, TuneSettings
    from mdistill.registry import problem_lines

    try:
        return TableFile.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = []
        for detail, line in zip(error.errors(), problem_lines(error), strict=True):
            place, key = ".".join(map(str, detail["loc"])), str(detail["loc"][-1])
            sections: dict[object, type[BaseModel]] = {"transfer": TransferSettings, "tune": TuneSettings}
            model = sections.get(detail["loc"][0], TableRow) if len(detail["loc"]) > 1 else TableFile
            known = (SearchSpace if "search" in detail["loc"] else model).model_fields
            if detail["type"] == "extra_forbidden":
                line = f"{place}: unknown key{suggestion(key, known)} (allowed: {', '.join(known)})"
            elif detail["type"] == "missing":
                line = f"{place}: missing"
            lines.append(f"{path}: {line}")
        raise UserError("\n".join(lines)) from None


def _row(given: "TableRow", table: "TableFile", path: Path, configs: Path) -> Row:
    from mdistill.distillers import DISTILLERS

    if given.settings is not None:
        DISTILLERS.canonical(given.method, f"{path}: methods: {given.name}")
        return Row(given.name, given.method, given.set, given.settings, given.published, given.without, given.search)
    for folder in (configs / table.dataset / given.method, path.parent / given.method):
        if folder.exists():
            return Row(given.name, str(folder), given.set, None, given.published, given.without, given.search)
    if given.method in DISTILLERS.names():
        return Row(given.name, given.method, given.set, {}, given.published, given.without, given.search)
    known = [each.name for each in (configs / table.dataset).glob("[!_]*") if each.is_dir()]
    raise UserError(
        f"{path}: methods: {given.method!r} is neither a folder of {configs / table.dataset}, nor beside the table"
        f" file, nor registered by a module of its imports{suggestion(given.method, [*known, *DISTILLERS.names()])}"
    )


def _digest(row: "TableRow", pair: "TablePair", table: "TableFile") -> str:
    """16 digits for all that the table file says of the runs of ``row`` and ``pair``, and of how they are tuned."""
    told = (
        row.model_dump(exclude={"published", "without"}),
        pair.name,
        pair.sections,
        table.dataset,
        table.set,
        table.epochs,
    )
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _chosen(
    table: "TableFile", path: Path, rows: Sequence[str], pairs: Sequence[str]
) -> "dict[tuple[str, str], ChosenSettings]":
    """What ``tuned:`` of a table file holds, by row and pair.

    Raises:
        UserError: there is no such file, it is damaged, or names what the table has not.
    """
    file = path.parent / table.tuned
    if file.name != table.tuned:
        raise UserError(f"{path}: tuned: should be the name of a file beside this one, found {shown(table.tuned)}")
    if not file.is_file():
        near = suggestion(file.name, [other.name for other in file.parent.glob("*.yaml")])
        raise UserError(
            f"{path}: tuned: no such file {file}{near}; `mdistill tune {path} --budget N` writes {tuned_file(path)}"
        )
    found = {(each.row, each.pair): each for each in read_tuned(file)}
    for name, key, known in [(row, "row", rows) for row, _ in found] + [(pair, "pair", pairs) for _, pair in found]:
        if name not in known:
            near = suggestion(name, known)
            raise UserError(f"{file}: {key} {printable(name)!r} is none of {path}{near}; run mdistill tune again")
    return found


def tuned_file(path: Path, epochs: int | None = None) -> Path:
    """Where the settings that are chosen for the table of ``path`` are written.

    Args:
        epochs: what the schedules of their search were shortened to.
    """
    return path.with_name(f"{path.stem}{f'-epochs{epochs}' if epochs else ''}.tuned.yaml")


def read_tuned(file: Path) -> "list[ChosenSettings]":
    """What a file of chosen settings holds.

    Raises:
        UserError: it is none, or damaged.
    """
    from mdistill.config.files import read_yaml
    from mdistill.file_schemas import TunedFile, checked

    return checked(TunedFile, read_yaml(file), file, "run mdistill tune again, which writes it anew").chosen


def how_tuned(cell: Cell, *, named: bool) -> str:
    """How the settings of ``cell`` were tuned, or why they were not, in words.

    Args:
        named: whether the table file names tuned settings.
    """
    chosen = cell.chosen
    if chosen is None:
        why = "its search is not done" if named else "the table file names no tuned settings"
        return f"not tuned: {why if cell.row.search else 'no search space'}"
    trials = f"all {chosen.trials} settings of its space" if chosen.whole_space else f"{chosen.trials} trials"
    failed = f" ({chosen.failed} failed)" if chosen.failed else ""
    epochs = f"{chosen.epochs} epochs"
    epochs += f" instead of {chosen.own_epochs}" if chosen.epochs != chosen.own_epochs else ""
    return (
        f"tuned with a budget of {chosen.budget}: {trials}{failed} of {epochs} with seed {chosen.seed}, scored by top-1"
        f" after the last epoch on {chosen.holdout:,} held-out training images, never on the test split"
    )


def as_overrides(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """``key=value`` for each of them."""
    return tuple(
        f"{key}={json.dumps(value, separators=(',', ':'), ensure_ascii=False, default=str)}"
        for key, value in settings.items()
    )


def _cell(
    row: Row,
    pair: "TablePair",
    table: "TableFile",
    path: Path,
    configs: Path,
    overrides: tuple[str, ...],
    chosen: "ChosenSettings | None",
    *,
    tuned: bool,
) -> Cell:
    from mdistill.config import Inline

    parts, train = _configuration(row, pair, configs / table.dataset, path)
    inline = bool(table.imports) or not train
    if inline:
        modules = [argument for module in table.imports for argument in ("--import", module)]
        train = ("--cfg", str(path), "--row", row.name, "--pair", pair.name, *modules)
        train += () if tuned else ("--untuned",)
        parts = (*parts, Inline(path, {"imports": list(table.imports)}))
    folders = (path.resolve().parent, *(part.resolve().parent for part in parts if isinstance(part, Path)), Path.cwd())
    own = (*table.set, *row.overrides, *(as_overrides(chosen.settings) if chosen is not None else ()))
    data = pair.sections.get("data") or {}
    return Cell(row, pair.name, parts, train, own, overrides, folders, inline, chosen, data)


def _configuration(
    row: Row, pair: "TablePair", dataset: Path, path: Path
) -> "tuple[tuple[Path | Inline, ...], tuple[str, ...]]":
    """That of a method for a pair; of a method without a teacher, that of the pair's student alone.

    Returns:
        its parts, and the arguments of ``mdistill train`` that name it; none where the table file holds a part of it.

    Raises:
        UserError: there is none.
    """
    from mdistill.config import for_pair

    folder, place = Path(row.method), f"methods: {row.name}"
    if row.settings is None and folder.is_file():
        return (folder,), ("--cfg", row.method)
    if row.settings is None and not pair.sections:
        alone = _student_alone(folder, dataset / "_pairs" / f"{pair.name}.yaml")
        if alone is not None:
            return (alone,), ("--cfg", str(alone))
        try:
            files, _ = for_pair(folder, pair.name)
        except UserError as error:
            raise UserError(f"{path}: pairs: {str(error).removeprefix('--pair: ')}") from None
        return tuple(files), ("--cfg", str(folder), "--pair", pair.name)
    return (*_pair_parts(pair, dataset, path), *_method_parts(row, path, place)), ()


def _student_alone(folder: Path, pair_file: Path) -> Path | None:
    """The file of a pair's student in the folder of a method without a teacher."""
    from mdistill.config.files import read_yaml
    from mdistill.models.names import student_file_name

    if not pair_file.is_file() or (folder / pair_file.name).is_file():
        return None
    student = read_yaml(pair_file).get("student")
    name = student.get("name") if isinstance(student, dict) else None
    alone = folder / student_file_name(name) if isinstance(name, str) else None
    return alone if alone is not None and alone.is_file() else None


def _pair_parts(pair: "TablePair", dataset: Path, path: Path) -> "tuple[Path | Inline, ...]":
    from mdistill.config import Inline

    if pair.sections:
        return dataset / "_recipe.yaml", Inline(path, pair.sections, f"pairs: {pair.name}")
    file = dataset / "_pairs" / f"{pair.name}.yaml"
    if file.is_file():
        return (file,)
    known = sorted(each.stem for each in (dataset / "_pairs").glob("*.yaml"))
    raise UserError(
        f"{path}: pairs: unknown pair {pair.name!r}{suggestion(pair.name, known)} (known: {', '.join(known) or 'none'};"
        " or give it a teacher: and a student:)"
    )


def _method_parts(row: Row, path: Path, place: str) -> "tuple[Path | Inline, ...]":
    """The settings of a method, and that it has no teacher, where it reads none."""
    from mdistill.config import Inline
    from mdistill.config.files import read_tree
    from mdistill.distillers import DISTILLERS

    if row.settings is not None:
        name, part = row.method, Inline(path, {"distiller": {"name": row.method, **row.settings}}, place)
        parts: tuple[Path | Inline, ...] = (part,)
    else:
        base = Path(row.method) / "_method.yaml"
        if not base.is_file():
            raise UserError(f"{path}: {place}: no {base}, which a pair of the table file needs")
        name, parts = str(read_tree(base).get("distiller", {}).get("name")), (base,)
    needs = getattr(DISTILLERS.get(name), "needs", None) if name in DISTILLERS.names() else None
    if needs is not None and needs.teacher == "none":
        parts = (*parts, Inline(path, {"teacher": None}, place))
    return parts


def known_to_table(name: str, known: Sequence[str], flag: str) -> str:
    """``name``, a row or a pair of a table that has those of ``known``.

    Raises:
        UserError: it is none of them.
    """
    if name not in known:
        raise UserError(f"{flag}: unknown {name!r}{suggestion(name, known)} (in this table: {', '.join(known)})")
    return name


def shared_folder(path: Path, one: str, other: str, folder: Path) -> UserError:
    """That two different runs of the table of ``path`` would be one."""
    return UserError(
        f"{path}: {one} and {other} would write the same folder, {folder}; give one of them a name of its own:"
        " set: [variant=NAME]"
    )
