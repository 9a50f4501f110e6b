"""Reading and writing the weights of a network.

A checkpoint is a state dict, bare or under ``"model"``, as the published distillation projects write it: with the
prefix of a DataParallel network (``module.``) or of a whole distiller (``module.student.``, ``teacher.``, ...), beside
an optimizer's state, accuracies as tensors or NumPy scalars and the command line's options. Nothing of a file is ever
executed: it is read with ``weights_only=True``, and what is neither tensor nor plain data is dropped or refused.
Damage is found by the checksums of a zip archive; the format before it has none, there only truncation shows.
"""

import hashlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mdistill.errors import RunFailed, UserError, shown, suggestion
from mdistill.files import atomic_write
from mdistill.models.base import MODELS

Role = Literal["student", "teacher"]


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
    broken = _first_non_finite(state)
    if broken:
        raise UserError(f"checkpoint {file}: {broken} holds NaN or infinite values")
    return state


def load_weights(model: nn.Module, path: Path, *, name: str, role: Role = "student") -> None:
    """Load a checkpoint into ``model``, every key and shape of which must agree.

    Args:
        name: the model's name, for messages.

    Raises:
        UserError: as ``read_checkpoint``; or the weights are another network's, which is then named, or were trained
            for another number of classes.
    """
    state = read_checkpoint(path, role, keys=model.state_dict())
    problem = _mismatch(state, model.state_dict(), name)
    if problem:
        raise UserError(f"checkpoint {_file(path)}: {problem}")
    model.load_state_dict(state, strict=True)


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


# --- reading a file ---


class _Ignored:
    """Stands for what lies beside the weights: takes any arguments and stores nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


# All that a file may name beyond torch's own tensors and containers. NumPy 1 and 2 pickle a scalar under two names.
_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    (_Ignored, "numpy.dtype"),
    (_Ignored, "argparse.Namespace"),
]


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


def read_file(file: Path) -> Any:
    """What ``torch.save`` wrote: tensors and plain data, on the CPU; nothing in the file is run.

    Raises:
        UserError: unreadable, truncated, damaged, or it names code.
    """
    try:
        with open(file, "rb") as opened:
            head = opened.read(512)
    except OSError as error:
        raise UserError(f"checkpoint {file} cannot be read: {error.strerror}") from error
    if not head:
        raise UserError(f"checkpoint {file} is empty (0 bytes)")
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on odd pickles end up in the error
            content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a file that is no checkpoint can fail in any way
        raise UserError(f"checkpoint {file} {_why_unreadable(file, head, str(error))}") from error
    damage = _zip_damage(file) if head.startswith(b"PK") else None
    if damage:
        raise UserError(f"checkpoint {file} is damaged: {damage}")
    return content


def _zip_damage(file: Path) -> str | None:
    """What is wrong with a zip archive, by its checksums, which torch itself does not compare; None if nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            member = archive.testzip()
    except Exception as error:  # damage can fail in any way
        return f"{type(error).__name__}: {error}"
    return f"the checksum of {member} in it does not fit" if member else None


_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # starts what torch wrote before it wrote zip archives


def _why_unreadable(file: Path, head: bytes, error: str) -> str:
    refused = _refused_global(file, error)
    if refused:
        return f"was refused and nothing of it was run: it names {refused!r}, which is code, not weights"
    size = f"{file.stat().st_size:,} bytes"
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(file):
            return f"is truncated: its {size} lack the end of the archive"
        damage = _zip_damage(file)
        if damage:
            return f"is damaged: {damage}"
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
        if any(member.endswith("constants.pkl") for member in members):
            return "is a TorchScript program, not a state dict"
        if not any(member.endswith("data.pkl") for member in members):
            return f"is a zip archive, not a torch checkpoint (it holds: {', '.join(members[:4])})"
        return f"cannot be read: {error.splitlines()[0]}"
    if head.startswith(_LEGACY_MAGIC):
        return f"is truncated or damaged ({size})"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it and name a file in it, such as resnet32x4_vanilla/ckpt_epoch_240.pth"
    return f"is not a torch checkpoint: it starts with {head[:16]!r}"


def _refused_global(file: Path, error: str) -> str | None:
    """The function or class that made torch refuse a pickle: from its message, else the first that looks foreign."""
    named = re.search(r"GLOBAL ([A-Za-z_][\w.]*)(?: |$)", error)
    if named:
        return named.group(1)
    pickles = []
    with suppress(Exception), zipfile.ZipFile(file) as archive:  # no archive, or a damaged one
        pickles = [archive.read(member) for member in archive.namelist() if member.endswith("data.pkl")]
    with open(file, "rb") as opened:
        pickles = pickles or [opened.read(1_000_000)]
    harmless = ("torch.", "collections.OrderedDict", "numpy.", "_codecs.encode", "argparse.Namespace")
    names = (name for data in pickles for name in _globals(data) if not name.startswith(harmless))
    return next((name for name in names if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name)), None)


def _globals(data: bytes) -> Iterator[str]:
    """What a pickle names, read off without running it."""
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif isinstance(argument, str):
                texts.append(argument)
    except Exception:  # damaged, or no pickle: the names so far are all there are
        return


# --- finding the network ---


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    if isinstance(content, Tensor):
        raise UserError(f"checkpoint {file} holds one tensor of shape {tuple(content.shape)}, not a state dict")
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {file} holds a {type(content).__name__}, not a state dict")
    place = "under 'model'" if "model" in content else "in it"
    state = content.get("model", content)
    if not isinstance(state, Mapping):
        raise UserError(f"checkpoint {file} holds a {type(state).__name__} under 'model', not a state dict")
    foreign = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if foreign or not state:
        keys = ", ".join([str(key) for key in state][:8]) or "none"
        raise UserError(
            f"checkpoint {file} holds no weights: {len(foreign)} of the {len(state)} entries {place} are not tensors"
            f" (keys: {keys}; needed: a state dict, bare or under 'model')"
        )
    return {key: value.detach() for key, value in state.items()}


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


# --- comparing with a model ---


def _mismatch(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> str | None:
    """Why ``state`` does not load into model ``name``, whose state is ``wanted``, in one line; None if nothing."""
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    other = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if not (missing or unexpected or other):
        return None
    classes, wanted_classes = _num_classes(state), _num_classes(wanted)
    if not (missing or unexpected) and all(
        (state[key].shape[:1], wanted[key].shape[:1]) == ((classes,), (wanted_classes,))
        and state[key].shape[1:] == wanted[key].shape[1:]
        for key in other
    ):
        return f"{name} was trained for {classes} classes, the data set has {wanted_classes}"
    details = []
    if missing:
        details.append(f"{len(missing)} missing, first {missing[0]}")
    if unexpected:
        details.append(f"{len(unexpected)} unexpected, first {unexpected[0]}")
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


def _num_classes(state: Mapping[str, Tensor]) -> int:
    """Rows of the last matrix, which is the classifier's weight; 0 if there is none."""
    return next((value.shape[0] for value in reversed(list(state.values())) if value.ndim == 2), 0)


def _identify(state: Mapping[str, Tensor]) -> str | None:
    """The registered model that has exactly these keys and shapes."""
    classes = _num_classes(state)
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
