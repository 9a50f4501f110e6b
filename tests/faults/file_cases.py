"""Commands on damaged files: each ends in time, well or with a clean message, and costs the user nothing.

A case is (name, callable): the callable gets a fresh folder and returns None, or what was wrong. The name fixes it.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

import tests.conftest  # noqa: F401  (registers the tiny data set and network)
from mdistill.data import cifar100
from mdistill.data.loader import BatchLoader
from mdistill.models import MODELS
from mdistill.reporting.searching import Journal
from mdistill.reporting.table_files import read_table
from tests import runs
from tests.distillers.examples import SETTINGS
from tests.faults import damage, forked, hostile
from tests.pictures import write_stl10
from tests.same import assert_same

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TABLE = """
title: a search
dataset: quickstart
pairs:
  - name: tiny_tiny
    teacher: {name: tiny_net, checkpoint: teacher.pt}
    student: {name: tiny_net}
    data: {name: tiny, images: 100, batch_size: 50}
    solver: {epochs: 1, milestones: []}
methods:
  - name: KD
    method: kd
    settings: {ce_weight: 1.0, kd_weight: 1.0, temperature: 2.0}
    search: {solver.lr: {low: 0.01, high: 0.1, log: true}}
seeds: [0]
tuned: table.tuned.yaml
"""
CIFAR_IMAGES = {"train": 20, "test": 10}
LIMIT = 20  # seconds for a command
MEMORY = 12 << 30  # bytes of address space for a command
RUN = "tiny/kd/tiny_net_tiny_net/seed0"
Case = Callable[[Path], str | None]

forked._PRELOADED += [
    "tests.faults.file_cases",
    "torchvision",
    "tensorboard.summary.writer.record_writer",
    "torch._dynamo",
]  # by and by imported

_TRAIN = ["train", "--cfg", "kd.yaml", "--checkpoint-root", ".", "--device", "cpu"]
RESUME = (*_TRAIN, "--output", "out", "--resume")
FRESH = (*_TRAIN, "--output", "new", "solver.epochs=1")
SPARSE = (*_TRAIN, "--cfg", "sparse.yaml", "--output", "sparse", "--overwrite", "solver.epochs=1")
DISTANCES = (*_TRAIN, "--cfg", "distances.yaml", "--output", "distances", "--overwrite", "solver.epochs=1")
EVAL = ("eval", "--device", "cpu", "--json")
AUDIT = ("audit", f"done/{RUN}", "--checkpoint-root", ".", "--json")
TUNED = (
    "train",
    "--cfg",
    "table.yaml",
    "--row",
    "KD",
    "--output",
    "tuned",
    "--checkpoint-root",
    ".",
    "--device",
    "cpu",
)
TUNE = ("tune", "table.yaml", "--budget", "3", "--dry-run", "--output", "searched", "--checkpoint-root", ".")
PUBLISH = ("table", "publish", f"done/{RUN}", "--results", "published", "--output", "published")
READING = {"eval", "audit", "transfer", "tune"}  # commands that write nothing
CIFAR = (*EVAL, "--model", "resnet8", "--data", "cifar100", "--data-root", ".", "--weights", "resnet8.pt")
LONE = (*EVAL, "--model", "tiny_net", "--data", "tiny", "--weights")
TRANSFER = ("transfer", "--device", "cpu", "--json", "--model", "tiny_net", "--data", "tiny", "--weights", "teacher.pt")
TO_STL10 = (*TRANSFER, "--target", "stl10", "--data-root", ".", "epochs=1")


# ---- the files, and commands on them -------------------------------------------------------------------------------


@functools.cache
def files() -> Path:
    """A user's folder: a run in ``out`` that was stopped in its second epoch, whole ones in further folders."""
    holder = tempfile.TemporaryDirectory(prefix="mdistill-files-")
    files.holder = holder  # until this process ends
    folder = Path(holder.name)
    runs.write_config(folder)
    content = torch.load(folder / "teacher.pt", weights_only=True)
    damage.save_legacy(folder / "teacher.pth", content)
    save_file(content["model"], folder / "teacher.safetensors")
    _write_cifar(folder)
    write_stl10(folder, 20, 10)
    settings = yaml.safe_load((folder / "kd.yaml").read_text())
    top1 = json.loads(command(folder, [*LONE, "teacher.pth"]).out)["top1"]
    settings["teacher"]["expected_top1"] = top1
    (folder / "kd.yaml").write_text(yaml.safe_dump(settings))
    settings["distiller"]["temperature"] = 1.0
    settings["run"] = {"teacher_logits": "sparse", "teacher_top_k": 3}
    (folder / "sparse.yaml").write_text(yaml.safe_dump(settings))
    del settings["run"]
    settings["distiller"] = {"name": "wkd_l", **SETTINGS["wkd_l"], "epochs": 1}
    (folder / "distances.yaml").write_text(yaml.safe_dump(settings))
    for arguments in ([*_TRAIN, "--output", "done", "solver.epochs=1"], SPARSE, DISTANCES):
        ended = command(folder, arguments)
        assert ended.code == 0, ended
    _write_search(folder)
    ended = command(folder, ["transfer", f"done/{RUN}", *TO_STL10[1:4], *TO_STL10[TO_STL10.index("--target") :]])
    assert ended.code == 0, ended
    ended = command(folder, RESUME, stop_at=8)
    assert ended.code == 75, ended
    return folder


