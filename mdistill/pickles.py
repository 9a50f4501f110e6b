"""Reading a pickle's opcodes without running them, to refuse what would hang or crash the interpreter."""

import pickletools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

MAX_DEPTH = 64  # containers within containers
MAX_NAME = 300  # characters of a module and a name in it
MAX_OPCODES = 5_000_000
MAX_SIZE = 20_000_000  # objects, each counted as often as it is reached

_SIMPLE = {  # opcodes that push an empty container, a number, text or None: most of a pickle
    opcode.name
    for opcode in pickletools.opcodes
    if not opcode.stack_before
    and len(opcode.stack_after) == 1
    and opcode.stack_after[0] not in (pickletools.markobject, pickletools.anyobject)
}
_FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}  # what lies below, instead of a new object
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}


class HostilePickle(Exception):  # noqa: N818  (reads as the sentence it prints)
    """What is wrong with a pickle."""


@dataclass
class _Nest:
    """What is known of an object: how deep it nests, and how many objects are in it."""

    depth: int = 0
    size: int = 0

    def holds(self, others: "Sequence[_Nest]") -> None:
        """Put ``others`` in it."""
        self.size += 1
        for other in others:
            self.size += other.size
            if other.depth >= self.depth:
                self.depth = other.depth + 1


def inspect(stream: IO[bytes]) -> None:
    """Read one pickle from ``stream``, up to its end; a damaged one is left to whoever unpickles it.

    A tuple that is a key of a dictionary is hashed, which recurses; so depth is counted as the objects would nest. And
    whoever walks over lists that hold one list twice, which holds another twice, and so on, never ends.

    Raises:
        HostilePickle: it nests too deep, is too long, or names something of absurd length.
    """
    stack: list[_Nest] = []  # the unpickler's
    marks: list[int] = []
    memo: dict[int, _Nest] = {}
    for opcode, argument in _opcodes(stream):
        if opcode.name in _SIMPLE:
            stack.append(_Nest(0, 1))
            continue
        if opcode.name == "MARK":
            marks.append(len(stack))
            continue
        if "GLOBAL" in opcode.name and isinstance(argument, str) and len(argument) > MAX_NAME:
            raise HostilePickle(f"names something of {len(argument):,} characters")
        if opcode.name in _PUTS or opcode.name == "MEMOIZE":
            memo[len(memo) if argument is None else int(argument)] = stack[-1] if stack else _Nest()
            continue
        if opcode.name in _GETS:
            stack.append(memo.get(int(argument), _Nest()))
            continue
        if opcode.name == "DUP":
            stack.append(stack[-1] if stack else _Nest())
            continue
        below, taken = len(opcode.stack_before), []
        if pickletools.markobject in opcode.stack_before:
            start = marks.pop() if marks else 0
            taken = stack[start:]
            del stack[start:]
            below = opcode.stack_before.index(pickletools.markobject)
        if below:  # what lies below the mark, its container first
            taken = stack[-below:] + taken
            del stack[-below:]
        container = taken.pop(0) if opcode.name in _FILLS and taken else _Nest()
        container.holds(taken)
        if container.depth > MAX_DEPTH:
            raise HostilePickle(f"nests more than {MAX_DEPTH} containers")
        if container.size > MAX_SIZE:
            raise HostilePickle(f"unfolds to more than {MAX_SIZE:,} objects")
        stack += [container] * len(opcode.stack_after)


def _opcodes(stream: IO[bytes]) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number == MAX_OPCODES:
                raise HostilePickle(f"has more than {MAX_OPCODES:,} parts")
            yield opcode, argument
    except (HostilePickle, MemoryError):
        raise
    except Exception:  # damaged, or no pickle
        return
