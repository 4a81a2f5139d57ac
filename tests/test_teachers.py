"""The fused teacher as its parts and the formulas say."""

import warnings
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import normalize

from richkd import checkpoint, distill, fusion, losses, models, teachers, zeroshot
from richkd.config import Clip, Config, Extra, Fusion, Loss, Teacher, Train
from richkd.data import Dataset, Images, Split, Views
from richkd.errors import ConfigError, DataError
from richkd.evaluate.accuracy import network_logits
from richkd.layers import digest, to_dict
from richkd.models.library import Preprocessing
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
    assert torch.equal(teacher.said(rows, views).target, expected)


def test_the_task_teacher_sees_the_student_s_crops_and_the_zero_shot_teacher_does_not():
    task, clip = task_network(), clip_teacher()
    rows, views = BATCH
    with torch.no_grad():
        logits = task.network(VIEWS["train"].images(rows, views))
    found = fused(task, clip, alpha=0.7).said(rows, views).target
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
    assert torch.equal(teacher.said(rows, views).target, expected)
    assert teacher.temperature == 3.0


@pytest.mark.parametrize("task", [None, task_table()])
@pytest.mark.parametrize("space", ["logits", "probs"])
def test_alpha_zero_is_the_zero_shot_teacher_alone(task, space):
    clip = clip_teacher()
    rows, views = BATCH
    found = fused(task, clip, alpha=0.0, space=space).said(rows, views).target
    assert torch.equal(found, torch.log_softmax(clip.train[rows] / 3.0, 1))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("scale", ["model", "match_std"])
def test_the_relative_temperature_keeps_the_sharpness_of_the_task_teacher(alpha, scale):
    task = task_table()
    clip = clip_teacher()
    teacher = fused(task, clip, scale=scale, alpha=alpha, temperature=2.0, temperature_of="task")
    own, both = (fusion.spread(logits[TRANSFER]) for logits in (task.train, teacher.fused("train")))
    assert both / teacher.temperature == pytest.approx(own / 2.0, rel=1e-9)


def test_no_table_is_copied_on_the_way_to_scales_and_temperatures(monkeypatch):
    options = {"scale": "match_std", "alpha": 0.3, "temperature_of": "task"}
    whole = fused(task_table(), clip_teacher(), **options)
    looked_at, spread = [], fusion.spread

    def told(blocks):
        def each():
            for block in blocks:
                looked_at.append(len(block))
                yield block

        return spread(each())

    monkeypatch.setattr(fusion, "CELLS", 7 * CLASSES)
    monkeypatch.setattr(fusion, "spread", told)
    parts = fused(task_table(), clip_teacher(), **options)
    assert max(looked_at) == 7
    assert sum(looked_at) == 4 * len(TRANSFER)
    assert parts.factors == pytest.approx(whole.factors, rel=1e-12)
    assert parts.temperature == pytest.approx(whole.temperature, rel=1e-12)


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
        found.append((teacher.said(*BATCH).target, teacher.temperature, teacher.factors[0]))
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
    found = fused(task, silent, alpha=0.5, temperature=3.0).said(*BATCH).target
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
    target = fused(task, clip_teacher()).said(*BATCH).target
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
        target = teacher.said(torch.arange(ROWS), torch.zeros(ROWS, 3, dtype=torch.long)).target
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


def test_a_teacher_s_checkpoint_gives_its_logits(tmp_path):
    network = saved_teacher(tmp_path / "last")
    task = open_saved(tmp_path)
    rows, views = BATCH
    with torch.no_grad():
        expected = network(VIEWS["train"].images(rows, views))
    torch.testing.assert_close(task.logits(rows, views), expected)
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
    with pytest.raises(ConfigError, match=f"or a file of weights but {tmp_path}/none is missing"):
        open_saved(tmp_path / "none")
    with pytest.raises(ConfigError, match=f"teacher.checkpoint: {tmp_path} holds no checkpoint"):
        open_saved(tmp_path)


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
        "text_matrix": lambda *_, **__: text,
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


@pytest.mark.parametrize(("epochs", "schedule"), [(240, "steps"), (100, "cosine")])
def test_a_teacher_of_as_many_epochs_follows_the_student_s_steps(epochs, schedule):
    train = Train(schedule="steps", milestones=(100, 200))
    recipe = teachers.teacher_recipe(Config(train=train, teacher=Teacher(epochs=epochs)))
    assert recipe.train.schedule == schedule
    assert recipe.train.milestones == ((100, 200) if schedule == "steps" else None)