def _write_search(folder: Path) -> None:
    """A table file with a search, the journal of it, and what it has chosen."""
    (folder / "table.yaml").write_text(TABLE)
    (cell,) = read_table(folder / "table.yaml", CONFIGS, tuned=False).cells
    journal = Journal(folder / "searched/.tune/table/journal.log")
    journal.note("KD tiny_tiny", budget=3)
    for number, lr in enumerate((0.05, 0.02)):
        journal.begin("KD tiny_tiny", cell.row.search, number, {"solver.lr": lr})
    journal.end("KD tiny_tiny", 0, 50.0, {"folder": "x"})
    chosen = {"row": "KD", "pair": "tiny_tiny", "settings": {"solver.lr": 0.02}, "own_settings": {"solver.lr": 0.05}}
    chosen |= {"top1": 51.0, "own_top1": 50.0, "trial": 1, "trials": 3, "failed": 0, "budget": 3, "whole_space": False}
    chosen |= {"holdout": 10, "data": "f" * 64, "epochs": 1, "own_epochs": 1, "seed": 0, "sampler": "s", "commit": ""}
    content = {"format": 1, "chosen": [chosen | {"of": cell.of}]}
    (folder / "table.tuned.yaml").write_text(yaml.safe_dump(content))


def _write_cifar(folder: Path) -> None:
    """A few images as CIFAR-100 stores them, and a network for them."""
    inside, generator = folder / "cifar-100-python", np.random.default_rng(0)
    inside.mkdir()
    for name, count in CIFAR_IMAGES.items():
        images = generator.integers(0, 256, (count, 3072)).astype(np.uint8)
        damage.save_pickle(inside / name, {b"data": images, b"fine_labels": [*range(count)], b"batch_label": b"x"})
    damage.save_pickle(inside / "meta", {b"fine_label_names": [b"name"] * 100})
    torch.manual_seed(0)
    torch.save(MODELS.build("resnet8", 100).state_dict(), folder / "resnet8.pt")


def command(folder: Path, arguments: Sequence[str], stop_at: int | None = None) -> forked.Ended:
    """``mdistill`` with ``arguments`` in ``folder``; with SIGTERM in step ``stop_at``."""
    return forked.command(arguments, before=functools.partial(_prepare, folder, stop_at), timeout=LIMIT)


def _prepare(folder: Path, stop_at: int | None) -> None:
    os.chdir(folder)
    os.environ.pop("MDISTILL_CACHE", None)
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is in a terminal
    cifar100.SAMPLES.update(CIFAR_IMAGES)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if stop_at is not None:
        BatchLoader.fetch = runs.stopping_fetch(stop_at)


# ---- what must hold ------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file, but locks and what a cache gains."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def result(folder: Path, arguments: Sequence[str], out: str) -> Any:
    """What a command that ended well has made: figures, or a run's files."""
    if arguments[0] == "eval":
        line = json.loads(out)
        return {key: line[key] for key in ("model", "top1", "top5", "loss", "images")}
    if arguments[0] == "audit":
        return json.loads(out)
    if arguments[0] == "tune":
        return out
    if arguments[0] == "transfer":
        line = json.loads(out)
        return {key: line[key] for key in ("top1", "top5", "loss", "train_top1", "settings", "data")}
    if arguments[0] == "table":
        (published,) = (folder / "published").rglob("config.yaml")
        return {path.name: path.read_text() for path in published.parent.rglob("*.json")}
    run = next((folder / arguments[arguments.index("--output") + 1]).rglob("seed0"))
    states = {name: damage.load_torch(run / f"{name}.pt") for name in ("last", "student")}
    return {"metrics": runs.read_metrics(run), **states}


