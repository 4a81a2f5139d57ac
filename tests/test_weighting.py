"""One weight a row: what it may know, what it leaves alone, and what it does to a run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real import needs_real_outputs, outputs

from richkd import distill, fusion, theory, weighting
from richkd.config import Config, Fusion, Loss
from richkd.data import Split
from richkd.errors import ConfigError, DataError
from richkd.layers import build, read
from richkd.teachers import ClipTeacher, FusedTeacher, TaskTeacher
from tune.first import as_printed
from tune.space import read_space
from tune.warmstart import printed

BY = ("class", "confidence")
ROWS, CLASSES = 200, 4
HELD_OUT = np.arange(0, ROWS, 2)
LEARNT = np.arange(1, ROWS, 2)


def made(seed: int, rows: int = ROWS, classes: int = CLASSES):
    """Return the logits of a task teacher that is surer and of a zero-shot one, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    right = np.eye(classes)[labels]
    loud = rng.uniform(0.2, 5, (rows, 1))  # so that it is surer of some rows than of others
    task = loud * (2 * right + rng.normal(size=(rows, classes)))
    clip = 1.5 * right + rng.normal(size=(rows, classes)) + 22
    return torch.from_numpy(task), torch.from_numpy(clip), torch.from_numpy(labels)


def teacher(by: str = "one", seed: int = 0, labels=None, keys=None, **fused) -> FusedTeacher:
    """Return a fused teacher of two tables of logits; the test rows are the training rows again, but of no fold."""
    task, clip, own = made(seed)
    on_cpu = SimpleNamespace(device=torch.device("cpu"))
    split = Split(
        transfer=LEARNT, labels=np.full(ROWS, -1), validation=HELD_OUT, digest="", balanced=False
    )
    config = Config(fusion=Fusion(weighting=by, **fused), loss=Loss(**(keys or {})))
    task, clip = task.float(), clip.float()
    return FusedTeacher(
        config,
        split,
        own if labels is None else labels,
        TaskTeacher(
            identity="t",
            classes=CLASSES,
            train_views=on_cpu,
            test_views=on_cpu,
            given=(task, task),
        ),
        [ClipTeacher(identity="c", train=clip, test=clip, logit_scale=1.0)],
    )


def said(found: FusedTeacher, rows=LEARNT) -> torch.Tensor:
    return found.said(torch.from_numpy(rows), torch.zeros(len(rows), 3, dtype=torch.int64)).target


def odds_by_hand(task, clip, labels, chosen) -> float:
    """Return a* / (1 - a*) of the chosen rows and PRIOR of all, in NumPy, a row at a time."""

    def unit(x):
        x = x - x.mean(1, keepdims=True)
        return x / np.sqrt((x**2).mean())

    classes = task.shape[1]
    t, c, f = unit(task.numpy()), unit(clip.numpy()), unit(np.eye(classes)[labels.numpy()])
    each = []
    for k in range(len(t)):
        e_t, e_c = t[k] - f[k], c[k] - f[k]
        each.append((np.mean(e_c * (e_c - e_t)), np.mean((e_t - e_c) ** 2)))
    each = np.array(each)
    part, whole = each[chosen.numpy()].sum(0) + weighting.PRIOR * each.mean(0)
    weight = np.clip(part / whole, *weighting.BOUNDS)
    return weight / (1 - weight)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), by=st.sampled_from(BY), alpha=st.floats(0.01, 0.99))
def test_the_odds_of_alpha_are_moved_as_those_of_the_best_weight_are(seed, by, alpha):
    task, clip, labels = made(seed, 90)
    found = weighting.fit(by, task, clip, labels, weighting.folds(90, seed))
    groups = task.argmax(1)
    if by == "confidence":
        temperature = fusion.fit_temperature(task, labels)
        top = (task / temperature).softmax(1).max(1).values.numpy()
        # five bins of 18 rows each: a row's bin is its rank
        groups = torch.from_numpy(np.argsort(np.argsort(top)) // 18)
    everywhere = odds_by_hand(task, clip, labels, torch.ones(90, dtype=torch.bool))
    for group in groups.unique():
        moved = odds_by_hand(task, clip, labels, groups == group) / everywhere
        expected = alpha * moved / (alpha * moved + 1 - alpha)
        assert found.alphas(alpha, task)[groups == group].numpy() == pytest.approx(expected)


def test_with_many_rows_a_group_s_weight_is_the_best_of_its_own():
    task, clip, labels = made(0, 20_000)
    found = weighting.fit("class", task, clip, labels, weighting.folds(20_000, 0))
    errors = theory.errors(task, clip, labels)
    overall = errors.mapped(errors.full())
    e_t, e_c, wide, narrow = theory.residuals(task, clip, labels)
    alphas = found.alphas(overall, task)
    for k in range(CLASSES):
        rows = task.argmax(1) == k
        grid = np.linspace(0, 1, 1001)
        each = [(a * e_t[rows] + (1 - a) * e_c[rows]).square().mean().item() for a in grid]
        best = grid[int(np.argmin(each))]
        mapped = best / wide / (best / wide + (1 - best) / narrow)
        assert alphas[rows][0].item() == pytest.approx(mapped, abs=0.005)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    by=st.sampled_from(BY),
    row=st.integers(0, len(HELD_OUT) - 1),
)
def test_a_held_out_row_s_own_label_does_not_move_its_weight(seed, by, row):
    _, _, labels = made(0)
    other = labels.clone()
    place = HELD_OUT[row]
    other[place] = (other[place] + 1 + seed % (CLASSES - 1)) % CLASSES
    one, changed = teacher(by, alpha=0.4), teacher(by, alpha=0.4, labels=other)
    assert torch.equal(one.fused("train")[place], changed.fused("train")[place])
    assert not torch.equal(one.fused("test"), changed.fused("test"))  # where all of them count