# networks of other projects, and what they see

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def coloured(rows=48, seed=0, shift=60):
    """Return a data set of colour images of 16 x 16 whose class is its brightness."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % CLASSES
    pixels = rng.integers(0, 60, (rows, 16, 16, 3)) + 45 * labels[:, None, None, None] + shift
    part = {
        "train": Images(pixels=pixels.astype(np.uint8), labels=labels),
        "test": Images(
            pixels=pixels[: rows // 2].astype(np.uint8)[:, ::-1].copy(),
            labels=labels[: rows // 2],
            ids=np.arange(rows, rows + rows // 2),
        ),
    }
    return Dataset(name="colours", names=TOY.names, pad=2, flip=True, first_test=rows, **part)


COLOURS = coloured()


def views_of(dataset):
    return [Views(getattr(dataset, part), dataset, CPU) for part in ("train", "test")]


def foreign_teacher(folder, name="resnet8", seed=0, **options):
    """Write a network's weights as another project does; return it and its file."""
    torch.manual_seed(seed)
    network = models.build(name, CLASSES, **options).eval()
    torch.save({"model": network.state_dict()}, folder / f"{seed}.pth")
    return network, Teacher(name=name, checkpoint=str(folder / f"{seed}.pth"))


def open_foreign(config, dataset=COLOURS, root=None):
    return teachers.open_task(config, None, dataset, *views_of(dataset), root)


@pytest.mark.parametrize("size", [None, 16, 8, 24])
@pytest.mark.parametrize("given", [False, True])
def test_what_a_foreign_teacher_sees_follows_the_shared_augmentation(tmp_path, size, given):
    network, config = foreign_teacher(tmp_path)
    config = replace(config, size=size, **({"mean": MEAN, "std": STD} if given else {}))
    task, train = open_foreign(config), views_of(COLOURS)[0]
    rows = torch.tensor([3, 0, 40])
    views = torch.tensor([[0, 1, 0], [4, 2, 1], [2, 2, 0]])
    mean, std = (MEAN, STD) if given else (COLOURS.mean, COLOURS.std)
    for found, crops in (
        (task.logits(rows, views), train.pixels(rows, views)),
        (task.train[rows], train.pixels(rows)),
    ):
        images = normalize(crops.permute(0, 3, 1, 2) / 255, mean, std)
        if size is not None:
            images = F.interpolate(images, size=(size, size), mode="bilinear")
        with torch.no_grad():
            torch.testing.assert_close(found, network(images), atol=1e-4, rtol=1e-4)