@functools.cache
def undisturbed(arguments: tuple[str, ...]) -> Any:
    """The result of a command on the files as they were."""
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(shutil.copytree(files(), Path(holder, "files")))
        ended = command(folder, arguments)
        assert ended.code == 0, ended
        return result(folder, arguments, ended.out)


def tolerated(
    folder: Path, arguments: Sequence[str], *, others: bool | None = False, to_mention: str = ""
) -> str | None:
    """Run a command; what was wrong with how it ended, in words.

    Args:
        others: whether the damage may be a valid other state, so that a result may be another one; None: any at all.
        to_mention: a file that is lost, of which a command that ends well should say something.
    """
    before = snapshot(folder)
    started = time.monotonic()
    try:
        ended = command(folder, arguments)
    except AssertionError as error:
        return str(error)
    if arguments[0] == "audit" and ended.code == 1 and not ended.err:  # a verdict
        ended = dataclasses.replace(ended, code=0)
    problems = _unclean(ended)
    after = snapshot(folder)
    changed = [name for name, data in before.items() if after.get(name) != data]
    new = [name for name in after if name not in before]
    if "ran" in after:
        problems.append("CODE OF THE FILE RAN")
    begun = "engine:" in ended.out and ended.code == 1  # a run that began may fail, and has written by then
    allowed = () if arguments[0] in READING else (arguments[arguments.index("--output") + 1] + "/",)
    if ended.code and not begun and changed:
        problems.append(f"refused, but changed {changed}")
    problems += [f"wrote {name}" for name in [*new, *changed] if not name.startswith(allowed or ("ran",))]
    problems += [f"left {name}" for name in new if name.endswith(".tmp")]
    if ended.code == 0 and to_mention not in ended.out + ended.err:
        problems.append(f"{to_mention} was damaged and silently written anew")
    if ended.code == 0 and not problems and others is not None:
        problems += _another_result(folder, arguments, ended.out, others)
    if problems:
        tail = " | ".join(ended.err.splitlines()[-3:])[-600:]
        return f"code {ended.code} after {time.monotonic() - started:.1f} s: {'; '.join(problems)[:600]} <<< {tail}"
    return None


def _unclean(ended: forked.Ended) -> list[str]:
    lines = ended.err.removesuffix("\n").split("\n") if ended.err else []
    problems = []
    if ended.code not in {0, 1, 2}:
        problems.append(f"ended with code {ended.code}")
    if ended.code in {1, 2} and not any(line.startswith("error: ") for line in lines):
        problems.append("no error line")
    odd = [line for line in lines if not line.startswith(("error: ", "warning: ", "note: "))]
    problems += [f"line {odd[0][:200]!r} and {len(odd) - 1} more on stderr"] if odd else []
    problems += ["Traceback"] if "Traceback" in ended.err + ended.out else []
    problems += [f"{len(lines)} lines on stderr"] if len(lines) > 12 else []
    for name, text in (("stderr", ended.err), ("stdout", ended.out)):
        longest = max(map(len, text.split("\n")))
        problems += [f"a line of {longest:,} characters on {name}"] if longest > 1000 else []
        odd = [line for line in text.split("\n") if not line.isprintable()]
        problems += [f"unprintable characters on {name}: {odd[0][:200]!r}"] if odd else []
    return problems


def _another_result(folder: Path, arguments: Sequence[str], out: str, others: bool) -> list[str]:
    wanted = undisturbed(tuple(arguments))
    try:
        found = result(folder, arguments, out)
    except Exception as error:
        return [f"accepted, but its result is broken: {type(error).__name__}: {str(error)[:200]}"]
    if others:
        return [] if arguments[0] in {*READING, "table"} else _unsound(found, wanted)
    try:
        assert_same(wanted, found, ignore={"config"})
    except AssertionError as error:
        return [f"accepted, but another result: {str(error)[:200]}"]
    return []


