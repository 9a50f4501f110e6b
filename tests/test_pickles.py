"""Pickles are inspected without being run: what would hang or crash the interpreter is refused."""

import io
import pickle
from typing import Any

import pytest
import torch

from mdistill import pickles
from mdistill.pickles import MAX_DEPTH, HostilePickle, inspect

KEY_OF_NESTED_TUPLES = {
    "by TUPLE1": lambda depth: b"\x80\x02})" + b"\x85" * depth + b"K\x01s.",
    "by marks": lambda depth: b"\x80\x02}" + b"(" * depth + b"t" * depth + b"K\x01s.",
    "by memo": lambda depth: b"\x80\x02})q\x010" + b"h\x01\x85q\x010" * depth + b"h\x01K\x01s.",
    "by DUP": lambda depth: b"\x80\x02})" + b"2\x86" * depth + b"K\x01s.",
}


@pytest.mark.parametrize("form", KEY_OF_NESTED_TUPLES)
@pytest.mark.parametrize("depth", [MAX_DEPTH, 1000, 100_000])
def test_tuples_that_nest_too_deep_are_refused(form: str, depth: int) -> None:
    """To hash one recurses, and from some thousands on crashes the interpreter."""
    with pytest.raises(HostilePickle, match=r"nests more than 64 containers|unfolds to more than"):
        inspect(io.BytesIO(KEY_OF_NESTED_TUPLES[form](depth)))


@pytest.mark.parametrize("form", KEY_OF_NESTED_TUPLES)
def test_tuples_that_nest_a_little_are_not(form: str) -> None:
    content = KEY_OF_NESTED_TUPLES[form](20)
    inspect(io.BytesIO(content))
    pickle.loads(content)


def nested(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


@pytest.mark.slow
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_depth_is_that_of_the_objects(protocol: int) -> None:
    """However many there are side by side, and in whatever batches a dictionary or list is filled."""
    wide = {number: (number, [number], {number: (number,)}) for number in range(2500)}
    inspect(io.BytesIO(pickle.dumps(wide, protocol)))
    inspect(io.BytesIO(pickle.dumps(nested(30), protocol)))


@pytest.mark.parametrize("protocol", [2, 4])
def test_lists_that_hold_each_other_twice_are_refused(protocol: int) -> None:
    shared: Any = [1]
    for _ in range(12):
        shared = [shared, shared]
    inspect(io.BytesIO(pickle.dumps(shared, protocol)))
    for _ in range(30):
        shared = {"a": shared, "b": [shared]} if protocol == 4 else [shared, shared]
    with pytest.raises(HostilePickle, match=r"unfolds to more than 20,000,000 objects|nests more than 64"):
        inspect(io.BytesIO(pickle.dumps(shared, protocol)))


def test_a_name_of_absurd_length_is_refused() -> None:
    with pytest.raises(HostilePickle, match=r"names something of 5,00\d characters"):
        inspect(io.BytesIO(b"\x80\x02c" + b"a." * 2500 + b"\nb\n."))


def test_a_pickle_of_too_many_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPCODES", 100)
    with pytest.raises(HostilePickle, match="has more than 100 parts"):
        inspect(io.BytesIO(pickle.dumps(list(range(200)))))


@pytest.mark.parametrize("content", [b"", b"\x80", b"t.", b"s.", b"h\x05.", b"not a pickle", b"(" * 1000])
def test_damage_is_left_to_the_reader(content: bytes) -> None:
    inspect(io.BytesIO(content))


def test_pickles_that_follow_each_other_are_read_one_at_a_time() -> None:
    stream = io.BytesIO(pickle.dumps([1]) + pickle.dumps({"a": torch.Size([2])}) + b"raw bytes")
    inspect(stream)
    inspect(stream)
    assert stream.read() == b"raw bytes"
