"""What is known of each method, read off its code and its published configuration."""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistill.errors import UserError

if TYPE_CHECKING:
    from mdistill.config import Config
    from mdistill.distillers import Distiller, Needs

PAPER = re.compile(r'\w+: (?P<authors>.+?), "(?P<title>.+)", (?P<reference>(?:arXiv:|doi:)?\S+(?: \d{4})?)')
FIRST = ("res32x4_res8x4.yaml", "resnet8x4.yaml")
"""Whose settings are shown, where there is such a configuration."""

COLUMNS = ("method", "paper", "year", "loss", "settings", "needs", "cache")


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    authors: str
    title: str
    reference: str  # arXiv:, doi: or a conference

    @property
    def year(self) -> str:
        """Of the first version on arXiv, else as the reference says."""
        on_arxiv = re.search(r"arXiv:(\d\d)\d\d\.", self.reference)
        if on_arxiv:
            return f"20{on_arxiv[1]}"
        year = re.search(r"\b(20\d\d)\b", self.reference)
        return year[1] if year else ""

    @property
    def link(self) -> str:
        """The reference as a Markdown link, where it has an address."""
        kind, _, number = self.reference.partition(":")
        address = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind)
        return f"[{self.reference}]({address}{number})" if address else self.reference


@dataclass(frozen=True)
class Method:
    """One method."""

    name: str
    paper: Paper | None
    loss: str  # the first sentence of its class, Markdown
    needs: str  # teacher, features, views, labels
    cache: str  # whether the teacher's logits can be cached
    settings: Mapping[str, Any]  # of ``config``; what every method takes is left out where it is off
    config: str  # path of the configuration that they are from, or ""
    differences: Sequence[tuple[str, str]]  # a name in its code, and how that differs from the paper; one sentence

    @property
    def published(self) -> str:
        """Its settings in one line."""
        return ", ".join(f"{key} {_value(value)}" for key, value in self.settings.items())

    @property
    def cells(self) -> list[str]:
        """Its row under ``COLUMNS``, Markdown."""
        link, year = (self.paper.link, self.paper.year) if self.paper else ("", "")
        return [f"`{self.name}`", link, year, self.loss, self.published, self.needs, self.cache]


def describe(name: str, configs: Path) -> Method:
    """The method ``name``; its settings are those of a configuration under ``configs/<name>``.

    Raises:
        UserError: there is no such method.
    """
    from mdistill.distillers import DISTILLERS, Distiller

    builder = DISTILLERS.get(name)
    assert inspect.isclass(builder)
    assert issubclass(builder, Distiller)
    needs = builder.needs
    path, config = _configuration(configs / name)
    return Method(
        name=name,
        paper=_paper(sys.modules[builder.__module__].__doc__ or ""),
        loss=_markdown(_paragraphs(builder)[0].split(". ")[0].rstrip(".")),
        needs="; ".join([*_needs(needs), *(f"a first phase, `{phase}`" for phase in builder.phases)]),
        cache=_cache(needs.teacher, needs.views),
        settings={} if config is None else _settings(name, config),
        config=path,
        differences=tuple(_differences(builder)),
    )


def markdown_table(methods: Sequence[Method]) -> str:
    """One row per method."""
    rows = [[cell.replace("|", "\\|") for cell in method.cells] for method in methods]
    return "\n".join("| " + " | ".join(row) + " |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows])


def text(method: Method, *, in_full: bool = False) -> str:
    """A few lines for a terminal."""
    lines = [f"{method.name}: {method.loss}"]
    if method.paper is not None:
        lines.append(f"  paper     {method.paper.title}, {method.paper.reference}, {method.paper.year}")
    lines.append(f"  needs     {method.needs}   cache: {method.cache}")
    if method.settings:
        lines.append(f"  settings  {method.published}")
    if in_full:
        lines += [f"  from      {method.config}"] if method.config else []
        lines += [f"  {place} {difference}" for place, difference in method.differences]
    return "\n".join(lines).replace("`", "")


def markdown_section(method: Method) -> str:
    """Paper, settings and differences from the paper of a method."""
    lines = [f"### `{method.name}`", ""]
    if method.paper is not None:
        lines += [f"{method.paper.authors}, *{method.paper.title}*, {method.paper.link}.", ""]
    lines += [f"{method.loss}.", ""]
    if method.settings:
        lines += [f"Settings of `{method.config}`: {method.published}.", ""]
    lines += [f"- `{place}` {difference}" for place, difference in method.differences]
    return "\n".join(lines).rstrip() + "\n"


def replaced(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the comments ``begin`` and ``end`` of the generated part ``name``.

    Raises:
        UserError: the comments are not there.
    """
    begin, end = f"<!-- begin {name}: python tools/methods.py --write -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"a page should hold {begin!r} and {end!r} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content.strip()}\n{end}{rest.split(end)[1]}"


def _paper(docstring: str) -> Paper | None:
    match = PAPER.match(" ".join(docstring.split("\n\n")[0].split()))
    if match is None:
        return None
    return Paper(match["authors"], match["title"], match["reference"].rstrip(".,"))


def _needs(needs: "Needs") -> Iterator[str]:
    yield {"none": "no teacher", "logits": "logits", "features": "features of both"}[needs.teacher]
    if needs.student_features and needs.teacher != "features":
        yield "features of the student"
    if needs.views > 1:
        yield "two views"
    if needs.labels == "hard":
        yield "classes"


def _cache(teacher: str, views: int) -> str:
    if teacher == "none":
        return "no teacher"
    if teacher != "logits":
        return "no"
    return "yes" if views == 1 else "weak view"


def _configuration(folder: Path) -> "tuple[str, Config | None]":
    from mdistill.config import load

    paths = sorted(folder.glob("[!_]*.yaml"), key=lambda path: (path.name not in FIRST, path.name))
    if not paths:
        return "", None
    return "/".join(paths[0].parts[-4:]), load(paths[0])


def _settings(name: str, config: "Config") -> dict[str, Any]:
    from mdistill.distillers import DISTILLERS

    parameters, given = DISTILLERS.arguments(name), config.distiller.arguments
    return {key: value for key, value in given.items() if value != parameters[key].default}


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _differences(builder: "type[Distiller]") -> Iterator[tuple[str, str]]:
    """The paragraphs that begin with "Differs from the" of everything public in a method's module, in order."""
    module = sys.modules[builder.__module__]
    members = [member for member in vars(module).values() if inspect.isfunction(member) or inspect.isclass(member)]
    members = [member for member in members if member.__module__ == module.__name__ and member.__name__[0] != "_"]
    for member in sorted(members, key=lambda member: inspect.getsourcelines(member)[1]):
        for paragraph in _paragraphs(member):
            if paragraph.startswith("Differs from the"):
                yield member.__name__, _markdown(f"d{paragraph[1:]}")


def _paragraphs(member: Any) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.getdoc(member) or "-")]


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("*", "\\*")
