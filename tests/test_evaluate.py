"""A student appraised from all sides, and what is said when a part is missing."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from richkd import appraise as appraising
from richkd import distill, estimate, load_student
from richkd.__main__ import ABOUT, VERBS
from richkd.appraise import appraise
from richkd.command import main
from richkd.config import Data
from richkd.data import load
from richkd.errors import DataError
from richkd.evaluate import calibration
from richkd.evaluate.corruption import GROUPS, SEVERITIES
from richkd.evaluation import lines, write
from richkd.layers import build, read


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "LATENCY_SECONDS", 0)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A student of two given teachers on the digits: its run, their logits of the test rows, its own, and the labels."""
    folder = tmp_path_factory.mktemp("made")
    source = load(Data(), folder)
    labels = np.concatenate([source.train.labels, source.test.labels])
    rng = np.random.default_rng(0)
    given = {
        who: (rng.normal(size=(len(labels), 10)) + sure * np.eye(10)[labels]).astype(np.float32)
        for who, sure in (("teacher", 4), ("clip", 2))
    }
    np.savez(folder / "given.npz", **given)
    words = [f"{who}.logits={folder}/given.npz:{who}" for who in given]
    words += ["student.name=cnn8", "train.epochs=2", "fusion.alpha=0.5", "device=cpu"]
    words += [f"cache={folder}/cache", f"storage={folder}"]
    distill.test(distill.run(build(read(words)), folder / "run"))
    with torch.inference_mode():
        test = torch.from_numpy(source.test.pixels).permute(0, 3, 1, 2)
        own = load_student(folder / "run")(test)
    shown = {who: torch.from_numpy(each[len(source.train) :]) for who, each in given.items()}
    return folder / "run", shown, own, torch.from_numpy(source.test.labels)


@pytest.fixture(scope="module")
def whole(made) -> appraising.Appraisal:
    return appraise(made[0] / "best", {"evaluate.rows": 40, "evaluate.certain": "q0.5"})


def test_numbers_are_those_of_its_logits(made, whole):
    run, shown, logits, labels = made
    found, said = whole.found, {"student": logits} | shown
    said["fused"] = sum(shown.values()) / 2
    assert found["calibration"].keys() == said.keys()
    for who, own in found["calibration"].items():
        nll = torch.nn.functional.cross_entropy(said[who].double(), labels).item()
        assert own["ece"] == pytest.approx(calibration(said[who], labels).ece, abs=1e-3)
        assert own["nll"] == pytest.approx(nll, rel=1e-5)
        if who != "student":
            same = (said[who].argmax(1) == logits.argmax(1)).double().mean().item()
            assert found["agreement"][who] == pytest.approx(100 * same)
    recorded = json.loads((run / "run.json").read_text())["metrics"]
    assert found["test"] == {key: recorded[f"test/{key}"] for key in ("top1", "top5")}
    assert found["calibration"]["student"]["ece"] == recorded["test/ece"]
    for who in ("teacher", "clip", "fused"):
        assert found["agreement"][who] == recorded[f"test/agreement_{who}"]
        assert found[who]["top1"] == recorded[f"{who}/top1"]


def test_classes_and_categories_add_up(made, whole):
    _, _, logits, labels = made
    found, right = whole.found, logits.argmax(1) == labels
    assert [each["name"] for each in found["classes"]] == list(load(Data(), Path()).names)
    for k, each in enumerate(found["classes"]):
        assert each["n"] == (labels == k).sum()
        assert each["top1"] == pytest.approx(100 * right[labels == k].double().mean().item())
    groups = found["categories"]
    assert sum(each["n"] for each in groups.values()) == found["rows"] == len(labels)
    # half of the rows, as the quantile says, but for those of which the teacher is wrong
    assert 0 < groups["right_certain"]["n"] <= len(labels) / 2


def test_robustness_is_of_as_many_rows_as_were_asked_for(whole):
    corrupted, attacked = whole.found["corruption"], whole.found["attack"]
    assert corrupted["rows"] == attacked["rows"] == 40
    assert corrupted["kind"] == "computed"
    known = {name for group in GROUPS.values() for name in group}
    assert known - corrupted["top1"].keys() == {
        "frost",
        "spatter",
        "saturate",
    }  # the images are grey
    assert all(len(each) == len(SEVERITIES) for each in corrupted["top1"].values())
    # of one row 2.5 %: each is a share of the forty
    shares = [*corrupted["top1"]["snow"], *attacked["fgsm"], *attacked["pgd"], attacked["clean"]]
    assert all(math.isclose(share / 2.5, round(share / 2.5)) for share in shares)
    assert corrupted["mean"] < corrupted["clean"] == attacked["clean"]
    assert sum(attacked["pgd"]) <= sum(attacked["fgsm"]) + 2.5


def test_costs_are_those_of_the_network(made, whole):
    costs = whole.found["costs"]
    student = load_student(made[0])
    assert costs["parameters"] == sum(each.numel() for each in student.network.parameters())
    assert costs["flops"] == 2 * costs["macs"] > 0
    assert costs["latency_ms"] > 0