def _unsound(found: Any, wanted: Any) -> list[str]:
    """How a run that may differ from the undisturbed one is no run at all."""
    problems = []
    if [line.get("epoch") for line in found["metrics"]] != [line["epoch"] for line in wanted["metrics"]]:
        problems.append(f"metrics of epochs {[line.get('epoch') for line in found['metrics']]}")
    for name in ("last", "student"):
        shapes = [
            {key: (value.shape, value.dtype, value.layout) for key, value in each[name]["model"].items()}
            for each in (found, wanted)
        ]
        if shapes[0] != shapes[1]:
            problems.append(f"shapes or dtypes in {name}.pt")
    if found["last"]["progress"]["epoch"] != wanted["last"]["progress"]["epoch"]:
        problems.append(f"last.pt says {str(found['last']['progress'])[:200]}")
    return problems


# ---- damaged files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A file, what reads it, and which damage to it may be a valid other state."""

    name: str
    path: str
    arguments: tuple[str, ...]
    load: Callable[[Path], Any] | None = None
    save: Callable[[Path, Any], None] | None = None
    valid: frozenset[str] = frozenset()

    @property
    def damages(self) -> list[str]:
        """By name."""
        nested = [*damage.NESTS] if self.load else []
        tensors = [f"tensor_{how}" for how in damage.TENSORS] if self.load is damage.load_torch else []
        states = [*damage.STATES] * 3 if self.name == "last" else []
        values = [*damage.VALUES] * 2 if self.load is damage.load_torch else []
        images = [*damage.IMAGES] * 2 if self.path.endswith(("/train", "/test")) else []
        return [*damage.BYTES, *nested, *tensors, *states, *values, *images]

    def harm(self, folder: Path, how: str, rng: Random) -> None:
        """Damage the file in ``folder``."""
        path = folder / self.path
        if how in damage.BYTES:
            path.write_bytes(damage.BYTES[how](path.read_bytes(), rng))
            return
        assert self.load is not None
        assert self.save is not None
        content = self.load(path)
        if how.startswith("tensor_"):
            damage.change_tensor(content, rng, how.removeprefix("tensor_"))
        else:
            _NESTED[how](content, rng)
        _keep_own_arguments(content)
        self.save(path, content)


def _keep_own_arguments(content: Any) -> None:
    """Put back what the data set and network of the tests take, which check nothing."""
    for section, arguments in {"data": {"images": 100, "classes": 10}, "student": {"width": 16}}.items():
        given = content.get(section) if isinstance(content, dict) else None
        if isinstance(given, dict) and given.get("name") in {"tiny", "tiny_net"}:
            given.update({key: value for key, value in arguments.items() if key in given})


_TORCH = (damage.load_torch, damage.save_torch)
_LEGACY = (damage.load_torch, damage.save_legacy)
_YAML = (damage.load_yaml, damage.save_yaml)
_JSON = (damage.load_json, damage.save_json)
_LINES = (damage.load_lines, damage.save_lines)
_PICKLE = (damage.load_pickle, damage.save_pickle)
_NESTED = damage.NESTS | damage.STATES | damage.VALUES | damage.IMAGES
_VALUES = frozenset({*_NESTED, *(f"tensor_{how}" for how in damage.TENSORS)})
_ANY = _VALUES | set(damage.BYTES)  # of files without checksums
_CHUNK, _DISTANCES = "*.safetensors", "class_distances/*.safetensors"  # the first such file of a run