def test_a_foreign_transformer_knows_the_places_of_what_it_sees(tmp_path):
    network, config = foreign_teacher(tmp_path, "t2t_vit_7", size=(16, 16))
    found = open_foreign(replace(config, size=16)).train
    pixels = torch.from_numpy(COLOURS.train.pixels).permute(0, 3, 1, 2) / 255
    images = F.interpolate(normalize(pixels, COLOURS.mean, COLOURS.std), (16, 16), mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(found, network(images), atol=1e-4, rtol=1e-4)


def test_a_foreign_teacher_is_known_by_its_weights_and_by_what_it_sees(tmp_path):
    _, config = foreign_teacher(tmp_path)
    _, other = foreign_teacher(tmp_path, seed=1)
    configs = [
        config,
        other,
        replace(config, mean=MEAN, std=STD),
        replace(config, mean=MEAN, std=(0.2, 0.2, 0.2)),
        replace(config, mean=(0.5, 0.5, 0.5), std=STD),
        replace(config, size=8),
    ]
    found = [open_foreign(config).identity for config in configs]
    assert len(set(found)) == len(configs)
    assert open_foreign(config).identity == found[0]
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "w.pth"
    moved.write_bytes((tmp_path / "0.pth").read_bytes())
    assert open_foreign(replace(config, checkpoint=str(moved))).identity == found[0]


def test_what_a_teacher_says_of_whole_parts_is_computed_once(tmp_path, monkeypatch):
    network, config = foreign_teacher(tmp_path)
    asked = []
    plain = TaskTeacher._run

    def counted(self, part, rows, views=None):
        asked.append(len(rows))
        return plain(self, part, rows, views)

    monkeypatch.setattr(TaskTeacher, "_run", counted)
    first = open_foreign(config, root=tmp_path / "cache")
    found = first.train, first.test
    assert sum(asked) == 48 + 24
    again = open_foreign(config, root=tmp_path / "cache")
    assert torch.equal(again.train, found[0])
    assert torch.equal(again.test, found[1])
    assert sum(asked) == 48 + 24
    for logits, views in zip(found, views_of(COLOURS), strict=True):
        expected = network_logits(network, views, torch.arange(len(views)))
        torch.testing.assert_close(logits, expected)
    open_foreign(replace(config, size=8), root=tmp_path / "cache").train  # noqa: B018
    assert sum(asked) == 48 + 24 + 48


def test_kept_logits_are_those_of_the_normalisation_in_use(tmp_path):
    # the same test images beside other training images, which the normalisation comes from
    _, config = foreign_teacher(tmp_path)
    other = replace(COLOURS, train=coloured(seed=1, shift=40).train, mean=None, std=None)
    assert other.test.digest == COLOURS.test.digest
    kept = open_foreign(config, root=tmp_path / "cache").test
    assert not torch.equal(open_foreign(config, other, tmp_path / "cache").test, kept)
    direct = open_foreign(config, other).test
    assert torch.equal(open_foreign(config, other, tmp_path / "cache").test, direct)


@pytest.mark.parametrize("changes", [{"mean": (0.5,), "std": (0.5,)}, {"mean": MEAN, "std": (1,)}])
def test_a_normalisation_has_a_number_a_channel(tmp_path, changes):
    _, config = foreign_teacher(tmp_path)
    with pytest.raises(ConfigError, match="a number for each channel of colours, 3, but have"):
        open_foreign(replace(config, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": MEAN, "std": STD},
        {"mean": MEAN, "std": STD, "logits": "x"},
        {"size": 16, "logits": "x"},
    ],
)
def test_what_a_teacher_sees_is_refused_where_no_network_is_brought(changes):
    with pytest.raises(ConfigError, match="is a matter of teacher.checkpoint or teacher.pretr"):
        Teacher(**changes)


@pytest.mark.parametrize("tag", ["default", "some_tag"])
@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_a_published_teacher_sees_what_it_was_trained_on(monkeypatch, tag, name):
    torch.manual_seed(0)
    network = models.build(name, CLASSES)
    wanted = Preprocessing(mean=MEAN, std=STD, size=24)
    fake = create_autospec(models.library.pretrained, return_value=(network, wanted))
    monkeypatch.setattr(models.library, "pretrained", fake)
    task = open_foreign(Teacher(name=name, pretrained=tag))
    fake.assert_called_once_with(name, "" if tag == "default" else tag)
    pixels = torch.from_numpy(COLOURS.train.pixels[:5]).permute(0, 3, 1, 2) / 255
    images = F.interpolate(normalize(pixels, MEAN, STD), size=(24, 24), mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(task.plain(torch.arange(5)), network.eval()(images))
    own = open_foreign(Teacher(name=name, pretrained=tag, mean=(0.5,) * 3, std=STD, size=16))
    assert own.identity != task.identity
    images = normalize(pixels, (0.5,) * 3, STD)
    with torch.no_grad():
        torch.testing.assert_close(own.plain(torch.arange(5)), network.eval()(images))
    other = open_foreign(Teacher(name=f"{name}_of_another_activation", pretrained=tag))
    assert other.identity != task.identity
    network.head.weight.data[0, 0] += 1
    assert open_foreign(Teacher(name=name, pretrained=tag)).identity != task.identity


def test_a_published_teacher_of_other_classes_is_refused(monkeypatch):
    network = models.build("timm/resnet18", 1000)
    fake = create_autospec(
        models.library.pretrained, return_value=(network, Preprocessing(mean=MEAN, std=STD))
    )
    monkeypatch.setattr(models.library, "pretrained", fake)
    message = "teacher.pretrained=default of timm/resnet18 knows 1000 classes but colours has 4"
    with pytest.raises(DataError, match=message):
        open_foreign(Teacher(name="timm/resnet18", pretrained="default"))


class ByBrightness(torch.nn.Module):
    """Knows the class by the brightness of an image as `mean` and `std` show it."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def forward(self, images):
        """Return logits by how near the brightness is to that of each class."""
        grey = 255 * (images * self.std + self.mean).mean((1, 2, 3))
        return -(grey[:, None] - torch.tensor([90.0, 135.0, 180.0, 225.0])).square() / 100


def brightness_teacher(mean, std):
    train, test = views_of(COLOURS)
    return TaskTeacher(
        identity="b",
        classes=CLASSES,
        train_views=train,
        test_views=test,
        network=ByBrightness(mean, std),
    )


EVERY = torch.arange(48), torch.from_numpy(COLOURS.train.labels)


def test_a_network_that_was_trained_under_imagenet_s_normalisation_is_found_out():
    with pytest.warns(UserWarning, match="labelled rows, under ImageNet's on 100.0 %") as caught:
        teachers.check_normalisation(brightness_teacher(MEAN, STD), *EVERY)
    (warning,) = caught
    assert "give teacher.mean=[0.485,0.456,0.406] teacher.std=[0.229,0.224,0.225]" in str(
        warning.message
    )


@pytest.mark.filterwarnings("error")
def test_a_network_that_fits_the_data_s_normalisation_is_left_alone(tmp_path):
    teachers.check_normalisation(brightness_teacher(COLOURS.mean, COLOURS.std), *EVERY)
    saved_teacher(tmp_path / "last")  # of grey images, to which nothing of this applies
    teachers.check_normalisation(open_saved(tmp_path), torch.arange(ROWS), LABELS)


def checked(teacher, own=None, clips=()):
    task = SimpleNamespace(split=SPLIT, labels=LABELS)
    distill._looked_at.clear()  # or each is looked at once a process
    distill.check_teachers(teacher, task, own, list(clips))


@pytest.mark.parametrize("source", ["checkpoint", "pretrained", "logits"])
def test_a_teacher_that_only_guesses_is_named_by_its_key(source):
    teacher, table = Teacher(**{source: "x"}), torch.zeros(ROWS, CLASSES)
    table[torch.arange(ROWS), (LABELS + 1) % CLASSES] = 5
    own = TaskTeacher(identity="t", given=(table, None), **BOTH)
    with pytest.warns(
        UserWarning, match=f"teacher.{source} is right on 0.0 % of \\d+ labelled rows"
    ):
        checked(teacher, own)
    own.given = table.roll(-1, 1), None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked(teacher, own)


@pytest.mark.filterwarnings("error")
def test_of_two_classes_a_teacher_that_is_right_on_70_percent_is_no_guess():
    labels = torch.arange(100) % 2
    said = torch.where(torch.arange(100) < 70, labels, 1 - labels)
    teachers.check_sense("clip.prompts", 5 * F.one_hot(said, 2).float(), labels)
    with pytest.raises(UserWarning, match="is right on 50.0 %"):
        teachers.check_sense(
            "clip.prompts", 5 * F.one_hot(labels[:1], 2).float().expand(100, 2), labels
        )


def test_probabilities_in_place_of_logits_are_told_apart():
    labels, logits = torch.arange(60) % 3, 5 * F.one_hot(torch.arange(60) % 3, 3).float()
    with pytest.warns(UserWarning, match="clip.logits holds rows that sum to 1: .* probabilities"):
        teachers.check_sense("clip.logits", logits.softmax(1), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teachers.check_sense("clip.logits", logits, labels)
        teachers.check_sense("clip.logits", logits.log_softmax(1), labels)


def test_a_teacher_whose_weights_are_not_finite_is_refused_by_its_key(tmp_path):
    network, config = foreign_teacher(tmp_path)
    network.head.bias.data[1] = torch.nan
    torch.save(network.state_dict(), config.checkpoint)
    with pytest.raises(
        DataError, match="teacher.checkpoint must give finite logits .* 8 of 8 labelled"
    ):
        distill.check_teachers(
            config,
            SimpleNamespace(
                split=SimpleNamespace(validation=np.arange(8), digest="nan"), labels=EVERY[1]
            ),
            open_foreign(config),
            [],
        )


def test_a_teacher_that_is_refused_is_refused_again():
    own = TaskTeacher(identity="constant", given=(torch.ones(ROWS, CLASSES), None), **BOTH)
    for _ in range(2):
        with pytest.raises(DataError, match="the same logit for all classes"):
            distill.check_teachers(
                Teacher(logits="x"), SimpleNamespace(split=SPLIT, labels=LABELS), own, []
            )


def test_the_same_teachers_are_looked_at_once_a_process():
    table = torch.zeros(ROWS, CLASSES)
    table[torch.arange(ROWS), (LABELS + 1) % CLASSES] = 5
    own = TaskTeacher(identity="t", given=(table, None), **BOTH)
    with pytest.warns(UserWarning, match="is right on 0.0 %"):
        checked(Teacher(logits="x"), own)
    task = SimpleNamespace(split=SPLIT, labels=LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill.check_teachers(Teacher(logits="x"), task, own, [])


def test_a_constant_teacher_is_refused_by_its_key():
    flat = ClipTeacher(
        identity="c",
        train=torch.ones(ROWS, CLASSES),
        test=None,
        logit_scale=None,
        source="clip.extra[0].logits",
    )
    with pytest.raises(DataError, match=r"clip.extra\[0\].logits gives each image the same"):
        checked(Teacher(), clips=[flat])


# several zero-shot teachers


def three(folder, scale="model", shares=(0.2, 0.3), rows=(ROWS + 20, ROWS + 20, ROWS + 20)):
    """Return the config of three given zero-shot teachers, and their logits."""
    rng = np.random.default_rng(5)
    tables = [rng.normal(k, 1 + 3 * k, (n, CLASSES)).astype(np.float32) for k, n in enumerate(rows)]
    specs = []
    for k, table in enumerate(tables):
        np.save(folder / f"{k}.npy", table)
        specs.append(str(folder / f"{k}.npy"))
    extra = [Extra(logits=s, weight=w) for s, w in zip(specs[1:], shares, strict=True)]
    return Clip(logits=specs[0], scale=scale, extra=extra), tables


def opened_clips(config, folder):
    return teachers.open_clip_teachers(config, TOY, CPU, folder, None)


@pytest.mark.parametrize("scale", ["model", "match_std", "calibrated"])
def test_several_zero_shot_teachers_are_mixed_by_their_shares_each_at_its_scale(tmp_path, scale):
    config, tables = three(tmp_path, scale)
    task, clips = task_table(), opened_clips(config, tmp_path)
    teacher = FusedTeacher(
        Config(clip=config, fusion=Fusion(alpha=0.6)), SPLIT, LABELS, task, clips
    )
    own, wide = task.train.double().numpy(), [table.astype(np.float64) for table in tables]

    def spread(values):
        return (values - values.mean(1, keepdims=True)).std()

    if scale == "model":
        factors = [1.0] * 3
    elif scale == "match_std":
        factors = [spread(own[:28]) / spread(table[:28]) for table in wide]
    else:
        fitted = [
            fusion.fit_temperature(torch.from_numpy(table[28:ROWS]), LABELS[28:])
            for table in (own, *wide)
        ]
        factors = [fitted[0] / each for each in fitted[1:]]
    mixed = sum(w * f * table for w, f, table in zip((0.5, 0.2, 0.3), factors, wide, strict=True))
    assert [clip.weight for clip in clips] == pytest.approx([0.5, 0.2, 0.3])
    assert teacher.factors == pytest.approx(factors, rel=1e-4)
    np.testing.assert_allclose(teacher.zero_shot["train"], mixed[:ROWS], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(teacher.zero_shot["test"], mixed[ROWS:], rtol=1e-3, atol=1e-3)
    expected = (0.6 * own + 0.4 * mixed[:ROWS])[BATCH[0]] / 3
    expected = torch.from_numpy(expected).log_softmax(1).float()
    torch.testing.assert_close(teacher.said(*BATCH).target, expected, rtol=1e-3, atol=1e-3)


def test_all_zero_shot_teachers_that_take_part_are_known_by_what_they_say(tmp_path):
    config, _ = three(tmp_path)
    clips = opened_clips(config, tmp_path)
    identities = FusedTeacher(Config(clip=config), SPLIT, LABELS, task_table(), clips).identities
    assert list(identities) == ["teacher", "clip", "clip 2", "clip 3"]
    assert len(set(identities.values())) == 4
    assert [clip.source for clip in clips] == [
        *("clip.logits", "clip.extra[0].logits", "clip.extra[1].logits"),
    ]


def test_a_teacher_without_a_share_is_not_opened(tmp_path):
    config, tables = three(tmp_path, shares=(0.0, 1.0))
    for k in (0, 1):
        (tmp_path / f"{k}.npy").unlink()
    (clip,) = opened_clips(config, tmp_path)
    assert (clip.source, clip.weight) == ("clip.extra[1].logits", 1.0)
    assert np.array_equal(clip.train, tables[2][:ROWS])


def test_test_logits_that_one_does_not_have_make_the_mixture_unknown(tmp_path):
    config, _ = three(tmp_path, rows=(ROWS + 20, ROWS, ROWS + 20))
    clips = opened_clips(config, tmp_path)
    assert [clip.test is None for clip in clips] == [False, True, False]
    teacher = FusedTeacher(Config(clip=config), SPLIT, LABELS, task_network(), clips)
    assert set(teacher.shown("test")) == {"teacher"}
    assert set(teacher.shown("train")) == {"teacher", "clip", "fused"}


def test_an_error_in_a_further_teacher_names_its_place(tmp_path):
    config, _ = three(tmp_path, rows=(ROWS, ROWS, ROWS - 1))
    with pytest.raises(DataError, match=r"clip.extra\[1\].logits must hold one row an image"):
        opened_clips(config, tmp_path)
