"""Reading and writing the weights of a network.

A checkpoint is a state dict, bare or under ``"model"``, as the published distillation projects write it: with the
prefix of a DataParallel network (``module.``) or of a whole distiller (``module.student.``, ``teacher.``, ...), beside
an optimizer's state, accuracies as tensors or NumPy scalars and the command line's options.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mdistill.errors import RunFailed, UserError, printable, shown, suggestion
from mdistill.files import atomic_write
from mdistill.models.base import MODELS
from mdistill.models.torch_files import FileRecord, file_record, read_file

Role = Literal["student", "teacher"]

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]

COUNTER = "num_batches_tracked"  # of BatchNorm; files from before PyTorch 0.4.1 have none
MAX_UNFOLDED = 1 << 30  # bytes of a tensor that has less memory than values


def read_checkpoint(path: Path, role: Role = "student", *, keys: Collection[str] = ()) -> dict[str, Tensor]:
    """The bare state dict of one network, on the CPU.

    Args:
        path: a checkpoint, or a run folder, whose ``student.pt`` it then is.
        role: which network of a whole distiller's checkpoint; one that has no teacher was trained without, and gives
            its student for either.
        keys: those of the network; a file that has exactly these holds it as it is, whatever they begin with.

    Raises:
        UserError: no such file; truncated or damaged; not a checkpoint; names code (none of which is run); holds no
            network; holds NaN or infinite weights.
    """
    file = _file(path)
    state = _state_dict(read_file(file), file)
    if state.keys() != set(keys):
        state = _network(state, role, file)
    odd = next((key for key, value in state.items() if _is_odd(value)), None)
    if odd is not None:
        raise UserError(
            f"checkpoint {file}: {printable(odd)} is no plain tensor (sparse, quantised, on no device, of too many"
            " dimensions, or a view of far less memory)"
        )
    broken = _first_non_finite(state)
    if broken:
        raise UserError(f"checkpoint {file}: {printable(broken)} holds NaN or infinite values")
    return state


@dataclass(frozen=True)
class Outputs:
    """Which of a file's outputs are the classes of a data set."""

    rows: tuple[int, ...]  # of each class
    total: int  # how many outputs there are
    section: str  # of the configuration that says so, for messages


