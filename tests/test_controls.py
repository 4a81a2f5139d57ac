"""Controls: what CLIP's logits are good for is seen by what is left without them, or with others in their place."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from richkd import distill, logits
from richkd.__main__ import ABOUT, VERBS
from richkd.command import main
from richkd.config import Config
from richkd.data import Split, load
from richkd.errors import ConfigError
from richkd.layers import CONF, build, read
from richkd.teachers import ClipTeacher, FusedTeacher, TaskTeacher

ROWS, CLASSES, ALPHA, T = 60, 4, 0.7, 3.0
LABELS = torch.arange(ROWS) % CLASSES
LEARNT = np.setdiff1d(np.arange(ROWS), [0, 1, 2, 3, 17])
HIDDEN = np.full(ROWS, -1)  # the student sees no label


def normal(seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (ROWS, CLASSES)).astype("f4"))


TASK, CLIP = normal(0), normal(1)
ON_CPU = SimpleNamespace(device=torch.device("cpu"))  # all that is asked of images


def teacher(control, seed=0, crops=None, **keys) -> FusedTeacher:
    """Return a fused teacher of two tables of logits."""
    config = build(
        read(
            [
                "data.source=digits",
                f"clip.control={control}",
                f"seed={seed}",
                f"fusion.alpha={ALPHA}",
            ]
        )
    )
    config = replace(config, loss=replace(config.loss, **keys))
    split = Split(transfer=LEARNT, labels=HIDDEN, validation=np.array([0, 1, 2, 3]), digest="")
    own = TaskTeacher(
        identity="t", classes=CLASSES, train_views=ON_CPU, test_views=ON_CPU, given=(TASK, TASK)
    )
    clip = ClipTeacher(identity="c", train=CLIP, test=CLIP, logit_scale=1.0, crops=crops)
    return FusedTeacher(config, split, LABELS, own, [clip])


def target(found: FusedTeacher) -> torch.Tensor:
    rows = torch.from_numpy(LEARNT)
    return found.said(rows, torch.zeros(len(rows), 3, dtype=torch.int64)).target


def lent(found: FusedTeacher) -> torch.Tensor:
    """Return whose zero-shot logits each row has, by comparing them."""
    same = (found.zero_shot["train"][:, None] == CLIP).all(2)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


def test_a_silent_clip_is_the_teacher_at_a_higher_temperature():
    expected = (TASK[LEARNT] / (T / ALPHA)).log_softmax(1)
    assert torch.allclose(target(teacher("zeros")), expected, atol=1e-6)
    # relative to the task teacher's logits the temperature takes back what alpha did
    relative = teacher("zeros", temperature_of="task")
    assert relative.temperature == pytest.approx(ALPHA * T)
    assert torch.allclose(target(relative), (TASK[LEARNT] / T).log_softmax(1), atol=1e-5)


@pytest.mark.parametrize("control", ["permuted", "permuted-in-class"])
def test_rows_that_are_learnt_from_are_permuted_among_themselves(control):
    found = teacher(control)
    whose = lent(found)
    assert sorted(whose[LEARNT].tolist()) == LEARNT.tolist()
    assert (whose[LEARNT] != torch.from_numpy(LEARNT)).sum() > len(LEARNT) // 2
    assert whose[[0, 1, 2, 3, 17]].tolist() == [0, 1, 2, 3, 17]  # held out, or left out
    assert torch.equal(found.zero_shot["test"], CLIP)
    assert (LABELS[whose] == LABELS).all() == (control == "permuted-in-class")
    expected = ((ALPHA * TASK + (1 - ALPHA) * CLIP[whose])[LEARNT] / T).log_softmax(1)
    assert torch.allclose(target(found), expected, atol=1e-6)


def test_a_permutation_is_one_for_a_run_and_another_for_another_seed():
    one, again, other = teacher("permuted"), teacher("permuted"), teacher("permuted", seed=1)
    assert torch.equal(target(one), target(again)) and torch.equal(target(one), target(one))
    assert not torch.equal(lent(one), lent(other))


def test_crops_are_those_of_the_lender():
    asked = []

    def crops(rows, views):
        asked.append(rows)
        return CLIP[rows]

    found = teacher("permuted", crops=crops)
    target(found)
    assert torch.equal(asked[0], found.lender[LEARNT])


def test_without_a_control_everything_is_its_own():
    found = teacher("none")
    assert found.lender is None
    assert torch.equal(found.zero_shot["train"], CLIP)


def test_a_silent_clip_has_no_features_to_contrast_with():
    with pytest.raises(ConfigError, match="clip.control=zeros silences"):
        build(read(["clip.control=zeros", "method.name=richkd-f"]))
    build(read(["clip.control=zeros", "method.name=richkd-f", "fusion.feature_alpha=1"]))


CONTROLS = sorted(path.stem for path in (CONF / "control").glob("*.yaml"))
REGIMES = {
    **dict.fromkeys(("few-25", "few-50", "few-75", "full-teacher"), ()),
    "long-tail": ("data.imbalance=0.1", "data.labelled_per_class=null"),
}
SHORT = ("train.epochs=1", "teacher.epochs=2", "student.name=cnn8")


@pytest.fixture(scope="module")
def second(cache_root, tmp_path_factory) -> str:
    """What a second task teacher says of the digits, as the command line writes it."""
    path = tmp_path_factory.mktemp("second") / "second.npy"
    words = [
        "evaluate",
        "method.name=kd",
        "teacher.name=cnn8",
        "teacher.epochs=2",
        f"cache={cache_root}",
    ]
    assert main("richkd", ABOUT, VERBS, [*words, "--logits", str(path), "--json"]) == 0
    return str(path)


@pytest.mark.parametrize(
    "name", [*(f"control/{c}" for c in CONTROLS), *(f"regime/{r}" for r in REGIMES)]
)
def test_each_control_and_regime_runs_on_the_digits(miniature, second, cache_root, tmp_path, name):
    words = [name, *SHORT, f"cache={cache_root}", *REGIMES.get(name.removeprefix("regime/"), ())]
    words += [f"clip.logits={second}"] * (name == "control/second-teacher")
    found = distill.test(distill.run(build(read(words)), tmp_path / "run"))
    assert 0 <= found["test/top1"] <= 100
    assert ("fused/top1" in found) == (name != "control/smoothing")


def test_the_printed_list_is_for_cifar_100_alone(tmp_path):
    config = build(read(["cifar100", "regime/long-tail-table14"]))
    assert config.data.imbalance == "table14"
    with pytest.raises(ConfigError, match="printed for 100 classes"):
        distill.open_task(build(read(["regime/long-tail-table14"])))


def test_written_logits_are_those_of_the_teacher_in_the_order_of_the_source(second, cache_root):
    words = ["method.name=kd", "teacher.name=cnn8", "teacher.epochs=2", f"cache={cache_root}"]
    config = build(read(words))
    task = distill.open_task(config)
    own = distill.open_teacher(config, task).task
    dataset = load(Config().data)
    for field in ("clip.logits", "teacher.logits"):
        train, test = logits.aligned(second, dataset, field=field)
        assert torch.equal(train, own.train) and torch.equal(test, own.test)
    given = build(read(["method.name=kd", f"teacher.logits={second}"]))
    shown = distill.evaluate_teachers(task, distill.open_teacher(given, task))["teacher"]
    assert shown == distill.evaluate_teachers(task, distill.open_teacher(config, task))["teacher"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.name=kd", "--logits=x.csv"], "must name a file that ends in .npy"),
        (["method.name=ce", "--logits=x.npy"], "has none"),
        (["method.name=clip", "--logits=x.npy"], "method.name=clip has none"),
        (["teacher.logits=y.npy", "--logits=x.npy"], "use that file"),
        (["run", "--logits=x.npy"], "give layers"),
    ],
)
def test_logits_that_cannot_be_written_are_told(
    miniature, monkeypatch, tmp_path, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({}))
    assert main("richkd", ABOUT, VERBS, ["evaluate", *words]) == 2
    assert message in capsys.readouterr().err
