"""A check of HTML pages for accessibility: structure, texts for pictures, contrast. Returns what is wrong."""

import re
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What the checks look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.headings: list[int] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def problems(text: str) -> list[str]:
    """Everything that a reader with a screen reader or a phone would stumble over, or that is not in the file."""
    page = Page(text)
    found = [f"</{tag}> closes nothing" for tag in page.unbalanced] + [f"<{tag}> is left open" for tag in page.open]
    if not page.all("html")[0].get("lang"):
        found.append("no language")
    if "<title></title>" in text or not page.all("title"):
        found.append("no title")
    if not any("width=device-width" in each.get("content", "") for each in page.all("meta")):
        found.append("no viewport")
    if page.headings.count(1) != 1 or any(after > before + 1 for before, after in pairwise(page.headings)):
        found.append(f"headings {page.headings}")
    if not page.all("main"):
        found.append("no main part")
    found += [f"a picture without words: {each.get('src', '')[:40]}" for each in page.all("img") if not each.get("alt")]
    for each in page.all("svg"):
        if each.get("aria-hidden") != "true" and not (each.get("role") == "img" and each.get("aria-label")):
            found.append("a picture without words: svg")
    found += ["a bar without words" for each in page.all("progress") if not each.get("aria-label")]
    found += ["a picture without a size" for each in page.all("img") if not (each.get("width") and each.get("height"))]
    found += ["a heading of a table without scope" for each in page.all("th") if "scope" not in each]
    if len(page.all("table")) != len(page.all("caption")):
        found.append("a table without caption")
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    found += [f"the id {name} is there twice" for name in set(names) if names.count(name) > 1]
    for each in page.all("a"):
        if each.get("href", "").removeprefix("#") not in names:
            found.append(f"a link leads nowhere: {each.get('href')}")
    places = [attributes[key] for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    found += [f"not in the file: {place[:60]}" for place in places if not place.startswith(("data:", "#"))]
    found += [f"{tag} is not needed here" for tag in ("script", "link", "iframe") if page.all(tag)]
    return found


def contrast(first: str, second: str) -> float:
    """Of two colours #rrggbb, from 1 to 21: WCAG 2.2, "contrast ratio"."""
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """From 0, black, to 1, white: WCAG 2.2, "relative luminance"."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
