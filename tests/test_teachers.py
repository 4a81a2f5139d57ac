"""The fused teacher as its parts and the formulas say."""

from dataclasses import replace
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch

from richkd import checkpoint, fusion, losses, models, teachers, zeroshot
from richkd.config import Clip, Config, Fusion, Loss, Teacher, digest, to_dict
from richkd.data import Dataset, Images, Split, Views
from richkd.errors import ConfigError, DataError
from richkd.teachers import ClipTeacher, FusedTeacher, TaskTeacher

ROWS, CLASSES = 40, 4
CPU = torch.device("cpu")
LOGITS = np.random.default_rng(0).normal(0, 3, (ROWS, CLASSES)).astype(np.float32)


# the fused teacher


def toy(pad=1):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (ROWS, 8, 8, 1), dtype=np.uint8)
    train = Images(pixels=pixels, labels=np.arange(ROWS) % CLASSES)
    test = Images(
        pixels=pixels[::2],
        labels=np.arange(ROWS // 2) % CLASSES,
        ids=np.arange(ROWS, ROWS + ROWS // 2),
    )
    names = ("a", "b", "c", "d")
    return Dataset(
        name="toy", names=names, train=train, test=test, pad=pad, flip=True, first_test=ROWS
    )


TOY = toy()
SPLIT = Split(
    transfer=np.arange(0, 28), validation=np.arange(28, ROWS), labels=np.full(ROWS, -1), digest=""
)
TRANSFER = torch.from_numpy(SPLIT.transfer)
LABELS = torch.from_numpy(TOY.train.labels)
BATCH = torch.tensor([3, 0, 27, 5]), torch.tensor([[0, 1, 0], [2, 2, 1], [1, 1, 0], [0, 0, 1]])
VIEWS = {part: Views(getattr(TOY, part), TOY, CPU) for part in ("train", "test")}
BOTH = {"classes": CLASSES, "train_views": VIEWS["train"], "test_views": VIEWS["test"]}


def task_table(std=8.0):
    values = np.random.default_rng(1).normal(0, std, (ROWS, CLASSES))
    return TaskTeacher(
        identity="t", given=(torch.from_numpy(values.astype(np.float32)), None), **BOTH
    )


def task_network(seed=0):
    torch.manual_seed(seed)
    return TaskTeacher(
        identity="t", network=models.build("cnn8", CLASSES, channels=1).eval(), **BOTH
    )


def clip_teacher(logit_scale=100.0, offset=22.0):
    rng = np.random.default_rng(2)
    train, test = (
        torch.from_numpy(rng.normal(offset, 2, (rows, CLASSES)).astype(np.float32))
        for rows in (ROWS, ROWS // 2)
    )
    return ClipTeacher(identity="c", train=train, test=test, logit_scale=logit_scale)


def fused(task, clip, *, scale="model", **changes):
    """Build a FusedTeacher from keys of `fusion` and `loss`."""
    at = {key: changes.pop(key) for key in ("alpha", "space") if key in changes}
    config = Config(clip=Clip(scale=scale), fusion=Fusion(**at), loss=Loss(**changes))
    return FusedTeacher(config, SPLIT, LABELS, task, [] if clip is None else [clip])


@pytest.mark.filterwarnings("ignore:clip.scale=none")
@pytest.mark.parametrize("space", ["logits", "probs"])
@pytest.mark.parametrize("scale", ["model", "match_std", "calibrated", "none", 25.0])
def test_the_target_is_that_of_the_fused_parts(space, scale):
    task, clip = task_table(), clip_teacher()
    teacher = fused(task, clip, scale=scale, alpha=0.7, space=space, temperature=2.0)
    factor = fusion.scale_factor(
        scale,
        logit_scale=100.0,
        transfer=(task.given[0][TRANSFER], clip.train[TRANSFER]),
        held_out=(task.given[0][28:], clip.train[28:], LABELS[28:]),
    )
    rows, views = BATCH
    assert teacher.factors == [factor]
    expected = fusion.target(task.given[0][rows], factor * clip.train[rows], 0.7, 2.0, space)
    assert torch.equal(teacher.target(rows, views), expected)


def test_the_task_teacher_sees_the_student_s_crops_and_the_zero_shot_teacher_does_not():
    task, clip = task_network(), clip_teacher()
    rows, views = BATCH
    with torch.no_grad():
        logits = task.network(VIEWS["train"].images(rows, views))
    found = fused(task, clip, alpha=0.7).target(rows, views)
    assert torch.equal(found, fusion.target(logits, clip.train[rows], 0.7, 3.0, "logits"))


@pytest.mark.parametrize("clip", [None, clip_teacher()])
@pytest.mark.parametrize(
    ("temperature_of", "space"), [("fused", "logits"), ("task", "logits"), ("fused", "probs")]
)
def test_alpha_one_is_plain_distillation_bit_for_bit(clip, temperature_of, space):
    task = task_network()
    teacher = fused(task, clip, alpha=1.0, temperature_of=temperature_of, space=space)
    rows, views = BATCH
    expected = torch.log_softmax(task.logits(rows, views) / 3.0, 1)
    assert torch.equal(teacher.target(rows, views), expected)
    assert teacher.temperature == 3.0


@pytest.mark.parametrize("task", [None, task_table()])
@pytest.mark.parametrize("space", ["logits", "probs"])
def test_alpha_zero_is_the_zero_shot_teacher_alone(task, space):
    clip = clip_teacher()
    rows, views = BATCH
    found = fused(task, clip, alpha=0.0, space=space).target(rows, views)
    assert torch.equal(found, torch.log_softmax(clip.train[rows] / 3.0, 1))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("scale", ["model", "match_std"])
def test_the_relative_temperature_keeps_the_sharpness_of_the_task_teacher(alpha, scale):
    task = task_table()
    clip = clip_teacher()
    teacher = fused(task, clip, scale=scale, alpha=alpha, temperature=2.0, temperature_of="task")
    own, both = (fusion.spread(logits[TRANSFER]) for logits in (task.train, teacher.fused("train")))
    assert both / teacher.temperature == pytest.approx(own / 2.0, rel=1e-9)


@pytest.mark.parametrize(
    ("temperature_of", "space"), [("fused", "logits"), ("task", "logits"), ("fused", "probs")]
)
def test_an_offset_of_the_zero_shot_logits_changes_no_target_and_no_temperature(
    temperature_of, space
):
    found = []
    for offset in (0.0, 22.0):
        clip = clip_teacher(offset=offset)
        teacher = fused(
            task_table(), clip, scale="match_std", temperature_of=temperature_of, space=space
        )
        found.append((teacher.target(*BATCH), teacher.temperature, teacher.factors[0]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=0)
    assert found[0][1:] == pytest.approx(found[1][1:], rel=1e-5)


def test_statistics_are_taken_on_the_transfer_rows_and_temperatures_on_the_held_out_ones():
    task, clip = task_table(), clip_teacher()
    before = {s: fused(task, clip, scale=s).factors for s in ("match_std", "calibrated")}
    task.given[0][28:] *= 5
    assert fused(task, clip, scale="match_std").factors == before["match_std"]
    assert fused(task, clip, scale="calibrated").factors != before["calibrated"]
    task.given[0][:28] *= 5
    task.given[0][28:] /= 5
    assert fused(task, clip, scale="calibrated").factors == pytest.approx(before["calibrated"])


@pytest.mark.parametrize("scale", ["none", 50.0])
def test_given_zero_shot_logits_have_no_cosines_to_scale(scale):
    with pytest.raises(ConfigError, match=f"clip.scale={scale} needs cosines"):
        fused(task_table(), clip_teacher(logit_scale=None), scale=scale)


def test_zero_shot_logits_of_zero_only_soften_the_target():
    # the control "teacher at T / alpha"
    task = task_table()
    silent = ClipTeacher(
        identity="c", train=torch.zeros(ROWS, CLASSES), test=None, logit_scale=None
    )
    found = fused(task, silent, alpha=0.5, temperature=3.0).target(*BATCH)
    torch.testing.assert_close(found, torch.log_softmax(task.given[0][BATCH[0]] / 6.0, 1))


@pytest.mark.parametrize("constant", ["task", "both"])
def test_a_constant_teacher_gives_no_relative_temperature(constant):
    task, clip = task_table(), clip_teacher()
    task.given = torch.full((ROWS, CLASSES), 2.0), None
    if constant == "both":
        clip.train = torch.full((ROWS, CLASSES), 22.0)
    with pytest.raises(
        ConfigError, match="came to inf; see whether one of the teachers is constant"
    ):
        fused(task, clip, temperature_of="task")


def test_a_target_can_be_learnt_from_and_carries_no_gradient_of_its_own():
    task = task_network()
    target = fused(task, clip_teacher()).target(*BATCH)
    student = torch.zeros(4, CLASSES, requires_grad=True)
    losses.kd(student, target, 3.0, 4).backward()
    assert student.grad.abs().sum() > 0
    assert not target.requires_grad
    assert all(parameter.grad is None for parameter in task.network.parameters())


def test_the_task_teacher_s_whole_tables_are_its_logits_of_plain_images():
    task = task_network()
    for part in ("train", "test"):
        with torch.no_grad():
            expected = task.network(VIEWS[part].images(torch.arange(len(getattr(TOY, part)))))
        torch.testing.assert_close(getattr(task, part), expected)
    assert task_table().test is None
    assert not task.network.training


def test_what_is_shown_as_fused_is_what_the_student_learns():
    found = {}
    for space in ("logits", "probs"):
        teacher = fused(task_table(), clip_teacher(), alpha=0.2, space=space)
        found[space] = teacher.shown("train")["fused"].argmax(1)
        target = teacher.target(torch.arange(ROWS), torch.zeros(ROWS, 3, dtype=torch.long))
        assert torch.equal(found[space], target.argmax(1))
    assert not torch.equal(found["logits"], found["probs"])


def test_only_teachers_that_take_part_and_are_known_are_shown():
    both = fused(task_network(), clip_teacher())
    assert set(both.shown("test")) == {"teacher", "clip", "fused"}
    assert set(fused(task_network(), None, alpha=1.0).shown("test")) == {"teacher"}
    assert set(fused(None, clip_teacher(), alpha=0.0).shown("test")) == {"clip"}
    assert set(fused(task_table(), clip_teacher()).shown("test")) == {"clip"}
    assert set(fused(task_table(), clip_teacher()).shown("train")) == {"teacher", "clip", "fused"}


# where they come from


def written(folder, values):
    """Write given logits and return what names them."""
    np.save(folder / "logits.npy", values)
    return str(folder / "logits.npy")


def saved_teacher(folder, seed=0, **changes):
    """Save a network as `distill` does, and return it."""
    torch.manual_seed(seed)
    network = models.build("cnn8", CLASSES, channels=1).eval()
    config = to_dict(replace(Config(), student=replace(Config().student, name="cnn8")))
    whole = {"config": config, "names": list(TOY.names), "channels": 1}
    meta = whole | {"mean": list(TOY.mean), "std": list(TOY.std), "size": list(TOY.size)} | changes
    checkpoint.save(folder, network.state_dict(), {}, meta)
    return network


def open_saved(folder):
    return teachers.open_task(Teacher(checkpoint=str(folder)), None, TOY, *VIEWS.values())


def test_a_teacher_s_checkpoint_gives_its_logits_bit_for_bit(tmp_path):
    network = saved_teacher(tmp_path / "last")
    task = open_saved(tmp_path)
    rows, views = BATCH
    with torch.no_grad():
        assert torch.equal(task.logits(rows, views), network(VIEWS["train"].images(rows, views)))
    assert not task.network.training
    assert not any(parameter.requires_grad for parameter in task.network.parameters())
    saved_teacher(tmp_path / "other", seed=1)
    assert open_saved(tmp_path / "other").identity != task.identity


def test_a_teacher_is_shown_images_under_its_own_normalisation(tmp_path):
    network = saved_teacher(tmp_path / "last", mean=[0.1], std=[0.7])
    task = open_saved(tmp_path)
    for part in ("train", "test"):
        pixels = torch.from_numpy(getattr(TOY, part).pixels).permute(0, 3, 1, 2)
        with torch.no_grad():
            expected = network((pixels / 255 - 0.1) / 0.7)
        torch.testing.assert_close(getattr(task, part), expected, atol=1e-5, rtol=1e-5)
    assert VIEWS["train"].mean.item() == pytest.approx(255 * TOY.mean[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"names": list("abc")},
            r"knows 3 classes \(a, b, c, ...\) but toy has 4 \(a, b, c, ...\)",
        ),
        ({"names": list("abdc")}, "knows 4 classes .* but toy has 4"),
        ({"channels": 3}, "images of 3 channels but toy has 1"),
        ({"size": [9, 8]}, r"images of \[9, 8\] pixels but toy has"),
    ],
)
def test_a_teacher_of_another_task_is_refused(tmp_path, changes, message):
    saved_teacher(tmp_path / "last", **changes)
    with pytest.raises(DataError, match=message):
        open_saved(tmp_path)


def test_a_missing_teacher_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}/none holds no checkpoint"):
        open_saved(tmp_path / "none")


def test_given_logits_are_teachers_of_either_kind(tmp_path):
    spec = written(tmp_path, LOGITS)
    task = teachers.open_task(Teacher(logits=spec), None, TOY, *VIEWS.values())
    clip = teachers.open_clip_teacher(Clip(logits=spec), TOY, CPU, tmp_path, None)
    assert np.array_equal(task.train.numpy(), LOGITS)
    assert torch.equal(task.logits(*BATCH), task.train[BATCH[0]])
    assert np.array_equal(clip.train.numpy(), LOGITS)
    assert (clip.test, clip.logit_scale) == (None, None)


def test_given_logits_are_known_by_their_content(tmp_path):
    found = []
    for name, values in (("a", LOGITS), ("b", LOGITS), ("c", LOGITS + 1)):
        (tmp_path / name).mkdir()
        spec = written(tmp_path / name, values)
        clip = teachers.open_clip_teacher(Clip(logits=spec), TOY, CPU, tmp_path, None)
        task = teachers.open_task(Teacher(logits=spec), None, TOY, *VIEWS.values())
        assert clip.identity == task.identity
        found.append(clip.identity)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("field", ["teacher.logits", "clip.logits"])
def test_logits_of_another_data_set_name_the_key_that_gave_them(tmp_path, field):
    spec = written(tmp_path, LOGITS[:, :3])
    with pytest.raises(DataError, match=field):
        if field == "teacher.logits":
            teachers.open_task(Teacher(logits=spec), None, TOY, *VIEWS.values())
        else:
            teachers.open_clip_teacher(Clip(logits=spec), TOY, CPU, tmp_path, None)


@pytest.mark.parametrize("reduce", ["embedding", "logits", "probs"])
def test_a_zero_shot_teacher_is_the_product_of_its_features(monkeypatch, tmp_path, reduce):
    class Model:
        identity, logit_scale = "model", 50.0

    def unit(*shape):
        return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)

    torch.manual_seed(0)
    text = unit(3, CLASSES, 6)
    images = {part.digest: unit(len(part), 6) for part in (TOY.train, TOY.test)}
    for name, answer in {
        "load": lambda *_, **__: Model(),
        "text_matrix": lambda *_: text,
        "image_features": lambda _, part, *__: images[part.digest],
    }.items():  # each is held to the arguments of the function that it stands for
        stand_in = create_autospec(getattr(zeroshot, name), side_effect=answer)
        monkeypatch.setattr(zeroshot, name, stand_in)
    clip = teachers.open_clip_teacher(Clip(reduce=reduce), TOY, CPU, tmp_path, None)
    assert clip.logit_scale == 50.0
    for found, part in ((clip.train, TOY.train), (clip.test, TOY.test)):
        expected = fusion.zero_shot_logits(images[part.digest], text, 50.0, reduce)
        assert torch.equal(found, expected)


def test_the_teacher_s_recipe_ignores_what_does_not_concern_it():
    base = Config(teacher=Teacher(name="cnn24", epochs=7, lr=0.3))
    recipe = teachers.teacher_recipe(base)
    assert (recipe.student.name, recipe.train.epochs, recipe.train.lr) == ("cnn24", 7, 0.3)
    assert (recipe.loss.ce, recipe.loss.logit, recipe.fusion.alpha) == (1, 0, 1)
    others = (
        replace(base, fusion=Fusion(alpha=0.2, space="probs")),
        replace(base, clip=Clip(scale=25.0, prompts="x")),
        replace(base, loss=Loss(temperature=1.0, temperature_of="task")),
        replace(base, student=replace(base.student, name="cnn8")),
        replace(base, train=replace(base.train, epochs=99, lr=0.9)),
        replace(base, data=replace(base.data, labelled_share=0.5)),
        replace(base, method=replace(base.method, name="kd")),
    )
    assert {digest(teachers.teacher_recipe(other)) for other in others} == {digest(recipe)}
    for other in (replace(base, seed=1), replace(base, data=replace(base.data, seed=1))):
        assert digest(teachers.teacher_recipe(other)) != digest(recipe)
