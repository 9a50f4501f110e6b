"""What a campaign consists of: cases that can be told apart by name, and how each of them ended."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    state: Literal["survived", "not reached", "failed"]
    detail: str = ""  # of a failure: what was expected and what happened


@dataclass(frozen=True)
class Case:
    """One fault and what must hold after it.

    Attributes:
        group: the row of the table that it is counted in.
        name: tells it from the others of its group, in the same words in every campaign.
        run: plants the fault and checks, in an empty folder of its own; can be pickled. What it raises is a failure.
    """

    group: str
    name: str
    run: Callable[[Path], Outcome]
