"""What a student sees in files of any name: lines, CSV and JSON, with the student itself as the oracle."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from richkd import checkpoint, distill, load_student, predict
from richkd.__main__ import ABOUT, VERBS
from richkd.command import main
from richkd.data import load
from richkd.errors import ConfigError
from richkd.files import read_json
from richkd.layers import build, read

NAMES = ("=zero", "o|ne", "t\u202ewo", "three, 3", 'fo"ur', "five", "six", "seven", "eight", "nine")
BYTES = b"\xff\x1b[31m\n.png"  # no UTF-8, and would colour a terminal


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The checkpoint of a short run on the digits, with hostile names."""
    folder = tmp_path_factory.mktemp("model")
    config = build(read(["train.epochs=3", "method.name=ce", f"cache={folder / 'cache'}"]))
    distill.run(config, folder / "run")
    saved = checkpoint.load(folder / "run" / "best")
    checkpoint.save(folder / "named", saved.weights, {}, saved.meta | {"names": list(NAMES)})
    return folder / "named"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Test digits, enlarged, under names of all kinds; among them what is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = load(build(read([])).data).test.pixels[..., 0]
    for k, name in enumerate(
        ("=1+1.png", "a=b.png", "b/c.JPG", "b/d/e.bmp", "-x.png", "[1].png", "@é.png")
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[k]).resize((40, 60)).save(folder / name)
    os.link(folder / "a=b.png", os.fsencode(folder) + b"/b/" + BYTES)
    (folder / "b" / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    return folder


def command(*words: str) -> int:
    return main("python -m richkd", ABOUT, VERBS, ["predict", *words])


def seen(capsys, *words: str) -> tuple[int, dict, str]:
    code = command(*words, "--json")
    told = capsys.readouterr()
    return code, json.loads(told.out), told.err


def test_probabilities_are_the_students_own_in_falling_order(model, pictures, capsys):
    code, answer, _ = seen(capsys, str(model), str(pictures), "--top=10")
    assert (code, answer["images"], answer["failed"]) == (0, 8, [])
    student = load_student(model)
    for each in answer["predictions"]:
        logits = student(student.read(each["path"])).double().numpy()[0]
        wanted = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-wanted)
        assert [found["class"] for found in each["classes"]] == [NAMES[k] for k in order]
        np.testing.assert_allclose(
            [found["probability"] for found in each["classes"]], wanted[order], rtol=1e-4, atol=1e-9
        )


def test_an_image_is_seen_the_same_whatever_is_seen_beside_it(model, pictures, monkeypatch):
    student, paths = load_student(model), predict.find_images([str(pictures)])
    whole = list(predict.predict(student, paths, 10))
    assert [each.path for each in whole] == paths
    monkeypatch.setattr(predict, "BATCH", 3)
    parts = list(predict.predict(student, paths[::-1], 10))[::-1]
    for one, other in zip(whole, parts, strict=True):
        assert one.path == other.path
        assert dict(one.classes) == pytest.approx(dict(other.classes), rel=1e-4)