TARGETS = [
    Target("last", f"out/{RUN}/last.pt", RESUME, *_TORCH, _VALUES),
    Target("metrics", f"out/{RUN}/metrics.jsonl", RESUME, *_LINES, _ANY),
    Target("env", f"out/{RUN}/env.json", RESUME, *_JSON),
    Target("config_resume", f"out/{RUN}/config.yaml", RESUME, *_YAML),
    Target("teachers", "out/teachers.json", RESUME, *_JSON),
    Target("chunk", _CHUNK, RESUME, damage.load_safetensors, damage.save_safetensors),
    Target("sparse_chunk", _CHUNK, SPARSE, damage.load_safetensors, damage.save_safetensors),
    Target("distances", _DISTANCES, DISTANCES, damage.load_safetensors, damage.save_safetensors),
    Target("teacher_zip", "teacher.pt", FRESH, *_TORCH, _VALUES),
    Target("teacher_legacy", "teacher.pth", (*FRESH, "teacher.checkpoint=teacher.pth"), *_LEGACY, _ANY),
    Target(
        "teacher_safetensors",
        "teacher.safetensors",
        (*FRESH, "teacher.checkpoint=teacher.safetensors"),
        damage.load_safetensors,
        damage.save_safetensors,
        _ANY,
    ),
    Target("teacher_student", f"done/{RUN}/student.pt", (*FRESH, f"teacher.checkpoint=done/{RUN}"), *_TORCH, _VALUES),
    Target("eval_student", f"done/{RUN}/student.pt", (*EVAL, f"done/{RUN}"), *_TORCH, _VALUES),
    Target("eval_last", f"done/{RUN}/last.pt", (*EVAL, f"done/{RUN}/last.pt"), *_TORCH, _VALUES),
    Target("eval_legacy", "teacher.pth", (*LONE, "teacher.pth"), *_LEGACY, _ANY),
    Target("eval_config", f"done/{RUN}/config.yaml", (*EVAL, f"done/{RUN}"), *_YAML, _ANY),
    Target("eval_env", f"done/{RUN}/env.json", (*EVAL, f"done/{RUN}"), *_JSON),
    Target("audit_metrics", f"done/{RUN}/metrics.jsonl", AUDIT, *_LINES, _ANY),
    Target("audit_config", f"done/{RUN}/config.yaml", AUDIT, *_YAML, _ANY),
    Target("audit_env", f"done/{RUN}/env.json", AUDIT, *_JSON, _ANY),
    Target("tuned", "table.tuned.yaml", TUNED, *_YAML, _ANY),
    Target("journal", "searched/.tune/table/journal.log", TUNE, *_LINES, _ANY),
    Target("transfer", f"done/{RUN}/transfer/stl10.json", PUBLISH, *_JSON, _ANY),
    Target("stl10_images", "stl10_binary/train_X.bin", TO_STL10, valid=_ANY),
    Target("stl10_labels", "stl10_binary/train_y.bin", TO_STL10, valid=_ANY),
    Target("cfg", "kd.yaml", FRESH, *_YAML, _ANY),
    *(Target(f"cifar_{name}", f"cifar-100-python/{name}", CIFAR, *_PICKLE, _ANY) for name in ("train", "test", "meta")),
]


def damaged(folder: Path, target: Target, how: str, seed: str) -> str | None:
    """One command on one damaged file."""
    here = Path(shutil.copytree(files(), folder / "files"))
    if target.path in {_CHUNK, _DISTANCES}:
        output = target.arguments[target.arguments.index("--output") + 1]
        chunk = next((here / output).rglob(target.path)).relative_to(here)
        target = Target(**(vars(target) | {"path": str(chunk)}))
    for attempt in range(9):
        with contextlib.suppress(Exception):  # such damage as no file of the kind can hold: another of its kind
            target.harm(here, how, Random(f"{seed} {attempt}"))
            break
    forgotten = target.name == "env" and not _sessions(here / target.path)
    return tolerated(here, target.arguments, others=how in target.valid, to_mention="env.json" if forgotten else "")


def _sessions(path: Path) -> bool:
    """Whether a file says as much of a run's sessions as ``env.json`` should."""
    try:
        sessions = damage.load_json(path)["sessions"]
        return isinstance(sessions, list) and all(isinstance(session, dict) for session in sessions)
    except Exception:
        return False


def damage_cases(seed: int) -> Iterator[tuple[str, Case]]:
    """Every damage to every file, over and over, each time another."""
    for round_ in itertools.count():
        for target in TARGETS:
            for number, how in enumerate(target.damages):
                name = f"{target.name}/{how}/{seed}.{round_}.{number}"
                yield name, functools.partial(damaged, target=target, how=how, seed=name)


def cases(seed: int = 0, count: int = 600) -> Iterator[tuple[str, Case]]:
    """So many cases: hostile files, each once, in turn with damage; about 2,500 hold all of the former."""
    return itertools.islice(_all(seed), count)


def _all(seed: int) -> Iterator[tuple[str, Case]]:
    hostile_ones, damages = list(hostile_cases()), damage_cases(seed)
    Random(seed).shuffle(hostile_ones)
    pairs = zip(hostile_ones, damages, strict=False)
    return itertools.chain(itertools.chain.from_iterable(pairs), damages)


# ---- hostile files -------------------------------------------------------------------------------------------------


