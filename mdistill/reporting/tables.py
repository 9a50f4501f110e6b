"""Tables as plain text and as Markdown."""

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first column is flush left, the others flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([padded[0], "-" * len(padded[0]), *padded[1:]])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: Sequence[str]) -> list[str]:
    """The lines of a table whose texts are Markdown; ``align`` is ``---`` or ``---:`` for each column."""
    return ["| " + " | ".join(line) + " |" for line in (header, align, *rows)]


def escaped(text: str) -> str:
    """``text`` as Markdown shows it, on one line."""
    for character in "\\|*_<`[":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
