"""What is known of each method, read off its code and its published configuration."""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mdistill.config import Config, load
from mdistill.data import DataInfo
from mdistill.distillers import DISTILLERS, Distiller, Needs
from mdistill.engine.build import build_distiller, build_teacher
from mdistill.errors import UserError

PAPER = re.compile(r'\w+: (?P<authors>.+?), "(?P<title>.+)", (?P<reference>(?:arXiv:|doi:)?\S+(?: \d{4})?)')
FIRST = ("res32x4_res8x4.yaml", "resnet8x4.yaml")
"""Whose settings are shown, where there is such a configuration."""

COLUMNS = ("method", "paper", "year", "loss", "settings", "needs", "cache", "graph")


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    authors: str
    title: str
    reference: str  # arXiv:, doi: or a conference

    @property
    def year(self) -> str:
        """Of the first version on arXiv, else as the reference says."""
        found = re.search(r"arXiv:(\d\d)\d\d\.", self.reference)
        if found:
            return f"20{found[1]}"
        found = re.search(r"\b(20\d\d)\b", self.reference)
        return found[1] if found else ""

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
    cache: str  # whether the teacher's logits can come from a table
    graph: str  # whether a step can be captured
    settings: Mapping[str, Any]  # of ``config``; what every method takes is left out where it is off
    config: str  # path of the configuration that they are from, or ""
    readings: Sequence[tuple[str, str]]  # a name in its code, and how that differs from the paper; one sentence

    @property
    def published(self) -> str:
        """Its settings in one line."""
        return ", ".join(f"{key} {_value(value)}" for key, value in self.settings.items())

    @property
    def cells(self) -> list[str]:
        """Its row under ``COLUMNS``, Markdown."""
        link, year = (self.paper.link, self.paper.year) if self.paper else ("", "")
        return [f"`{self.name}`", link, year, self.loss, self.published, self.needs, self.cache, self.graph]


def describe(name: str, configs: Path) -> Method:
    """All about the method ``name``; its settings are those of a configuration under ``configs/<name>``.

    Raises:
        UserError: there is no such method.
    """
    builder = DISTILLERS.get(name)
    assert inspect.isclass(builder)
    assert issubclass(builder, Distiller)
    needs = builder.needs
    path, config = _configuration(configs / name)
    return Method(
        name=name,
        paper=_paper(sys.modules[builder.__module__].__doc__ or ""),
        loss=_markdown(_paragraphs(builder)[0].split(". ")[0].rstrip(".")),
        needs="; ".join(_needs(needs)),
        cache=_cache(needs.teacher, needs.views),
        graph="yes" if config is None or _captured(config) else "no",
        settings={} if config is None else _settings(name, config),
        config=path,
        readings=tuple(_readings(builder)),
    )


def markdown_table(methods: Sequence[Method]) -> str:
    """One row a method."""
    rows = [[cell.replace("|", "\\|") for cell in method.cells] for method in methods]
    return "\n".join("| " + " | ".join(row) + " |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows])


def text(method: Method, *, readings: bool = False) -> str:
    """A few lines for a terminal."""
    lines = [f"{method.name}: {method.loss}"]
    if method.paper is not None:
        lines.append(f"  paper     {method.paper.title}, {method.paper.reference}, {method.paper.year}")
    lines.append(f"  needs     {method.needs}   cache: {method.cache}   graph: {method.graph}")
    if method.settings:
        lines.append(f"  settings  {method.published}")
    if readings:
        lines += [f"  from      {method.config}"] if method.config else []
        lines += [f"  {place} {reading}" for place, reading in method.readings]
    return "\n".join(lines).replace("`", "")


def markdown_section(method: Method) -> str:
    """Paper, settings and readings of a method."""
    lines = [f"### `{method.name}`", ""]
    if method.paper is not None:
        lines += [f"{method.paper.authors}, *{method.paper.title}*, {method.paper.link}.", ""]
    lines += [f"{method.loss}.", ""]
    if method.settings:
        lines += [f"Settings of `{method.config}`: {method.published}.", ""]
    lines += [f"- `{place}` {text}" for place, text in method.readings]
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
    found = PAPER.match(" ".join(docstring.split("\n\n")[0].split()))
    if found is None:
        return None
    return Paper(found["authors"], found["title"], found["reference"].rstrip(".,"))


def _needs(needs: Needs) -> Iterator[str]:
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


def _configuration(folder: Path) -> tuple[str, Config | None]:
    found = sorted(folder.glob("*.yaml"), key=lambda path: (path.name not in FIRST, path.name))
    if not found:
        return "", None
    return "/".join(found[0].parts[-4:]), load(found[0])


def _captured(config: Config) -> bool:
    """Whether a step can be captured: the method draws nothing on the host. The networks are built without memory."""
    info = DataInfo(num_classes=100, num_samples=50_000, image_size=32, num_views=162, batch_size=64, strong_views=True)
    with torch.device("meta"):
        distiller = build_distiller(config, info, build_teacher(config, info))
    return not distiller.generators


def _settings(name: str, config: Config) -> dict[str, Any]:
    parameters, given = DISTILLERS.arguments(name), config.distiller.arguments
    return {key: value for key, value in given.items() if value != parameters[key].default}


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _readings(builder: type[Distiller]) -> Iterator[tuple[str, str]]:
    """The paragraphs that begin with "Differs from the" of everything public in a method's module, in order."""
    module = sys.modules[builder.__module__]
    members = [member for member in vars(module).values() if inspect.isfunction(member) or inspect.isclass(member)]
    members = [member for member in members if member.__module__ == module.__name__ and member.__name__[0] != "_"]
    for member in sorted(members, key=lambda it: inspect.getsourcelines(it)[1]):
        for paragraph in _paragraphs(member):
            if paragraph.startswith("Differs from the"):
                yield member.__name__, _markdown(f"d{paragraph[1:]}")


def _paragraphs(member: Any) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.getdoc(member) or "-")]


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("*", "\\*")