def replaced(folder: Path, path: str, data: Callable[[], bytes], arguments: tuple[str, ...]) -> str | None:
    """A command where a file has another content."""
    here = Path(shutil.copytree(files(), folder / "files"))
    (here / path).write_bytes(data())
    return tolerated(here, arguments, others=None if path.endswith(".yaml") else True)


def planted(folder: Path) -> str | None:
    """A module in a run folder whose configuration names it: evaluating the run does not import it."""
    here = Path(shutil.copytree(files(), folder / "files"))
    run = here / "done" / RUN
    (run / "planted.py").write_text("open('ran', 'w')\n")
    content = damage.load_yaml(run / "config.yaml") | {"imports": ["planted"]}
    damage.save_yaml(run / "config.yaml", content)
    return tolerated(here, (*EVAL, f"done/{RUN}"), others=True)


def overridden(folder: Path, text: str) -> str | None:
    """A command with one more argument."""
    here = Path(shutil.copytree(files(), folder / "files"))
    return tolerated(here, (*FRESH, text), others=None)


def hostile_cases() -> Iterator[tuple[str, Case]]:
    """What nobody wrote by accident; the same for every seed."""
    readers = (
        ("eval", "teacher.pth", (*LONE, "teacher.pth")),
        ("last", f"out/{RUN}/last.pt", RESUME),
        ("teacher", "teacher.pt", FRESH),
    )
    for (reader, path, arguments), (name, data) in itertools.product(readers, hostile.PICKLES.items()):
        for form in (hostile.legacy, hostile.archive):
            make = functools.partial(form, data)
            case = functools.partial(replaced, path=path, data=make, arguments=arguments)
            yield f"pickle/{reader}/{form.__name__}/{name}", case
    for (reader, path, arguments), (name, archive) in itertools.product(readers, hostile.ARCHIVES.items()):
        case = functools.partial(replaced, path=path, data=archive, arguments=arguments)
        yield f"archive/{reader}/{name}", case
    for name, data in hostile.PICKLES.items():
        make = functools.partial(bytes, data)
        yield (
            f"pickle/cifar/{name}",
            functools.partial(replaced, path="cifar-100-python/train", data=make, arguments=CIFAR),
        )
    for name, text in hostile.VALUES.items():
        yield f"override/value/{name}", functools.partial(overridden, text=f"seed={text}")
        yield f"override/section/{name}", functools.partial(overridden, text=f"student={text}")
    for name, text in hostile.OVERRIDES.items():
        yield f"override/{name}", functools.partial(overridden, text=text)
    for reader, path, arguments in (
        ("cfg", "kd.yaml", FRESH),
        ("eval", f"done/{RUN}/config.yaml", (*EVAL, f"done/{RUN}")),
        ("tuned", "table.tuned.yaml", TUNED),
    ):
        for name, data in _texts().items():
            make = functools.partial(bytes, data)
            yield f"yaml/{reader}/{name}", functools.partial(replaced, path=path, data=make, arguments=arguments)
    for reader, path, arguments in (
        ("journal", "searched/.tune/table/journal.log", TUNE),
        ("env", f"out/{RUN}/env.json", RESUME),
        ("eval_env", f"done/{RUN}/env.json", (*EVAL, f"done/{RUN}")),
        ("metrics", f"out/{RUN}/metrics.jsonl", RESUME),
        ("teachers", "out/teachers.json", RESUME),
        ("audit_env", f"done/{RUN}/env.json", AUDIT),
        ("audit_metrics", f"done/{RUN}/metrics.jsonl", AUDIT),
        ("transfer", f"done/{RUN}/transfer/stl10.json", PUBLISH),
    ):
        for name, data in hostile.JSON.items():
            make = functools.partial(bytes, data)
            yield f"json/{reader}/{name}", functools.partial(replaced, path=path, data=make, arguments=arguments)
    yield "planted_module", planted


def _texts() -> dict[str, bytes]:
    """Whole files; and files with one value more, at the end and in place of a section."""
    whole = "data: {{name: tiny, images: 100, batch_size: {}}}\nstudent: {}\n"
    values = {
        f"{place}_{name}": whole.format(*(text if at == place else "{name: tiny_net}" for at in ("number", "section")))
        for name, text in hostile.VALUES.items()
        for place in ("number", "section")
    }
    return hostile.TEXTS | {name: text.encode("utf-8", "surrogatepass") for name, text in values.items()}
