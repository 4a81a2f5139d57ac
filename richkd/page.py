"""A document of a few kinds of blocks, as one HTML file that asks for nothing else, and as Markdown.

What it says may come from outside, such as names of prompt sets: in neither form does it become markup or a script.
"""

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from richkd import escape
from richkd.draw import Picture
from richkd.files import write_atomic

# nothing is fetched and nothing runs, whatever slipped into the page
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d9dee3; --page: #f6f7f9; --card: #ffffff;
  --accent: #d55e00; --code: #f1f3f5; --warn: #fff4e0; --warn-line: #e69f00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa4ae; --line: #343b43; --page: #14171a;
  --card: #1d2126; --code: #262b31; --warn: #3a2f18 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 19px; margin: 40px 0 12px; padding-top: 4px }
p { margin: 8px 0; max-width: 78ch; overflow-wrap: anywhere } .soft { color: var(--soft) } .lead { font-size: 17px }
.card, figure, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 20px 0 }
.tile { padding: 14px 16px } .tile b { display: block; white-space: nowrap; font-size: 21px; line-height: 1.25; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: 13px }
.note { background: var(--warn); border-left: 4px solid var(--warn-line); border-radius: 4px; padding: 10px 14px; margin: 16px 0;
  overflow-wrap: anywhere }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); grid-auto-flow: dense; gap: 16px }
.beside { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start } .beside > div { flex: 1 1 440px; min-width: 0 }
.beside .grid { grid-template-columns: minmax(0, 1fr); margin-top: 8px }
@media (max-width: 800px) { .grid { grid-template-columns: minmax(0, 1fr) } }
figure { margin: 0; background: #fff; overflow: hidden; display: flex; flex-direction: column } figure.wide { grid-column: 1 / -1 }
figure img { width: 100%; height: auto; padding: 10px 10px 4px; display: block; margin: auto 0 }
figcaption { background: var(--card); padding: 10px 16px 12px; font-size: 13.5px; color: var(--soft); border-top: 1px solid var(--line);
  overflow-wrap: anywhere }
figcaption b { color: var(--ink) }
.scroll { overflow-x: auto; margin: 8px 0; width: fit-content; max-width: 100% }
table { border-collapse: collapse; font-size: 14px }
td:first-child { white-space: nowrap }
th, td { padding: 6px 7px; text-align: left; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums;
  max-width: 60ch; overflow-wrap: break-word }
tr:last-child td { border-bottom: 0 } th { color: var(--soft); font-weight: 600; font-size: 13px }
.right { text-align: right; white-space: nowrap } tr.strong td { font-weight: 600 }
tr.strong td:first-child { box-shadow: inset 3px 0 var(--accent) }
pre { background: var(--code); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono",
  Menlo, Consolas, monospace; margin: 8px 0 } pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere }
