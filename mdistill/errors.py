"""Errors whose text is for the user: one clear line each, printed without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: what is wrong, the value found, where, what is allowed. Exit code 2."""

    exit_code = 2


class RunFailed(UserError):  # noqa: N818  (reads as the sentence it prints)
    """The run itself went wrong, through no mistake in its input (non-finite loss, disk full). Exit code 1."""

    exit_code = 1


class Stopped(BaseException):
    """The run was asked to stop; what there was to save is saved. Exit code 75 (try again: resume it)."""

    exit_code = 75


def shown(value: object, limit: int = 120) -> str:
    """``repr(value)`` in one line, cut short where it is long, for a message."""
    try:
        text = " ".join(repr(value).split("\n"))
    except Exception:  # nested too deep, a number of thousands of digits, or a class of the user's
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def printable(text: object, limit: int = 100) -> str:
    """A name from a file for a message: what a terminal would act on is escaped, what is long is cut."""
    if not isinstance(text, str):
        return shown(text, limit)
    safe = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text[: limit + 1])
    return safe if len(text) <= limit else f"{safe[: limit - 4]} ..."


def plural(count: int, word: str) -> str:
    """``"2 runs"``."""
    return f"{count} {word}{'s' if count != 1 else ''}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'mcld'?"`` when something known is near ``name``, else nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