def test_folders_patterns_and_files_are_found_once_in_order(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    below = ["b/c.JPG", "b/d/e.bmp", os.fsdecode(b"b/" + BYTES)]
    above = ["-x.png", "=1+1.png", "@é.png", "[1].png", "a=b.png"]
    assert predict.find_images(["."]) == sorted(above + below)
    assert predict.find_images(["b"]) == below
    assert predict.find_images(["b/"]) == below
    assert predict.find_images(["*.png"]) == above
    assert predict.find_images(["./*.png", "."]) == above + below
    assert predict.find_images(["**/*.bmp", "b/d", "b/c.JPG"]) == ["b/d/e.bmp", "b/c.JPG"]
    assert predict.find_images(["[1].png"]) == ["[1].png"]  # is a file before it is a pattern
    assert predict.find_images(["*"])[:2] == above[:2]
    assert predict.find_images([str(pictures / "b" / "d")]) == [str(pictures / "b" / "d" / "e.bmp")]


@pytest.mark.parametrize("word", ["nix", "*.nix", "", "empty"])
def test_a_word_that_stands_for_nothing_is_refused(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="IMAGES must be files"):
        predict.find_images([word])


def test_a_line_is_safe_for_a_terminal(model, pictures, capsys):
    assert command(str(model), str(pictures)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.isprintable() for line in lines)
    assert any(r"\udcff\x1b[31m\n.png" in line for line in lines)
    assert all(line.count(" %") == 3 for line in lines)


def test_csv_is_what_pandas_reads_and_no_formula(model, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(pictures)
    target = tmp_path / "out" / "seen.csv"
    assert command(str(model), "a=b.png", "=1+1.png", "b", "--to", str(target)) == 0
    table = pandas.read_csv(target, dtype={"path": str, "class": str})
    assert table.columns.tolist() == ["path", "rank", "class", "probability"]
    assert table["path"].unique().tolist() == [
        *("a=b.png", "'=1+1.png", "b/c.JPG", "b/d/e.bmp", "b/\\udcff\x1b[31m\n.png"),
    ]
    assert table["rank"].tolist() == [1, 2, 3] * 5
    assert set(table["class"]) <= {"'=zero", *NAMES[1:]}
    for text in (*table["path"], *table["class"]):
        assert text[0] not in "=+-@\t\r"
    best = table[table["rank"] == 1].set_index("path")
    student = load_student(model)
    wanted = student(student.read("a=b.png")).softmax(1).max().item()
    assert best.loc["a=b.png", "probability"] == pytest.approx(wanted, abs=1e-5)
    assert capsys.readouterr().out == f"5 images in {target}\n"


def test_what_cannot_be_read_is_told_and_the_others_go_on(model, pictures, tmp_path, capsys):
    (tmp_path / "torn.png").write_bytes((pictures / "a=b.png").read_bytes()[:60])
    os.mkfifo(tmp_path / "pipe.png")
    words = [str(tmp_path), str(pictures / "notes.txt"), str(pictures / "b")]
    code, answer, told = seen(capsys, str(model), *words)
    assert code == 1
    assert [each["path"] for each in answer["failed"]] == [
        str(path) for path in (tmp_path / "pipe.png", tmp_path / "torn.png", pictures / "notes.txt")
    ]
    assert answer["images"] == len(answer["predictions"]) == 3
    problems = [line for line in told.splitlines() if "cannot be read as an image" in line]
    assert len(problems) == 3
    assert "3 of 6 files could not be read" in told
    assert command(str(model), *words, "--to", str(tmp_path / "seen.json")) == 1
    written = read_json(tmp_path / "seen.json")
    assert [each["path"] for each in written if "problem" in each] == [
        each["path"] for each in answer["failed"]
    ]
    assert [each for each in written if "classes" in each] == answer["predictions"]
    assert command(str(model), *words, "--to", str(tmp_path / "seen.csv")) == 1
    assert set(pandas.read_csv(tmp_path / "seen.csv")["rank"]) == {1, 2, 3}


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(
    model, pictures, tmp_path, monkeypatch
):
    target = tmp_path / "seen.csv"
    target.write_text("old")
    monkeypatch.setattr(
        predict.Student,
        "forward",
        lambda *_: os.kill(os.getpid(), signal.SIGINT) or torch.zeros(8, 10),
    )
    assert command(str(model), str(pictures), "--to", str(target)) == 130
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["seen.csv"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "IMAGES must be files, folders of images or patterns but none is given"),
        (["nix.png"], "there is no such file or folder: 'nix.png'"),
        (["x", "--top=0"], "--top must be a whole number"),
        (["x", "--top=many"], "--top must be a whole number"),
        (["x", "--to=x.txt"], "FILE.csv or FILE.json"),
        (["x", "--to=folder.csv"], "is a folder"),
        (["x", "--to=file/x.csv"], "is no folder"),
    ],
)
def test_a_wrong_command_line_is_told_before_anything_is_read(
    model, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    assert command(str(model), *words) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_other_bytes_is_refused(model, pictures, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for path in model.iterdir():
        content = path.read_bytes()
        if path.name == "weights.safetensors":
            content = content[:-1] + b"\x7f"
        (tmp_path / "model" / path.name).write_bytes(content)
    assert command(str(tmp_path / "model"), str(pictures)) == 4
    assert "is damaged" in capsys.readouterr().err
