"""Damage to files, as named functions of a seeded ``random.Random``: of their bytes, or of what was read from them.

damaged = BYTES["flip_bits"](data, random.Random(3))             # bytes in, bytes out
NESTS["delete_key"](content, random.Random(3))                   # containers, changed in place
"""

import argparse
import copy
import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

# ---- of bytes ------------------------------------------------------------------------------------------------------


def flip_bits(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 8, 200])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: Random) -> bytes:
    start, end = _range(data, rng)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice([1, len(data) // 2, len(data) - 1, rng.randrange(len(data))])]


def append(data: bytes, rng: Random) -> bytes:
    return data + rng.choice([b"\0", b"\n", b"{", b"\xff" * 600, data, rng.randbytes(5000)])


def duplicate_range(data: bytes, rng: Random) -> bytes:
    start, end = _range(data, rng)
    return data[:end] + data[start:end] + data[end:]


def swap_ranges(data: bytes, rng: Random) -> bytes:
    a, b, c, d = sorted(rng.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def empty(data: bytes, rng: Random) -> bytes:
    return b""


def zeros(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.3:
        return bytes(len(data))
    start, end = _range(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def _range(data: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice([1, 16, 300, 5000]))


BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    function.__name__: function
    for function in (flip_bits, overwrite, truncate, append, duplicate_range, swap_ranges, empty, zeros)
}

# ---- of nested containers ------------------------------------------------------------------------------------------

DEEP = "@a list of 100,000 lists@"  # stands for it until the text is written; no library writes one
ABSURD: tuple[Any, ...] = (
    *(None, True, "", "x" * 200_000, "\ud800", "nul\0 and \x1b[2J", "a\nb", -1, 0, 2**63, 2**70, 10**400),
    *(-0.5, 1e308, float("nan"), float("inf"), [], {}, {"": None}, [[]] * 50, "nested", DEEP),
)


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def absurd(rng: Random) -> Any:
    """A value that belongs nowhere."""
    value = rng.choice(ABSURD)
    return nested(rng.choice([30, 150])) if value == "nested" else copy.deepcopy(value)


def place(content: Any, rng: Random, wanted: type = object) -> tuple[Any, Any]:
    """A container somewhere in ``content`` and a key of it, whose value is of the type ``wanted``."""
    found = [(box, key) for box, key in _places(content) if isinstance(box[key], wanted)]
    depths = {}
    for box, key in found:
        depths.setdefault(id(box), []).append((box, key))
    return rng.choice(rng.choice(list(depths.values())))  # each container as likely, however full


def _places(content: Any) -> list[tuple[Any, Any]]:
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [pair for key in keys for pair in ((content, key), *_places(content[key]))]


def delete_key(content: Any, rng: Random) -> None:
    box, key = place(content, rng)
    del box[key]


def add_key(content: Any, rng: Random) -> None:
    box, _ = place(content, rng)
    name = rng.choice(["further", "", "__class__", "x" * 3000, "a.b", "new\nline", "base", "imports", "self"])
    box.update({name: absurd(rng)}) if isinstance(box, dict) else box.insert(0, absurd(rng))


def rename_key(content: Any, rng: Random) -> None:
    box, key = place(content, rng)
    if isinstance(box, dict):
        new = rng.choice([f"{key}x", "", 7, None, str(key).upper(), "x" * 3000, True])
        box[new] = box.pop(key)
    else:
        box[key] = {str(key): box[key]}


def replace_value(content: Any, rng: Random) -> None:
    box, key = place(content, rng)
    box[key] = absurd(rng)


def swap_values(content: Any, rng: Random) -> None:
    (one, a), (other, b) = place(content, rng), place(content, rng)
    one[a], other[b] = copy.deepcopy(other[b]), copy.deepcopy(one[a])


NESTS: dict[str, Callable[[Any, Random], None]] = {
    function.__name__: function for function in (delete_key, add_key, rename_key, replace_value, swap_values)
}

# ---- of tensors ----------------------------------------------------------------------------------------------------


def _quantised(value: Tensor) -> Tensor:
    return torch.quantize_per_tensor(value.detach().float(), 0.1, 0, torch.qint8)


def _other_shape(value: Tensor, rng: Random) -> Tensor:
    return rng.choice([value[None], value.reshape(-1), torch.zeros(3, 5), torch.zeros(()), value.flatten()[:1]]).clone()


def _other_dtype(value: Tensor, rng: Random) -> Tensor:
    kinds = [torch.float64, torch.float16, torch.int8, torch.int64, torch.bool, torch.complex64, torch.bfloat16]
    return value.to(rng.choice([*kinds, torch.float8_e4m3fn]))


def _huge(value: Tensor, rng: Random) -> Tensor:
    shapes = [(2**20, 2**20), (2**40,), (*value.shape, 2**30)]
    return torch.zeros(1, dtype=value.dtype).expand(rng.choice(shapes))


def _transposed(value: Tensor) -> Tensor:
    """The same values, stored the other way round."""
    back = tuple(reversed(range(value.ndim)))
    return value.permute(back).contiguous().permute(back)


TENSORS: dict[str, Callable[[Tensor, Random], Any]] = {
    "shape": _other_shape,
    "dtype": _other_dtype,
    "emptied": lambda value, rng: value.new_zeros(rng.choice([(0,), (0, 3), (*value.shape, 0)])),
    "not_finite": lambda value, rng: torch.full_like(value.float(), rng.choice([float("nan"), float("inf")])),
    "other_values": lambda value, rng: torch.full_like(value, rng.choice([0, 1, 100])),
    "enormous_values": lambda value, rng: torch.full_like(value.float(), rng.choice([3e38, -3e38, 1e-45])),
    "huge_strides": _huge,
    "one_element_expanded": lambda value, rng: torch.zeros(1, dtype=value.dtype).expand(value.shape),
    "overlapping": lambda value, rng: torch.zeros(9, dtype=value.dtype).as_strided(value.shape, [0] * value.ndim),
    "transposed": lambda value, rng: _transposed(value),
    "sparse": lambda value, rng: value.to_sparse(),
    "sparse_csr": lambda value, rng: torch.zeros(4, 4).to_sparse_csr(),
    "quantised": lambda value, rng: _quantised(value),
    "parameter": lambda value, rng: torch.nn.Parameter(value.float()),
    "meta": lambda value, rng: value.to("meta"),
    "conjugated": lambda value, rng: torch.conj(value.to(torch.complex64)),
    "no_tensor": lambda value, rng: absurd(rng),
}


def change_tensor(content: Any, rng: Random, how: str) -> None:
    """One tensor somewhere in ``content``."""
    box, key = place(content, rng, Tensor)
    box[key] = TENSORS[how](box[key], rng)


# ---- of a training state -------------------------------------------------------------------------------------------

PROGRESS: tuple[dict[str, Any], ...] = (
    *({"epoch": value} for value in (0, -1, 3, 4, 5, 10**9, 2**63, 2**70, 1.0, 1.5, "1", None, True, float("nan"))),
    *({"step": value} for value in (-1, 5, 6, 4, 10**9, 2**70, 1.0, "1", None, True, float("inf"))),
    *({"seconds": value} for value in (-1.0, -1e308, float("nan"), float("inf"), "1", None, 2**70, True, [])),
    *({"best": value} for value in (None, [], 5, "x", {"epoch": "1"}, {"epoch": 1}, {"top1": 5.0}, {1: 2})),
    *({"best": {"epoch": 1, "split": "test", "top1": value}} for value in (None, "x", float("nan"), 10**400, [])),
    *({"best": {"epoch": value, "split": "test", "top1": 1.0}} for value in (None, "x", -1, 10**9, 2**70, [1])),
    *({"best": {"epoch": 1, "split": value, "top1": 1.0}} for value in (None, 3, "x" * 200_000, "a\nb", "\ud800")),
    *({"epoch": 3, "step": 5}, {"epoch": 4, "step": 3}, {"epoch": 1, "step": 0}, {"further": 1}),
)


def progress(content: Any, rng: Random) -> None:
    content["progress"].update(copy.deepcopy(rng.choice(PROGRESS)))


def optimiser(content: Any, rng: Random) -> None:
    solver = content["solver"]
    state, group = solver["state"], solver["param_groups"][0]
    key = rng.choice(list(state))
    buffer = state[key]["momentum_buffer"]
    changes: tuple[Callable[[], Any], ...] = (
        lambda: state.pop(key),
        lambda: state.clear(),
        lambda: state[key].clear(),
        lambda: state.update({str(key): state.pop(key)}),
        lambda: state.update({10**6: state[key]}),
        lambda: state.update({key: rng.choice([None, 5, [], "x", buffer])}),
        lambda: state[key].update(momentum_buffer=rng.choice([None, 1.0, "x", buffer[:1], torch.zeros(7, 7)])),
        lambda: state[key].update(momentum_buffer=_other_dtype(buffer, rng)),
        lambda: solver["param_groups"].append(copy.deepcopy(group)),
        lambda: solver["param_groups"].clear(),
        lambda: group["params"].pop(),
        lambda: group["params"].append(rng.choice([0, 99, -1, "x", None])),
        lambda: group["params"].reverse(),
        lambda: group.update(lr=rng.choice([None, "x", -1.0, float("nan"), 1e308, 10**400, torch.zeros(3), []])),
        lambda: group.update(momentum=rng.choice([None, "x", -1.0, float("nan"), 1e30, 10**400, torch.zeros(3), []])),
        lambda: group.update(weight_decay=rng.choice([None, "x", -1.0, float("nan"), 1e30, torch.zeros(3)])),
        lambda: group.update(dampening=rng.choice([None, "x", 3.0, float("nan")])),
        lambda: group.update(lr_scale=rng.choice([None, "x", -1.0, 0.0, float("nan"), 1e30])),
        lambda: group.update(rng.choice([{"fused": False}, {"fused": "x"}, {"foreach": True}, {"foreach": 7}])),
        lambda: group.update(rng.choice([{"differentiable": True}, {"maximize": True}, {"nesterov": True}])),
        lambda: group.pop(rng.choice([name for name in group if name != "params"])),
        lambda: group.update({"params": rng.choice([None, 5, "x", {}])}),
    )
    rng.choice(changes)()


def running_metrics(content: Any, rng: Random) -> None:
    metrics = content["metrics"]
    names, totals = metrics["names"], metrics["totals"]
    changes: tuple[dict[str, Any], ...] = (
        *({"names": value} for value in (None, 5, "ab", names[:1], names * 2, [*names, "x"], ["x"] * 2, [1, None])),
        *({"totals": value} for value in (totals[:2], totals[None], totals.float(), totals * float("nan"), totals + 1)),
        *({"totals": value} for value in (torch.zeros(()), torch.zeros(0), totals.bool(), -totals, totals.to_sparse())),
        *({"totals": value} for value in (None, [1.0], torch.zeros(1).double().expand(2**40))),
    )
    metrics.update(rng.choice(changes))


STATES: dict[str, Callable[[Any, Random], None]] = {
    function.__name__: function for function in (progress, optimiser, running_metrics)
}


def _shadowed(**attributes: Any) -> Any:
    """Attributes of an OrderedDict come back from a file and hide its methods."""
    value: Any = OrderedDict()
    vars(value).update(attributes)
    return value


def _laughs() -> list[Any]:
    """Two to the 60th lists, sixty of which are in memory."""
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    return value


FOREIGN: tuple[Callable[[Any], Any], ...] = (
    lambda box: box,  # contains itself
    lambda box: {"box": box, "model": box},
    lambda box: _laughs(),
    lambda box: {"laughs": _laughs()},
    lambda box: np.float64(3.0),  # which torch reads, and mdistill as an object of no use
    lambda box: np.int64(2),
    lambda box: argparse.Namespace(a=1),
    lambda box: {argparse.Namespace(): 1},
    lambda box: torch.float32,
    lambda box: torch.device("cuda:7"),
    lambda box: torch.Size([3]),
    lambda box: {1, 2},
    lambda box: (1, (2, (3,))),
    lambda box: b"bytes",
    lambda box: bytearray(b"bytes"),
    lambda box: 1 + 2j,
    lambda box: {(1, 2): 3, None: 4, 5: 6, True: 7, 1.5: 8},
    lambda box: {key: _shadowed(keys=1, items=2, get=3, values=4) for key in ["a"]},
    lambda box: _shadowed(keys=1, items=2, get=3, values=4),
    lambda box: _shadowed(_metadata=5),
    lambda box: {2**70: 1},
    lambda box: {"k" * 100_000: 1},
    lambda box: {f"\x1b[2J{number}\nerror: x": number for number in range(2000)},
)


def foreign(content: Any, rng: Random) -> None:
    """A value that ``torch.load`` accepts and no state holds."""
    box, key = place(content, rng)
    box[key] = rng.choice(FOREIGN)(box)


def mislabelled(content: Any, rng: Random) -> None:
    """A mapping that is as it was, but for attributes that hide its methods."""
    box, key = place(content, rng, dict)
    box[key] = OrderedDict(box[key])
    names = rng.choice([["keys"], ["items"], ["get"], ["values"], ["copy", "update"], ["_metadata"], ["pop"]])
    vars(box[key]).update(dict.fromkeys(names, 5))


VALUES = {"foreign": foreign, "mislabelled": mislabelled}

# ---- reading and writing -------------------------------------------------------------------------------------------


def load_torch(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def save_torch(path: Path, content: Any) -> None:
    torch.save(content, path)


def save_legacy(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _write(path: Path, text: str) -> None:
    text = text.replace(f'"{DEEP}"', DEEP).replace(f"'{DEEP}'", DEEP).replace(DEEP, "[" * 100_000 + "]" * 100_000)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def save_yaml(path: Path, content: Any) -> None:
    _write(path, yaml.safe_dump(content))


def load_json(path: Path) -> Any:
    return json.loads(path.read_text())


def save_json(path: Path, content: Any) -> None:
    _write(path, json.dumps(content))


def load_lines(path: Path) -> Any:
    return [json.loads(line) for line in path.read_text().splitlines()]


def save_lines(path: Path, content: Any) -> None:
    _write(path, "".join(json.dumps(line) + "\n" for line in content))


def load_safetensors(path: Path) -> Any:
    """The header and, under ``""``, the data as they are."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return {"header": json.loads(data[8 : 8 + length]), "": data[8 + length :]}


def save_safetensors(path: Path, content: Any) -> None:
    rest = content.get("")
    _write(path, json.dumps(content.get("header")))
    header = path.read_bytes()
    path.write_bytes(struct.pack("<Q", len(header)) + header + (rest if isinstance(rest, bytes) else b""))


def load_pickle(path: Path) -> Any:
    return pickle.loads(path.read_bytes(), encoding="bytes")


def save_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, 2))


# ---- of the arrays of a data set -----------------------------------------------------------------------------------

ARRAYS: tuple[Callable[[NDArray[Any]], Any], ...] = (
    lambda images: images[:5],
    lambda images: images[:, :5],
    lambda images: images[None],
    lambda images: images.astype(np.float32),
    lambda images: images.astype(object),
    lambda images: images.astype(">u2"),
    lambda images: images.astype("S1"),
    lambda images: np.zeros(images.shape, [("a", np.uint8)]),
    lambda images: np.zeros(0, np.uint8),
    lambda images: np.zeros((), np.uint8),
    lambda images: images.tolist(),
    lambda images: images.tobytes(),
    lambda images: np.asfortranarray(images),
)


def array(content: Any, rng: Random) -> None:
    content[b"data"] = rng.choice(ARRAYS)(content[b"data"])


LABELS: tuple[Any, ...] = (-1, 100, 10**400, 1.5, float("nan"), True, None, "3", b"3", [3], np.int64(3), np.zeros(3))


def label(content: Any, rng: Random) -> None:
    content[b"fine_labels"][rng.randrange(10)] = rng.choice(LABELS)


IMAGES = {"array": array, "label": label}