@pytest.mark.parametrize("by", BY)
def test_labels_of_rows_that_are_learnt_from_are_never_read(by):
    _, _, labels = made(0)
    other = labels.clone()
    other[LEARNT] = -1
    one, changed = teacher(by, alpha=0.4), teacher(by, alpha=0.4, labels=other)
    assert torch.equal(said(one), said(changed))
    for part in ("train", "test"):
        assert torch.equal(one.fused(part), changed.fused(part))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), by=st.sampled_from(BY), factor=st.floats(0.01, 100), data=st.data()
)
def test_neither_a_constant_of_a_row_nor_the_scale_of_clip_changes_a_weight(seed, by, factor, data):
    task, clip, labels = made(seed)
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    fold = weighting.folds(ROWS, 0)
    moved = task + torch.from_numpy(rng.normal(0, 30, (ROWS, 1)))
    other = factor * clip + torch.from_numpy(rng.normal(0, 30, (ROWS, 1)))
    one, two = (
        weighting.fit(by, t, c, labels, fold).alphas(0.3, t, fold)
        for t, c in ((task, clip), (moved, other))
    )
    assert torch.allclose(one, two, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(alpha=st.floats(0.01, 0.99), seed=st.integers(0, 10_000))
def test_groups_that_are_alike_change_nothing(alpha, seed):
    task, clip, labels = made(seed, 40)
    turns = range(CLASSES)  # what is said of one class is said of each
    task, clip = (torch.cat([z.roll(k, 1) for k in turns]) for z in (task, clip))
    labels = torch.cat([(labels + k) % CLASSES for k in turns])
    found = weighting.fit("class", task, clip, labels, weighting.folds(len(labels), 0))
    assert found.alphas(alpha, task).numpy() == pytest.approx(alpha, rel=1e-9)


@pytest.mark.parametrize("by", BY)
def test_teachers_that_say_the_same_change_nothing(by):
    task, _, labels = made(2)
    found = weighting.fit(by, task, 2 * task + 22, labels, weighting.folds(ROWS, 0))
    assert found.alphas(0.3, task).numpy() == pytest.approx(0.3, rel=1e-9)


def test_a_class_that_no_held_out_row_is_taken_for_has_the_weight_of_all():
    task, clip, labels = made(1)
    task[:, 3] = -50
    found = weighting.fit("class", task, clip, labels, weighting.folds(ROWS, 0))
    unseen = torch.tensor([[0.0, 0, 0, 9]], dtype=torch.float64)
    assert found.alphas(0.3, unseen).item() == pytest.approx(0.3, rel=1e-12)
    assert not torch.allclose(found.alphas(0.3, task), torch.tensor(0.3).double(), rtol=1e-3)


def test_no_group_silences_a_teacher():
    labels = torch.arange(9000) % 3
    right = torch.nn.functional.one_hot(labels, 3).double()
    # the best weight of class 0, of which CLIP says the contrary, is above 1; of class 2, of which it knows all, below 0
    task = torch.tensor([0.8, 1.5, 0.5]).double()[labels, None] * right
    clip = torch.tensor([-1.0, 1.0, 0.9]).double()[labels, None] * right
    found = weighting.fit("class", task, clip, labels, weighting.folds(9000, 0))
    alphas = found.alphas(0.5, task)[:, 0]
    assert 0 < alphas[labels == 2].max() < 0.05
    assert alphas.max() < 1


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_zero_and_one_stay_what_they_are_bit_for_bit(by, alpha):
    plain, weighted = teacher(alpha=alpha), teacher(by, alpha=alpha)
    assert torch.equal(said(weighted), said(plain))
    assert torch.equal(weighted.fused("test"), plain.fused("test"))
    assert weighted.weighting is None  # so none is asked of a teacher without errors
    task, clip, labels = made(0)
    found = weighting.fit(by, task, clip, labels, weighting.folds(ROWS, 0))
    assert (found.alphas(alpha, task) == alpha).all()


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("keys", [{}, {"standardise": True}])
def test_the_target_of_each_row_is_that_of_its_own_weight(by, keys):
    found = teacher(by, alpha=0.4, keys=keys)
    task, clip, labels = made(0)
    task, clip = task.float(), clip.float()
    fitted = weighting.fit(
        by, task[HELD_OUT], clip[HELD_OUT], labels[HELD_OUT], weighting.folds(len(HELD_OUT), 0)
    )
    alphas = fitted.alphas(0.4, task[LEARNT])
    assert alphas.max() - alphas.min() > 0.01
    target, fused = said(found), found.fused("train")[LEARNT]
    for k, row in enumerate(LEARNT[:40]):
        pair = task[row][None], clip[row][None]
        assert torch.allclose(fused[k], fusion.fuse(*pair, alphas[k].item()), rtol=1e-5)
        one = fusion.target(
            *pair, alphas[k].item(), 3.0, "logits", standardised=bool(keys.get("standardise"))
        )
        assert torch.allclose(target[k], one[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", BY)
def test_the_relative_temperature_is_that_of_what_is_really_fused(by):
    keys = {"temperature_of": "task", "temperature": 2.0}
    found = teacher(by, alpha=0.4, keys=keys)
    own, both = (fusion.spread(z[LEARNT]) for z in (found.task.train, found.fused("train")))
    assert both / found.temperature == pytest.approx(own / 2.0, rel=1e-6)
    assert found.temperature != teacher(alpha=0.4, keys=keys).temperature


def test_folds_are_of_one_size_and_of_the_data_s_seed():
    one = weighting.folds(101, 3)
    assert sorted(one.bincount().tolist()) == [0, 20, 20, 20, 20, 21]
    assert torch.equal(one, weighting.folds(101, 3))
    assert not torch.equal(one, weighting.folds(101, 4))


def test_a_teacher_without_errors_has_no_confidence_to_calibrate():
    task, clip, labels = made(0)
    right = 5 * torch.nn.functional.one_hot(labels, CLASSES).double()
    with pytest.raises(DataError, match="right on all 200 .* Use fusion.weighting=class or one"):
        weighting.fit("confidence", right + 0.1 * task, clip, labels, weighting.folds(ROWS, 0))
    weighting.fit("class", right + 0.1 * task, clip, labels, weighting.folds(ROWS, 0))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "fusion.weighting=classes",
            "one, class, confidence but got 'classes'; did you mean class",
        ),
        ("fusion.weighting=class fusion.space=probs", "fusion.space=probs mixes probabilities"),
        ("fusion.weighting=class selection=paper", "selection=paper holds none out"),
    ],
)
def test_what_cannot_be_weighted_is_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        build(read(words.split()))