def test_it_is_written_as_json_a_page_pictures_and_tables(whole, tmp_path):
    page = write(whole, tmp_path, "my <b>student</b>")
    written = json.loads((tmp_path / "evaluation.json").read_text())
    bins = written.pop("bins")
    assert written == whole.found
    assert bins["clip"] == [asdict(each) for each in whole.calibrations["clip"].bins]
    text, markdown = page.read_text(), page.with_suffix(".md").read_text()
    assert "<b>student" not in text
    for name in ("reliability", "corruption", "attack", "classes"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in markdown
    rows = (tmp_path / "every_corruption.csv").read_text().splitlines()
    assert len(rows) == 1 + len(whole.found["corruption"]["top1"])
    assert "computed here, not the published images" in text
    assert "Not there: frost, saturate, spatter." in text


def test_few_lines_say_it(whole):
    told = list(lines(whole.found))
    assert len(told) <= 20
    assert max(map(len, told)) <= 125
    assert any(line.startswith("corrupted  mean") and "computed here" in line for line in told)


def test_without_rows_nothing_is_corrupted_or_attacked_and_without_teachers_nothing_compared(
    made, tmp_path
):
    words = ["method.name=ce", "student.name=cnn8", "train.epochs=1", f"cache={tmp_path}"]
    distill.run(build(read(words)), tmp_path / "run")
    bare = appraise(tmp_path / "run" / "best", {"evaluate.rows": 0})
    assert not bare.found.keys() & {"corruption", "attack", "categories", "teacher", "groups"}
    assert (bare.found["agreement"], bare.found["notes"]) == ({}, [])
    assert "Corrupted" not in write(bare, tmp_path / "out", "x").read_text()
    assert not any("corrupted" in line for line in lines(bare.found))


def test_teachers_that_are_gone_or_others_are_said_and_left_out(made, tmp_path):
    given = made[0].parent / "given.npz"
    kept = given.read_bytes()
    arrays = dict(np.load(given))
    try:
        np.savez(given, **(arrays | {"clip": arrays["clip"] + 1}))
        others = appraise(made[0] / "best", {"evaluate.rows": 0}).found
        given.unlink()
        gone = appraise(made[0] / "best", {"evaluate.rows": 0}).found
    finally:
        given.write_bytes(kept)
    for found, told in ((others, "others than the run had"), (gone, "given.npz")):
        (note,) = found["notes"]
        assert note.startswith("without teachers: ")
        assert told in note
        assert found["calibration"].keys() == {"student"}


def test_a_teacher_that_the_cache_has_lost_is_not_trained_again(tmp_path):
    words = ["method.name=kd", "student.name=cnn8", "train.epochs=1", "teacher.epochs=1"]
    distill.run(build(read([*words, f"cache={tmp_path}/one"])), tmp_path / "run")
    elsewhere = {"evaluate.rows": 0, "cache": f"{tmp_path}/two"}
    (note,) = appraise(tmp_path / "run" / "best", elsewhere).found["notes"]
    assert "in this cache no more" in note


def test_published_arrays_are_taken_where_they_are_named(made, tmp_path):
    pixels = load(Data(), tmp_path).test.pixels
    labels = made[3].numpy()
    np.save(tmp_path / "fog.npy", np.concatenate([pixels] * 4 + [0 * pixels]))
    np.save(tmp_path / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    changes = {"evaluate.rows": 100, "evaluate.corrupted": str(tmp_path)}
    found = appraise(made[0] / "best", changes).found["corruption"]
    assert found["kind"] == "published"
    assert found["top1"].keys() == {"fog"}
    assert found["top1"]["fog"][:4] == [found["clean"]] * 4
    assert found["top1"]["fog"][4] < 25 < found["clean"]  # black
    np.save(tmp_path / "labels.npy", np.tile((labels + 1) % 10, 5))
    with pytest.raises(DataError, match="must hold the labels of the 800 test images"):
        appraise(made[0] / "best", changes)


def test_the_verb_writes_beside_the_run_or_where_it_is_told(made, tmp_path, capsys):
    words = ["evaluate", str(made[0]), "evaluate.rows=0", "evaluate.certain=0.9"]
    assert main("python -m richkd", ABOUT, VERBS, words) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"page       {made[0]}/evaluation/evaluation.html"
    assert Path(told[-1].split()[1]).is_file()
    assert main("python -m richkd", ABOUT, VERBS, [*words, f"--to={tmp_path}/new", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == f"{tmp_path}/new/evaluation.html"
    assert found["agreement"].keys() == {"teacher", "clip", "fused"}


def test_where_arrays_lie_and_how_many_rows_are_taken_makes_no_other_run():
    from richkd.layers import digest

    plain = build(read([]))
    looked = [
        "evaluate.rows=7",
        "evaluate.corrupted=there",
        "diagnose.rows=all",
        "diagnose.prompts=[a]",
    ]
    assert digest(build(read(looked))) == digest(plain)
    assert digest(build(read(["evaluate.certain=0.7"]))) != digest(plain)


def test_a_class_without_test_rows_has_no_accuracy():
    logits, labels = torch.eye(3)[torch.tensor([0, 2, 2])], torch.tensor([0, 2, 0])
    found = appraising.by_class(logits, labels, ("a", "b", "c"))
    assert [(each["name"], each["n"], each["top1"]) for each in found] == [
        ("a", 2, 50.0),
        ("c", 1, 100.0),
    ]


def test_a_student_of_labels_alone_is_told_by_what_its_teachers_would_have_said(made, tmp_path):
    run, shown, _, labels = made
    words = [f"{who}.logits={run.parent}/given.npz:{who}" for who in shown]
    words += ["method.name=ce", "student.name=cnn8", "train.epochs=1", "device=cpu"]
    words += [f"cache={run.parent}/cache", f"storage={tmp_path}"]
    distill.run(build(read(words)), tmp_path / "ce")
    found = appraise(tmp_path / "ce" / "best", {"evaluate.rows": 0}).found
    assert found["agreement"].keys() == {"teacher", "clip"}
    assert found["categories"]["wrong"]["n"] == int((shown["teacher"].argmax(1) != labels).sum())
    assert "fused" not in found
    assert found["notes"] == []
