"""Hostile text is inert where others read it; the oracles are pandas and a Markdown parser."""

import html
import io
import re

import pandas
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from richkd import escape

HOSTILE = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\uff1d1"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_that_would_be_a_formula_is_text(text):
    found = pandas.read_csv(io.BytesIO(escape.to_csv(["name"], [[text]])), dtype=str)
    assert found["name"].tolist() == [f"'{text}"]


def test_numbers_stay_numbers():
    found = pandas.read_csv(io.BytesIO(escape.to_csv(["a", "b"], [[-1, -0.5], [2, 1e-7]])))
    assert found["a"].tolist() == [-1, 2]
    assert found["b"].tolist() == [-0.5, 1e-7]


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1)
)
@example(['a,"b"', "a\rb", "a\nb", "\r\n"])
def test_csv_is_read_back_by_pandas(names):
    content = escape.to_csv(["name", "k"], [[name, k] for k, name in enumerate(names)])
    found = pandas.read_csv(io.BytesIO(content), dtype={"name": str}, keep_default_na=False)
    assert found["name"].tolist() == [escape.cell(name) for name in names]
    assert found["k"].tolist() == list(range(len(names)))


def test_a_name_that_is_no_utf_8_can_be_written_and_shown():
    name = b"\x80.png".decode("utf-8", "surrogateescape")
    assert escape.to_csv(["path"], [[name]]) == b"path\r\n\\udc80.png\r\n"
    assert escape.line(name) == r"\udc80.png"


@given(st.text())
@example("\x1b]0;title\x07\x9b31m")
def test_a_line_is_printable(text):
    assert escape.line(text).isprintable()
    assert len(escape.line(text).splitlines()) <= 1
    assert not text.isprintable() or escape.line(text) == text


@given(st.text())
@example("a|b")
@example("<script>alert(1)</script>")
@example("[a](javascript:x) ![b](c) `d` **e** _f_ ~~g~~ &lt; \\")
def test_markdown_is_read_as_its_words_alone(text):
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = parser.render(f"| a | b |\n|---|---|\n| x{escape.markdown(text)}x | y |\n")
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert [html.unescape(each) for each in cells] == [f"x{escape.line(text)}x", "y"]