def test_a_sweep_can_choose_how_rows_are_weighted():
    def resolve(values):
        return build(read([]).over("trial", values))

    choices = ("one", "class", "confidence")
    space = read_space({"fusion.weighting": {"choice": list(choices)}}, resolve)
    assert space.choices("fusion.weighting") == choices
    assert not len(space.of_baseline())
    point = as_printed(printed("richkd-l"), space, {"fusion.weighting": "one"}, 1.0)
    assert point.params == {"fusion.weighting": "one"}


@pytest.mark.parametrize("by", ["one", *BY])
def test_a_student_learns_from_a_weighted_teacher(by, miniature, cache_root, tmp_path):
    words = f"student.name=cnn8 train.epochs=1 teacher.epochs=1 fusion.weighting={by}"
    config = build(read([*words.split(), f"cache={cache_root}", f"storage={tmp_path}"]))
    outcome = distill.run(config, tmp_path / by)
    metrics = json.loads((tmp_path / by / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(metrics["train/loss"])
    found, rows = outcome.teacher, torch.from_numpy(outcome.task.split.transfer[:64])
    task, clip = found.parts("train", rows)
    plain = fusion.fuse(task, clip, config.fusion.alpha)
    assert torch.equal(found.fused("train", rows), plain) == (by == "one")
    assert set(found.shown("test")) == {"teacher", "clip", "fused"}


@needs_real_outputs
@pytest.mark.parametrize("by", BY)
def test_on_real_outputs_one_weight_well_chosen_is_hardly_beaten(by):
    """No gain of a point hides here: a weight a row moves the accuracy of a good weight by tenths."""
    task, clip, labels = outputs("resnet20", "english")
    moved = []
    for seed in range(5):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
        held, others = order[:500], order[500:]
        alpha = theory.likeliest(task[held], clip[held], labels[held])
        found = weighting.fit(by, task[held], clip[held], labels[held], weighting.folds(500, 0))
        each = (alpha, found.alphas(alpha, task[others]))
        one, many = (
            (fusion.fuse(task[others], clip[others], a).argmax(1) == labels[others]).double().mean()
            for a in each
        )
        assert many > 0.95
        moved.append(100 * (many - one).item())
    assert abs(np.mean(moved)) < 0.4
