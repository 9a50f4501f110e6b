"""What the HTML pages share: colours, style, the head, escaped text. A page needs nothing outside its file."""

import html

PALETTE = {
    "ink": "#1d1d1f",
    "faint": "#5c5c61",
    "link": "#0b5394",
    "warn": "#9c2a10",
    "paper": "#ffffff",
    "band": "#f4f4f6",
}
"""Each of the first four has a contrast of at least 4.5 with each of the others; a test computes it."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 2px solid var(--faint); }
p, li { max-width: 46rem; }
a { color: var(--link); }
.faint { color: var(--faint); font-size: .9rem; }
.warn { color: var(--warn); }
summary { cursor: pointer; color: var(--link); padding: .4rem 0; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""


def head(title: str, style: str) -> str:
    """The beginning of a page up to its body.

    Args:
        title: of the page, as text.
        style: further rules, after ``STYLE``.
    """
    colours = "".join(f" --{name}: {colour};" for name, colour in PALETTE.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>:root {{{colours} }}{STYLE}{style}</style>\n</head>"
    )


def text(value: object) -> str:
    """``value`` as HTML."""
    return html.escape(str(value))
