"""The page, the pictures and the lines of a diagnosis, of teachers whose logits are drawn."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st

from richkd.config import Config
from richkd.diagnose import Rows, judged, measure, measured, show
from richkd.diagnose import document as pages
from richkd.diagnose import pictures as drawing
from richkd.diagnose.document import document
from richkd.diagnose.pictures import ends_of, named
from richkd.draw import Picture
from richkd.errors import ConfigError
from richkd.escape import line
from richkd.evaluate import pictures as evaluated
from richkd.layers import build, read
from richkd.page import Beside, Block, Details, Table, to_html, to_markdown

HOSTILE = ("<script>x()</script>b\nclip.scale: 7\x1b[31m", "=cmd|' /C'!A0 $\\frac$", "漢字 [a](b)")
EMPTY = {"meta", "img", "br", "link"}
SEEN = "the task teacher was trained on 40 of these 200 rows"


def diagnosis(
    *,
    rows: int = 200,
    classes: int = 10,
    skill: tuple[float, float] = (1.5, 1.5),
    prompts: tuple[str, ...] = ("one", "two"),
    caution: str | None = None,
    names: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """A diagnosis, read from its JSON, of logits that are noise and `skill` times the truth, of the teacher and of CLIP."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes

    def logits(own: float) -> torch.Tensor:
        noise = torch.randn(rows, classes, generator=generator)
        return 3 * (noise + own * F.one_hot(labels, classes))

    task, clips = logits(skill[0]), {name: logits(skill[1]) for name in prompts}
    names = names or tuple(f"class {k}" for k in range(classes))
    config = Config()
    found = measured(Rows(task=task, clips=clips, labels=labels, balanced=False), config, names)
    found |= {
        "data": "drawn",
        "rows": {"of": "validation", "n": rows},
        "several": [],
        "balanced": False,
    }
    found["target"] = {
        "rows": rows,
        "teacher_error": None,
        "curve": measure.targets(task, clips[found["prompts"]], config.loss.temperature),
    }
    return json.loads(json.dumps(judged(found, config, caution)))


@pytest.fixture(scope="module")
def better() -> dict[str, Any]:
    """Two teachers that make different errors."""
    return diagnosis()