details { margin: 12px 0 } summary { cursor: pointer; font-weight: 600 } a { color: #2f7ac0 }
@media print { body { background: #fff } figure, .scroll { break-inside: avoid } }
"""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading of a section."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `soft` is less important than others, `lead` more, a `note` is a warning."""

    text: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A few numbers at a glance: each with what it is, and what to know of it."""

    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text.

    Attributes:
        header: Of each column.
        rows: Cells.
        right: Columns whose numbers are aligned to the right.
        strong: Row that stands out.
        name: Of its CSV file, without `.csv`; None: it has none.
        csv: That file.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()
    strong: int | None = None
    name: str | None = None
    csv: bytes = b""


@dataclass(frozen=True, slots=True)
class Code:
    """What is copied as it is; `wrap` breaks a long command where it is shown."""

    text: str
    wrap: bool = False


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures side by side; where there is nothing to draw it is said."""

    pictures: Sequence[Picture]


@dataclass(frozen=True, slots=True)
class Details:
    """What is seen when it is asked for."""

    title: str
    blocks: Sequence["Block"]


@dataclass(frozen=True, slots=True)
class Beside:
    """Two parts side by side, where there is room."""

    left: Sequence["Block"]
    right: Sequence["Block"]


Block = Heading | Text | Tiles | Table | Code | Pictures | Details | Beside


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Return one HTML file, with all pictures and tables in it."""
    body = "\n".join(map(_html, blocks))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{_safe(title)}</h1>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Return Markdown whose pictures and tables lie beside it, as files."""
    return (
        "\n\n".join([f"# {escape.markdown(title)}", *filter(None, map(_markdown, blocks))]) + "\n"
    )


def write(folder: Path, name: str, title: str, blocks: Sequence[Block]) -> Path:
    """Write a document as `NAME.html` and `NAME.md`, and beside them its pictures and the tables that have a file.

    Returns:
        The HTML file.
    """
    files = {f"{name}.html": to_html(title, blocks), f"{name}.md": to_markdown(title, blocks)}
    for file, text in files.items():
        write_atomic(folder / file, text.encode())
    for each in _filed(blocks):
        if isinstance(each, Table):
            write_atomic(folder / f"{each.name}.csv", each.csv)
        else:
            for kind in ("svg", "png", "csv"):
                write_atomic(folder / f"{each.name}.{kind}", getattr(each, kind))
    return folder / f"{name}.html"


def _filed(blocks: Sequence[Block]) -> Iterator[Table | Picture]:
    """Yield the pictures that were drawn, and the tables that have a file."""
    for block in blocks:
        match block:
            case Table():
                yield from [block] if block.name else []
            case Pictures(pictures):
                yield from (one for one in pictures if one.svg is not None)
            case Details(_, inner):
                yield from _filed(inner)
            case Beside(left, right):
                yield from _filed([*left, *right])


def _safe(text: str) -> str:
    # half a pair of surrogates, as of a file name that is no UTF-8, cannot be written
    return html.escape(escape.line(text))


def _save(name: str, content: bytes) -> str:
    """Return a link within the page by which a table is saved."""
    data = base64.b64encode(content).decode()
    return f'<a download="{name}.csv" href="data:text/csv;base64,{data}">{name}.csv</a>'


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_safe(text)}</h2>"
        case Text(text, "note"):
            return f'<div class="note">{_safe(text)}</div>'
        case Text(text, kind):
            return f'<p class="{kind}">{_safe(text)}</p>' if kind else f"<p>{_safe(text)}</p>"
        case Tiles(tiles):
            each = (
                f'<div class="card tile"><span>{_safe(what)}</span><b>{_safe(value)}</b><span>{_safe(more)}</span></div>'
                for what, value, more in tiles
            )
            return f'<div class="tiles">{"".join(each)}</div>'
        case Code(text, wrap):
            return (
                f'<pre class="wrap">{_plain(text)}</pre>' if wrap else f"<pre>{_plain(text)}</pre>"
            )
        case Pictures(pictures):
            figures = "\n".join(_figure(one) for one in pictures if one.svg)
            said = "".join(
                f'<p class="soft">{_safe(one.title)}: {_safe(one.text)}</p>'
                for one in pictures
                if not one.svg
            )
            return f'<div class="grid">\n{figures}\n</div>\n{said}'
        case Details(title, blocks):
            inner = "\n".join(map(_html, blocks))
            return f"<details><summary>{_safe(title)}</summary>\n{inner}\n</details>"
        case Beside(left, right):
            parts = ("\n".join(map(_html, part)) for part in (left, right))
            return f'<div class="beside">{"".join(f"<div>{part}</div>" for part in parts)}</div>'
        case Table():
            return _html_table(block)


def _plain(text: str) -> str:
    """Return text of several lines as it is."""
    return "\n".join(map(_safe, text.split("\n")))


def _figure(picture: Picture) -> str:
    wide = ' class="wide"' if picture.wide else ""
    return (
        f'<figure{wide}><img alt="{_safe(picture.title)}" src="{picture.link}">'
        f"<figcaption>{_safe(picture.text)} Its numbers: {_save(picture.name, picture.csv)}</figcaption></figure>"
    )


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str, strong: bool = False) -> str:
        each = (
            f'<{tag} class="right">{_safe(cell)}</{tag}>'
            if place in table.right
            else f"<{tag}>{_safe(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )
        mark = ' class="strong"' if strong else ""
        return f"<tr{mark}>{''.join(each)}</tr>"

    head = row(table.header, "th")
    body = "\n".join(row(cells, "td", k == table.strong) for k, cells in enumerate(table.rows))
    link = f'<p class="soft">As a table: {_save(table.name, table.csv)}</p>' if table.name else ""
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>{link}'


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {escape.markdown(text)}"
        case Text(text, "note"):
            return f"> **Note.** {escape.markdown(text)}"
        case Text(text):
            return escape.markdown(text)
        case Tiles():
            return ""  # a glance at what follows
        case Code(text):
            return "\n".join(f"    {escape.line(line)}" for line in text.split("\n"))
        case Pictures(pictures):
            return "\n\n".join(map(_markdown_picture, pictures))
        case Details(title, blocks):
            return "\n\n".join(
                [f"## {escape.markdown(title)}", *filter(None, map(_markdown, blocks))]
            )
        case Beside(left, right):
            return "\n\n".join(filter(None, map(_markdown, [*left, *right])))
        case Table():
            ends = ["---:" if place in block.right else "---" for place in range(len(block.header))]
            cells = [[escape.markdown(cell) for cell in row] for row in (block.header, *block.rows)]
            lines = [f"| {' | '.join(row)} |" for row in (cells[0], ends, *cells[1:])]
            link = f"\n\n[{block.name}.csv]({block.name}.csv)" if block.name else ""
            return "\n".join(lines) + link


def _markdown_picture(picture: Picture) -> str:
    text = escape.markdown(picture.text)
    if picture.png is None:
        return f"{escape.markdown(picture.title)}: {text}"
    name = picture.name
    return f"![{escape.markdown(picture.title)}]({name}.png)\n\n{text} Its numbers: [{name}.csv]({name}.csv)"
