"""Reading a pickle's opcodes without running them, to refuse what would hang or crash the interpreter."""

import pickletools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

MAX_DEPTH = 64  # containers within containers
MAX_NAME = 300  # characters of a module and a name in it
MAX_OPCODES = 5_000_000
MAX_SIZE = 20_000_000  # objects, each counted as often as it is reached

_FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}  # what lies below, instead of a new object
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}


class HostilePickle(Exception):  # noqa: N818  (reads as the sentence it prints)
    """What is wrong with a pickle."""


@dataclass(slots=True)
class _Nest:
    """What is known of an object: how deep it nests, and how many objects are in it."""

    depth: int = 0
    size: int = 0

    def holds(self, others: "Sequence[_Nest]") -> None:
        """Put ``others`` in it."""
        self.depth = max([self.depth, *(1 + other.depth for other in others)])
        self.size += 1 + sum(other.size for other in others)


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
        before, taken = len(opcode.stack_before), []
        if pickletools.markobject in opcode.stack_before:
            start = marks.pop() if marks else 0
            taken = stack[start:]
            del stack[start:]
            before = opcode.stack_before.index(pickletools.markobject)
        taken = [*(stack.pop() for _ in range(min(before, len(stack)))), *taken]
        container = _Nest()
        if opcode.name in _FILLS and taken:  # it lies below what it is filled with
            container = taken.pop(before - 1 if before <= len(taken) else -1)
        container.holds(taken)
        if container.depth > MAX_DEPTH:
            raise HostilePickle(f"nests more than {MAX_DEPTH} containers")
        if container.size > MAX_SIZE:
            raise HostilePickle(f"unfolds to more than {MAX_SIZE:,} objects")
        for pushed in opcode.stack_after:
            if pushed is pickletools.markobject:
                marks.append(len(stack))
            else:
                stack.append(container)


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