@pytest.fixture(scope="module")
def useless() -> dict[str, Any]:
    """A CLIP that knows nothing."""
    return diagnosis(skill=(3.0, 0.0), prompts=("one",))


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Lay pictures out, but do not turn them into pixels, which is slow."""
    for module in (drawing, evaluated):
        monkeypatch.setattr(module, "save", lambda _: {"svg": b"<svg/>", "png": b"png"})


class Reader(HTMLParser):
    """Reads a page, and holds that its tags are closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        """Note a tag."""
        self.tags.append(tag)
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close a tag."""
        assert self.open.pop() == tag


def table_of(picture: Picture) -> list[list[str]]:
    """The rows of the table behind a picture, without its header."""
    return list(csv.reader(io.StringIO(picture.csv.decode())))[1:]


def tables(blocks: Sequence[Block]) -> Iterator[Table]:
    """All tables of a document."""
    for block in blocks:
        match block:
            case Table():
                yield block
            case Beside(left, right):
                yield from tables([*left, *right])
            case Details(_, inner):
                yield from tables(inner)


def shown(found: dict[str, Any]) -> list[str]:
    """A diagnosis on the terminal."""
    return show.lines(found | {"files": {"page": "there/diagnosis.html"}})


def test_files_are_written_linked_and_a_layer(better, tmp_path, undrawn):
    told = show.write(better, tmp_path)
    assert json.loads((tmp_path / "diagnosis.json").read_text()) == told
    text = (tmp_path / "diagnosis.html").read_text()
    assert Reader(text).tags.count("img") == len(list(tmp_path.glob("*.svg"))) == 8
    for file in re.findall(r"\]\(([^)]+)\)", (tmp_path / "diagnosis.md").read_text()):
        assert (tmp_path / file).stat().st_size, file
    assert told["verdict"].endswith(f"{tmp_path / 'start.yaml'}.")
    config = build(read([str(tmp_path / "start.yaml")]))
    weight = better["alpha_star"]["full"]
    assert config.fusion.alpha == pytest.approx(weight, abs=1e-6)
    assert f"{config.fusion.alpha:.2f} by theory" in told["verdict"]
    assert config.loss.temperature == better["start"]["loss.temperature"]
    assert config.clip.prompts == better["prompts"]


def test_a_folder_that_cannot_be_made_is_a_clear_line(better, undrawn):
    with pytest.raises(ConfigError, match="--to must lead to a folder that can be made"):
        show.write(better, Path("/proc/diagnosis"))  # there even root makes none


@pytest.fixture(scope="module")
def hostile() -> dict[str, Any]:
    """Names that would be markup, formulas or escapes, and long ones."""
    return diagnosis(
        prompts=HOSTILE, names=tuple(f"<u>{k}|{'$long' * 9}" for k in range(12)), classes=12
    )


@pytest.mark.parametrize("draw", [drawing.along, drawing.prompts, drawing.classes])
def test_long_names_leave_room(hostile, draw):
    assert draw(hostile).png.startswith(b"\x89PNG")  # a layout without room would warn


def test_names_from_outside_are_inert(hostile, tmp_path, undrawn):
    show.write(hostile | {"verdict": "It is better\nclip.scale: 7"}, tmp_path)
    assert not {"script", "u"} & set(Reader((tmp_path / "diagnosis.html").read_text()).tags)
    assert yaml.safe_load((tmp_path / "start.yaml").read_text()) == hostile["start"]
    for text in shown(hostile):
        assert text == line(text)


CASES: dict[str, dict[str, Any]] = {
    "no errors": {"skill": (40.0, 1.0)},
    "never right, two classes": {"skill": (-40.0, 1.0), "classes": 2},
    "a hundred classes, nine prompt sets": {"classes": 100, "prompts": tuple("abcdefghi")},
}


@pytest.mark.parametrize("case", CASES)
def test_every_diagnosis_can_be_shown(case, undrawn):
    found = diagnosis(**CASES[case])
    blocks = document(found)
    assert all(len(row) == len(each.header) for each in tables(blocks) for row in each.rows)
    assert Reader(to_html(case, blocks)).tags.count("img") == 8
    assert to_markdown(case, blocks).count(".csv)") == 8
    said = shown(found)
    assert len(said) <= 36
    assert max(map(len, said)) <= show.WIDTH


def test_doubtful_rows_recommend_no_weight(undrawn):
    found = diagnosis(caution=SEEN)
    text = to_markdown("x", document(found)) + "\n".join(shown(found))
    assert "shares the doubt" in text
    for word in (
        "Starting point",
        "independent",
        "cross-fitted",
        "fusion.weighting",
        "plateau",
        "within 0.5 points",
    ):
        assert word not in text
    assert not [row for row in table_of(drawing.along(found)) if row[0].startswith("rule")]


def test_useless_clip_is_said_to_be_none(useless, undrawn):
    assert useless["helps"] is False
    text = to_html("x", document(useless))
    assert "Starting point" not in text
    assert "method.name=kd" in text
    assert ("weight", "none", "not shown to help") in pages.tiles(useless)


def test_curve_is_that_of_the_json(better, undrawn):
    rows = table_of(drawing.along(better))
    assert [(float(a), float(y)) for what, a, y in rows if what == "curve"] == [
        (each["alpha"], each["top1"]) for each in better["curve"]
    ]
    rules = {what[5:]: float(a) for what, a, _ in rows if what.startswith("rule ")}
    assert rules == {name: each["alpha"] for name, each in better["rules"].items()}


def test_table_10_of_the_supplement(better):
    counts = dict(
        fixed=1126, teacher_wrong=2441, top5_fixed=219, top5_base=544, harmed=40, teacher_right=7559,
        top5_lost=0,
    )  # fmt: skip
    rows = pages.table10(better | {"outcomes": counts}).rows
    assert [row[1:4] for row in rows] == [
        ["2,441", "1,126", "46.1 %"],
        ["544", "219", "40.3 %"],
        ["7,559", "40", "0.5 %"],
        ["7,559", "0", "0.0 %"],
    ]
    assert rows[0][4] == f"{better['outcomes_weighted']['fixed']:,}"  # at the theory's weight


def test_outcome_bars_agree_with_the_counts(better, undrawn):
    what, how = better["outcomes"], better["agreement"]
    bars = {
        (row[0], row[2].split(",")[0]): float(row[3]) for row in table_of(drawing.outcomes(better))
    }
    assert bars == pytest.approx(
        {
            ("errors", "CLIP alone"): 100 * how["only_clip"] / (100 - better["teacher"]["top1"]),
            ("errors", "fused"): 100 * what["fixed"] / what["teacher_wrong"],
            ("right answers", "CLIP alone"): 100 * how["both_right"] / better["teacher"]["top1"],
            ("right answers", "fused"): 100 * (1 - what["harmed"] / what["teacher_right"]),
        }
    )


def test_shares_of_few_rows_are_blank(better, undrawn):
    counts = {
        "right_certain": 100,
        "right_uncertain": 29,
        "wrong_uncertain": 30,
        "wrong_certain": 41,
    }
    both = {"teacher": counts, "fused": counts}
    found = better | {"figure1": {"as_is": both, "calibrated": {"fused": counts}}}
    shares = {row[2]: row[4] for row in table_of(drawing.figure1(found))}
    assert shares["right_uncertain"] == ""
    assert float(shares["wrong_uncertain"]) == 15
    table = pages.cells(found)
    assert len(table.header) == 7
    assert table.rows[1][1:3] == ["29", ""]
    assert table.rows[2][1:3] == ["30", "15.00"]


def test_sets_that_would_be_called_alike_keep_their_names(better):
    found = better | {"clip": [{"prompts": "a.npz:english"}, {"prompts": "b.npz:english"}]}
    assert list(named(found).values()) == ["a.npz:english", "b.npz:english"]
    assert named(better | {"clip": [{"prompts": "a.npz:english"}]}) == {"a.npz:english": "english"}


@given(st.integers(1, 60))
def test_ends_of_the_classes_are_apart(count):
    every = [{"gain": -k} for k in range(count)]
    ends = ends_of(every)
    shown = [each["gain"] for end in ends for each in end]
    assert len(set(shown)) == len(shown) == min(count, 20)
    assert (shown[0], shown[-1]) == (0, 1 - count)


def test_lines_say_what_was_found(better):
    text = "\n".join(shown(better))
    gain, what = better["gain"], better["outcomes"]
    assert f"{gain['mean']:+.2f} points over the task teacher" in text
    assert f"repairs {what['fixed']} of {what['teacher_wrong']} errors" in text
    assert " ".join(text.split()).count(better["verdict"]) == 1
