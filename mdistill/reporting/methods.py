"""What is known of each method, read off its code and its published configuration."""

import ast
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

DEFINITIONS = (ast.FunctionDef, ast.ClassDef)

COLUMNS = ("method", "kind", "paper", "year", "loss", "settings", "source", "needs", "cache")


KINDS = {"none": "no teacher", "logits": "logits", "pooled": "features", "features": "features"}
"""By ``needs.teacher``."""

FEATURES = {"stages": "stages", "preacts": "pre-activations", "last_map": "last map", "pooled": "pooled"}


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
    kind: str  # what of the teacher it distils: logits, features; or no teacher
    paper: Paper | None
    loss: str  # the first sentence of its class, Markdown
    needs: str  # teacher, features, views, labels
    cache: str  # whether the teacher's logits can be cached
    settings: Mapping[str, Any]  # of ``config``; what every method takes is left out where it is off
    config: str  # path of the configuration that they are from, or ""
    sources: Mapping[
        str, str
    ]  # of each of them that it tells of: "certain: ", "inferred: " or "ours: ", and from where
    differences: Sequence[tuple[str, str]]  # a name in its code, and how that differs from the paper; one sentence

    @property
    def published(self) -> str:
        """Its settings in one line."""
        return ", ".join(f"{key} {_value(value)}" for key, value in self.settings.items())

    @property
    def certainty(self) -> str:
        """How sure it is that its settings are the published ones, in one line: of most of them, and of the others."""
        words: dict[str, list[str]] = {}
        for key in self.settings:
            words.setdefault(self.sources.get(key, "not said").partition(":")[0], []).append(key)
        if not words:
            return ""
        usual = max(words, key=lambda word: len(words[word]))
        others = "; ".join(f"{', '.join(keys)} {word}" for word, keys in words.items() if word != usual)
        return f"{usual}; {others}" if others else usual

    @property
    def cells(self) -> list[str]:
        """Its row under ``COLUMNS``, Markdown."""
        link, year = (self.paper.link, self.paper.year) if self.paper else ("", "")
        return [
            f"`{self.name}`",
            self.kind,
            link,
            year,
            self.loss,
            self.published,
            self.certainty,
            self.needs,
            self.cache,
        ]


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
    path, config, told = _configuration(configs / name)
    settings = {} if config is None else _settings(name, config)
    return Method(
        name=name,
        kind=KINDS[needs.teacher],
        paper=_paper(sys.modules[builder.__module__].__doc__ or ""),
        loss=_markdown(_paragraphs(builder)[0].split(". ")[0].rstrip(".")),
        needs="; ".join([*_needs(needs), *(f"a first phase, `{phase}`" for phase in builder.phases)]),
        cache=_cache(needs.teacher, needs.views),
        settings=settings,
        config=path,
        sources={key: text for key in settings if (text := told.get(f"distiller.{key}"))},
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
        lines += [f"  settings  {method.published}", f"  source    {method.certainty}"]
    if in_full:
        lines += [f"  from      {method.config}"] if method.config else []
        lines += [f"  {', '.join(keys)} {text}" for text, keys in _by_source(method)]
        lines += [f"  {place} {difference}" for place, difference in method.differences]
    return "\n".join(lines).replace("`", "")


def markdown_section(method: Method) -> str:
    """Paper, settings and where they come from, and differences from the paper of a method."""
    lines = [f"### `{method.name}`", ""]
    if method.paper is not None:
        lines += [f"{method.paper.authors}, *{method.paper.title}*, {method.paper.link}.", ""]
    lines += [f"{method.loss}.", ""]
    if method.settings:
        lines += [f"Settings of `{method.config}`: {method.published}.", ""]
    lines += [f"- {', '.join(f'`{key}`' for key in keys)} {_markdown(text)}" for text, keys in _by_source(method)]
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
    features = ", ".join(FEATURES[name] for name in needs.features)
    yield f"features of both: {features}" if needs.teacher_features else KINDS[needs.teacher]
    if needs.student_features and not needs.teacher_features:
        yield f"features of the student: {features}"
    if needs.views > 1:
        yield "two views"
    if needs.class_distances is not None:
        yield "distances between classes"
    if needs.labels == "hard":
        yield "classes"


def _cache(teacher: str, views: int) -> str:
    if teacher == "none":
        return "no teacher"
    if teacher == "features":
        return "no"
    return "yes" if views == 1 else "weak view"


def _by_source(method: Method) -> list[tuple[str, list[str]]]:
    """Each source of its settings, and which come from there."""
    keys: dict[str, list[str]] = {}
    for key, source in method.sources.items():
        keys.setdefault(source, []).append(key)
    return [*keys.items()]


def _configuration(folder: Path) -> "tuple[str, Config | None, dict[str, str]]":
    from mdistill.config import load, sources

    paths = sorted(folder.glob("[!_]*.yaml"), key=lambda path: (path.name not in FIRST, path.name))
    if not paths:
        return "", None, {}
    return "/".join(paths[0].parts[-4:]), load(paths[0]), sources(paths[0])


def _settings(name: str, config: "Config") -> dict[str, Any]:
    from mdistill.distillers import DISTILLERS

    parameters, given = DISTILLERS.arguments(name), config.distiller.arguments
    return {key: value for key, value in given.items() if value != parameters[key].default}


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _differences(builder: "type[Distiller]") -> Iterator[tuple[str, str]]:
    """The paragraphs that begin with "Differs from the" of everything public in a method's module, in order.

    What only other methods of that module use is theirs.
    """
    module = sys.modules[builder.__module__]
    members = [member for member in vars(module).values() if inspect.isfunction(member) or inspect.isclass(member)]
    members = [member for member in members if member.__module__ == module.__name__ and member.__name__[0] != "_"]
    theirs = _used_by_others(builder)
    members = [member for member in members if member.__name__ not in theirs]
    for member in sorted(members, key=lambda member: inspect.getsourcelines(member)[1]):
        for paragraph in _paragraphs(member):
            if paragraph.startswith("Differs from the"):
                yield member.__name__, _markdown(f"d{paragraph[1:]}")


def _used_by_others(builder: "type[Distiller]") -> set[str]:
    """The names of what the other methods of a method's module use, and it does not.

    A loss that is named after a method counts as used by it: one that logs its terms apart does not call their sum.
    """
    from mdistill.distillers import DISTILLERS

    module = sys.modules[builder.__module__]
    methods = {name: DISTILLERS.get(name) for name in DISTILLERS.names()}
    variants = {name: method.__name__ for name, method in methods.items() if method.__module__ == module.__name__}
    definitions = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, DEFINITIONS)]
    mentions = {
        node.name: {below.id for below in ast.walk(node) if isinstance(below, ast.Name)} for node in definitions
    }
    for name in mentions:
        owners = [variant for variant in variants if name.startswith(f"{variant}_")]
        if owners:
            mentions[variants[max(owners, key=len)]].add(name)

    def used(names: set[str]) -> set[str]:
        found: set[str] = set()
        while names - found:
            found |= names
            names = {mentioned for name in names for mentioned in mentions.get(name, ())}
        return found

    return used({*variants.values()} - {builder.__name__}) - used({builder.__name__})


def _paragraphs(member: Any) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.getdoc(member) or "-")]


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("*", "\\*")
