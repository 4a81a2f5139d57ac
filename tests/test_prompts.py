"""Prompt sets: named, open_clip's, and files."""

import warnings

import open_clip
import pytest

from richkd.errors import ConfigError, DataError
from richkd.zeroshot import prompts
from richkd.zeroshot.prompts import captions, templates


@pytest.mark.parametrize("name", [*prompts.SETS, *prompts.OPEN_CLIP])
def test_every_named_template_has_one_place_for_the_name(name):
    found = templates(name)
    assert found
    assert all(template.count("{}") == 1 for template in found)
    assert len({" ".join(t.lower().split()) for t in found}) == len(found)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 12])
def test_rich_sets_are_prefixes_of_the_twelve(count):
    assert templates(f"rich{count}") == templates("rich12")[:count]
    assert templates("single") == templates("rich12")[:1]


def test_open_clips_own_sets_read_as_open_clip_formats_them():
    theirs = [f("bird") for f in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert [t.replace("{}", "bird") for t in templates("openai80")] == theirs
    assert len(templates("openai7")) == 7


def test_an_unknown_set_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean digits-bad"):
        templates("digits-bda")
    with pytest.raises(ConfigError, match="clip.prompts"):
        templates("nowhere.txt")


def test_a_file_has_one_template_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\n\na photo of a {}\n100 % {} in {braces}\n", encoding="utf-8-sig")
    assert templates(str(path)) == ("a photo of a {}", "100 % {} in {braces}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a photo\n", ["line 1", "has 0", "'a photo'"]),
        ("ok {}\n{} and {}\n", ["line 2", "has 2"]),
        ("# nothing\n", ["no template"]),
        ("", ["no template"]),
        (b"\xff\xfe{}", ["UTF-8"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "prompts.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        templates(str(path))
    assert "clip.prompts" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("again", ["a photo of a {}", "A Photo of a {}", "  a photo  of a {} "])
def test_a_repeated_template_counts_once_with_a_warning(tmp_path, again):
    path = tmp_path / "prompts.txt"
    path.write_text(f"a photo of a {{}}\n{again}\n")
    with pytest.warns(UserWarning, match="line 2 .* counts once"):
        assert templates(str(path)) == ("a photo of a {}",)


def test_names_are_put_in_literally():
    names = ["{}", "{0}", "%s", "a\u0301", "'quoted'"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert captions(["a {} in {braces}"], names) == [
            [f"a {name} in {{braces}}" for name in names]
        ]


def test_an_underscore_is_spoken_as_a_space():
    assert captions(["a photo of a {}"], ["maple_tree"]) == [["a photo of a maple tree"]]