def load_weights(
    model: nn.Module,
    path: Path,
    *,
    name: str,
    role: Role = "student",
    convert: Convert | None = None,
    outputs: Outputs | None = None,
    new_classifier: bool = False,
) -> FileRecord:
    """Load a checkpoint into ``model``, every key and shape of which must agree.

    BatchNorm's counters of batches may be missing; they are then 0, and the record says so.

    Args:
        name: the model's name, for messages.
        convert: what the file holds into a state dict of ``model``.
        outputs: the classifier's rows to take.
        new_classifier: where the file's classes are of another number, leave the classifier of ``model`` as it is.

    Returns:
        which file it was.

    Raises:
        UserError: as ``read_checkpoint``; or the weights are another network's, which is then named, or were trained
            for another number of classes.
    """
    file, wanted, notes = _file(path), model.state_dict(), list[str]()
    state = read_checkpoint(path, role, keys=wanted)
    if convert is not None:
        try:
            state = convert(state)
        except (RuntimeError, ValueError, KeyError, AssertionError) as error:
            reason = printable(" ".join(str(error).split()), 200)
            raise UserError(f"checkpoint {file}: it does not fit {name}: {reason}") from error
    counters = _missing_counters(state, wanted)
    if counters:
        state |= {key: torch.zeros_like(wanted[key]) for key in counters}
        notes.append(f"has no {COUNTER}, as files of old versions of PyTorch; {len(counters)} are set to 0")
    if outputs is not None:
        state |= _selected(state, model, outputs, file)
    if new_classifier and _other_classes(state, wanted):
        notes.append(
            f"was trained for {_num_classes(state)} classes, the data set has {_num_classes(wanted)}: the classifier"
            " starts anew"
        )
        state |= {key: wanted[key] for key in _of_other_shape(state, wanted)}
    problem = _mismatch(state, wanted, name)
    if problem:
        hint = "; teacher.classes says which of them they are" if role == "teacher" and "trained for" in problem else ""
        raise UserError(f"checkpoint {file}: {problem}{hint}")
    model.load_state_dict(state, strict=True)
    return replace(file_record(file), notes=tuple(notes))


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write ``{"model": state}`` to ``path``, all or nothing.

    Raises:
        RunFailed: a value is not finite (nothing is written), the disk is full or the folder is not writable.
    """
    broken = _first_non_finite(state)
    if broken:
        raise RunFailed(f"refused to write {path}: {broken} holds NaN or infinite values")
    on_cpu = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:  # by name, the file would hold that name
        torch.save({"model": on_cpu}, file)


def tensor_misfit(place: str, saved: Any, live: Tensor) -> str | None:
    """Why ``saved`` cannot go where ``live`` is: no plain tensor, another shape or another type; None if it can."""
    if not isinstance(saved, Tensor):
        return f"{place} is {shown(saved, 60)}, not a tensor"
    if saved.layout != torch.strided or saved.is_quantized or saved.device.type != "cpu":
        return f"{place} is a tensor without plain values (sparse, quantised or on no device)"
    if saved.shape != live.shape or saved.dtype != live.dtype:
        return f"{place} is {tuple(saved.shape)} in {saved.dtype}, not {tuple(live.shape)} in {live.dtype}"
    return None


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of every key, dtype, shape and value; the order of the keys and the device do not matter."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- finding the file and the network ---


def _file(path: Path) -> Path:
    try:
        return _existing_file(path)
    except OSError as error:  # such as a folder that may not be read
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error


def _existing_file(path: Path) -> Path:
    file = path / "student.pt" if path.is_dir() else path
    if file.is_file():
        return file
    if path.is_dir():
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8])
        raise UserError(f"checkpoint {path} is a folder without student.pt (it holds: {inside or 'nothing'})")
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    near = suggestion(
        missing.name, [entry.name for entry in missing.parent.iterdir()] if missing.parent.is_dir() else []
    )
    where = "" if missing == path else f" (there is no {missing})"
    raise UserError(f"checkpoint {path} does not exist{where}{near}")


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    if isinstance(content, Tensor):
        raise UserError(f"checkpoint {file} holds one tensor of shape {tuple(content.shape)}, not a state dict")
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {file} holds a {type(content).__name__}, not a state dict")
    place = "under 'model'" if "model" in content else "in it"
    state = content.get("model", content)
    if not isinstance(state, Mapping):
        raise UserError(f"checkpoint {file} holds a {type(state).__name__} under 'model', not a state dict")
    foreign = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if foreign or not state:
        keys = ", ".join([printable(key) for key in [*state][:8]]) or "none"
        raise UserError(
            f"checkpoint {file} holds no weights: {len(foreign)} of the {len(state)} entries {place} are not tensors"
            f" (keys: {keys}; needed: a state dict, bare or under 'model')"
        )
    return {key: value.detach() for key, value in state.items()}


def _is_odd(value: Tensor) -> bool:
    """Whether reading its values may fail: no network's weights are like that."""
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu" or value.ndim > 16:
        return True
    size = value.numel() * value.element_size()
    return size > max(value.untyped_storage().nbytes(), MAX_UNFOLDED)  # of one value, expanded


def _network(state: dict[str, Tensor], role: Role, file: Path) -> dict[str, Tensor]:
    """One network's part of ``state``, without prefix."""
    networks = {name: _below(f"module.{name}.", state) or _below(f"{name}.", state) for name in ("student", "teacher")}
    if networks[role] or networks["student"]:
        return networks[role] or networks["student"]
    if networks["teacher"]:
        raise UserError(f"checkpoint {file} holds a teacher but no student")
    whole = _below("module.", state)
    return whole if len(whole) == len(state) else state


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _first_non_finite(state: Mapping[str, Tensor]) -> str | None:
    return next((key for key, value in state.items() if not bool(torch.isfinite(value).all())), None)


# --- what may differ ---


