"""Reading a pickle's opcodes without running them, to refuse what would hang or crash the interpreter."""

import pickletools
from collections.abc import Iterator
from typing import IO, Any

MAX_DEPTH = 64  # containers within containers
MAX_NAME = 300  # characters of a module and a name in it
MAX_OPCODES = 5_000_000

_FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}  # what lies below, instead of a new object
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}


class HostilePickle(Exception):  # noqa: N818  (reads as the sentence it prints)
    """What is wrong with a pickle."""


def inspect(stream: IO[bytes]) -> None:
    """Read one pickle from ``stream``, up to its end; a damaged one is left to whoever unpickles it.

    A tuple that is a key of a dictionary is hashed, which recurses; so depth is counted as the objects would nest.

    Raises:
        HostilePickle: it nests too deep, is too long, or names something of absurd length.
    """
    stack: list[int] = []  # how deep each object on the unpickler's stack is nested
    marks: list[int] = []
    memo: dict[int, int] = {}
    for opcode, argument in _opcodes(stream):
        if "GLOBAL" in opcode.name and isinstance(argument, str) and len(argument) > MAX_NAME:
            raise HostilePickle(f"names something of {len(argument):,} characters")
        if opcode.name in _PUTS or opcode.name == "MEMOIZE":
            memo[len(memo) if argument is None else int(argument)] = stack[-1] if stack else 0
            continue
        if opcode.name in _GETS:
            stack.append(memo.get(int(argument), 0))
            continue
        before, popped = list(opcode.stack_before), [0]
        if pickletools.markobject in before:
            start = marks.pop() if marks else 0
            popped += stack[start:]
            del stack[start:]
            before = before[: before.index(pickletools.markobject)]
        container = 0
        for _ in before:
            container = stack.pop() if stack else 0
            popped.append(container)
        if opcode.name in _FILLS:
            depth = max(container, 1 + max(popped[:-1], default=0))
        elif opcode.name == "DUP":
            depth = container
        else:
            depth = 1 + max(popped)
        if depth > MAX_DEPTH:
            raise HostilePickle(f"nests more than {MAX_DEPTH} containers")
        for pushed in opcode.stack_after:
            if pushed is pickletools.markobject:
                marks.append(len(stack))
            else:
                stack.append(depth)


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
