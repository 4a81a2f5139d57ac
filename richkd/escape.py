"""Text from outside, such as names of files and classes, made inert where others read it."""

import csv
import io
import re
from collections.abc import Iterable, Sequence

# a table program takes these for the beginning of a formula, some of them after white space; the last four are
# the same signs at full width
FORMULA = re.compile(r"[\t\r\n]|\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")
MARKUP = re.compile(r"([\\`*_{}\[\]<>()#!|&~:@$])")


def cell(value: object) -> object:
    """Return a value as a cell of a CSV file: text that would be a formula gets an apostrophe in front; a number is one."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def to_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    r"""Return a table as CSV (RFC 4180) in UTF-8, its text inert; bytes of a file name that are no UTF-8 read `\udc80`."""
    text = io.StringIO()
    csv.writer(text).writerows(map(cell, row) for row in (header, *rows))
    return text.getvalue().encode("utf-8", "backslashreplace")


def line(text: str) -> str:
    r"""Return text as one line that a terminal only prints: what is not printable is shown as in Python, `\n` or `\x1b`."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def markdown(text: str) -> str:
    """Return text as words in a line, or in a cell of a table, of Markdown: no markup, no HTML, no new line."""
    return re.sub(r"(?i)(www)\.", r"\1\\.", MARKUP.sub(r"\\\1", line(text)))