def _missing_counters(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The counters of BatchNorm that ``state`` lacks beside statistics that it has."""
    beside = {key: key.removesuffix(COUNTER) + "running_mean" for key in wanted if key.endswith(COUNTER)}
    return [key for key, statistics in beside.items() if key not in state and statistics in state]


def _selected(state: Mapping[str, Tensor], model: nn.Module, outputs: Outputs, file: Path) -> dict[str, Tensor]:
    """The rows of the classifier's weights that ``outputs`` names.

    The classifier is ``model.classifier``, and whatever has as many rows more or less than the model's as it.
    """
    layer, wanted = getattr(model, "classifier", None), model.state_dict()
    own = {id(parameter) for parameter in layer.parameters()} if isinstance(layer, nn.Linear) else set()
    keys = {key for key, parameter in model.named_parameters() if id(parameter) in own and key in state}
    keys |= {key for key in _of_other_shape(state, wanted) if state[key].shape[1:] == wanted[key].shape[1:]}
    identity = outputs.rows == tuple(range(outputs.total))
    if not keys and not identity:
        raise UserError(f"{outputs.section}.classes: {type(model).__name__} does not say which layer is its classifier")
    odd = next((key for key in sorted(keys) if state[key].shape[0] != outputs.total), None)
    if odd is not None:
        raise UserError(
            f"{outputs.section}.classes: it names {outputs.total:,} classes, the weights {file} have"
            f" {state[odd].shape[0]:,} ({odd})"
        )
    return {key: state[key][list(outputs.rows)] for key in keys}


def _of_other_shape(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    return [key for key in wanted if key in state and state[key].shape != wanted[key].shape]


def _other_classes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether all that differs is the number of classes."""
    classes, wanted_classes, other = _num_classes(state), _num_classes(wanted), _of_other_shape(state, wanted)
    return (
        state.keys() == wanted.keys()
        and bool(other)
        and all(
            (state[key].shape[:1], wanted[key].shape[:1]) == ((classes,), (wanted_classes,))
            and state[key].shape[1:] == wanted[key].shape[1:]
            for key in other
        )
    )


# --- comparing with a model ---


def _mismatch(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> str | None:
    """Why ``state`` does not load into model ``name``, whose state is ``wanted``, in one line; None if nothing."""
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    other = _of_other_shape(state, wanted)
    if not (missing or unexpected or other):
        kinds = (key for key in wanted if _kind(state[key]) != _kind(wanted[key]))
        odd = next(kinds, None)
        return None if odd is None else f"{odd} is in {state[odd].dtype}, not in {wanted[odd].dtype}"
    classes, wanted_classes = _num_classes(state), _num_classes(wanted)
    if _other_classes(state, wanted):
        return f"{name} was trained for {classes} classes, the data set has {wanted_classes}"
    details = []
    if missing:
        details.append(f"{len(missing)} missing, first {printable(missing[0])}")
    if unexpected:
        details.append(f"{len(unexpected)} unexpected, first {printable(unexpected[0])}")
    if other:
        key = other[0]
        details.append(
            f"{len(other)} of another shape, first {key}: {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
        )
    counts = f"keys: {'; '.join(details)}"
    holds = _identify(state)
    if holds:
        return f"it holds {holds} with {classes} classes, not {name} with {wanted_classes} classes; {counts}"
    return f"it does not fit {name}, nor any other known model; {counts}"


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _num_classes(state: Mapping[str, Tensor]) -> int:
    """Rows of the last matrix, which is the classifier's weight; 0 if there is none."""
    return next((value.shape[0] for value in reversed(list(state.values())) if value.ndim == 2), 0)


def _identify(state: Mapping[str, Tensor]) -> str | None:
    """The registered model that has exactly these keys and shapes."""
    classes = _num_classes(state)
    if not classes:
        return None
    shapes = {key: value.shape for key, value in state.items()}
    for name in MODELS.names():
        try:
            with torch.device("meta"):
                candidate = MODELS.build(name, classes)
        except Exception:  # a model that needs more than a number of classes cannot be tried
            continue
        if {key: value.shape for key, value in candidate.state_dict().items()} == shapes:
            return name
    return None
