"""CLIP over crops: which views are stored, which stands for a crop, and that both ways give what CLIP says of the crop."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from richkd import cache, distill, fusion, teachers, zeroshot
from richkd.config import Config
from richkd.data import load
from richkd.errors import ConfigError
from richkd.layers import build, read
from richkd.zeroshot import crops

ALL = [(0, 1), (1, 1), (1, 2), (2, 2), (4, 2)]  # pad and flips


def every(pad: int, flips: int) -> list[tuple[int, int, int]]:
    return list(itertools.product(range(2 * pad + 1), range(2 * pad + 1), range(flips)))


def offset(a: tuple, b: tuple) -> float:
    return math.dist(a[:2], b[:2])


# which views


@pytest.mark.parametrize(("pad", "flips"), ALL)
def test_order_has_each_view_once_and_a_longer_one_goes_on_from_a_shorter(pad, flips):
    views = every(pad, flips)
    whole = crops.order(pad, flips, len(views))
    assert sorted(whole) == views
    for count in range(1, len(views)):
        assert crops.order(pad, flips, count) == whole[:count]


@pytest.mark.parametrize(("pad", "flips"), ALL)
def test_each_view_is_as_far_as_can_be_from_those_before(pad, flips):
    def gap(view, before):
        return min(offset(view, b) if view[2] == b[2] else math.inf for b in before)

    views = every(pad, flips)
    order = crops.order(pad, flips, len(views))
    assert order[0] == (pad, pad, 0)
    for k in range(1, len(views)):
        left = [view for view in views if view not in order[:k]]
        farthest = max(gap(view, order[:k]) for view in left)
        equal = [view for view in left if gap(view, order[:k]) == farthest]
        assert order[k] == min(equal, key=lambda view: (offset(view, (pad, pad)), view))
    if flips == 2:
        assert order[1] == (pad, pad, 1)


@pytest.mark.parametrize(("pad", "flips"), ALL)
def test_a_crop_is_told_by_the_nearest_stored_view_of_its_flip(pad, flips):
    views = every(pad, flips)
    for count in {1, 2, 3, 5, len(views)} & set(range(len(views) + 1)):
        stored = crops.order(pad, flips, count)
        found = crops.nearest(stored, pad, flips)
        for view in views:
            own = [k for k in range(count) if stored[k][2] == view[2]] or range(count)
            assert found[view] == min(own, key=lambda k: (offset(stored[k], view), k))


# what CLIP says of them


@pytest.fixture(scope="module")
def digits():
    """The digits as if a mirror image were one: 18 views."""
    return load(build(read(["data.flip=true"])).data)


@pytest.fixture
def fresh(miniature, tmp_path):
    """The miniature with a cache of its own."""
    return zeroshot.ZeroShot(miniature.identity, lambda: miniature.encoder, tmp_path)


@pytest.fixture(scope="module")
def batch(digits):
    """Every view at least once."""
    views = torch.tensor(every(digits.pad, 2)).repeat(3, 1)
    rows = torch.randint(len(digits.train), (len(views),), generator=torch.manual_seed(0))
    return rows, views


def seen(digits, clip, rows, views):
    """Return the features of crops that are cut by hand."""
    p, pictures = digits.pad, []
    for row, (dy, dx, flip) in zip(rows.tolist(), views.tolist(), strict=True):
        pixels = np.pad(digits.train.pixels[row, ..., 0], p)[dy : dy + 8, dx : dx + 8]
        pictures.append(Image.fromarray(np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)))
    return clip.encoder.encode_images(pictures)


@pytest.mark.parametrize("views", [18, "online"])
def test_all_stored_views_and_clip_itself_tell_of_the_crop_alike(
    digits, fresh, batch, tmp_path, views
):
    found = zeroshot.crop_features(fresh, views, digits, tmp_path)(*batch)
    torch.testing.assert_close(found, seen(digits, fresh, *batch), atol=1e-5, rtol=0)


def test_few_stored_views_give_the_features_of_the_nearest(digits, fresh, batch, tmp_path):
    stored, (rows, views) = torch.tensor(crops.order(1, 2, 5)), batch
    near = stored[crops.nearest([tuple(v) for v in stored.tolist()], 1, 2)[tuple(views.T)]]
    found = zeroshot.crop_features(fresh, 5, digits, tmp_path)(rows, views)
    torch.testing.assert_close(found, seen(digits, fresh, rows, near), atol=1e-5, rtol=0)
    assert not torch.allclose(found, seen(digits, fresh, rows, views), atol=1e-2)


def entries(root: Path) -> dict[str, int]:
    """Return the tables of image features, each with the inode of its file."""
    return {
        path.parent.name: path.stat().st_ino for path in root.glob("clip-images/[!.]*/rows.npy")
    }


def test_more_views_reuse_those_of_fewer_and_an_interrupted_one_goes_on(
    digits, fresh, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache, "SHARD", 256)
    rows, told = len(digits.train), []
    zeroshot.crop_features(fresh, 2, digits, tmp_path)
    before = entries(tmp_path)

    def interrupt(what, done, total):
        assert (what, total) == ("clip-images, 5 views", 5 * rows)
        if done == 3 * rows + 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zeroshot.crop_features(fresh, 5, digits, tmp_path, interrupt)
    between = entries(tmp_path)
    zeroshot.crop_features(fresh, 5, digits, tmp_path, lambda *at: told.append(at[1]))
    after = entries(tmp_path)
    assert [len(each) for each in (before, between, after)] == [2, 3, 5]
    assert before.items() <= between.items() <= after.items()
    assert told[0] == 3 * rows + 512 and told[-1] == 5 * rows


def test_a_view_is_known_by_what_it_shows_whatever_the_padding(digits):
    wider = replace(digits, pad=3)
    digests = {crops.Crops(digits.train, digits, view).digest for view in every(1, 2)}
    assert len(digests) == 18
    centre = crops.Crops(digits.train, digits, (1, 1, 0))
    assert centre.digest == digits.train.digest
    filed = replace(digits.train, files=(Path("a.png"),) * len(digits.train))
    assert crops.Crops(filed, digits, (1, 1, 0)).digest not in digests
    shifted = crops.Crops(digits.train, wider, (2, 4, 1))
    same = crops.Crops(digits.train, digits, (0, 2, 1))
    assert shifted.digest == same.digest
    for ours, theirs in zip(shifted.pictures(0, 70), same.pictures(0, 70), strict=True):
        assert np.array_equal(ours, theirs)


def test_features_are_mapped_not_copied(digits, fresh, tmp_path):
    found = zeroshot.image_features(fresh, digits.train, tmp_path)
    (entry,) = entries(tmp_path)
    with open("/proc/self/maps") as maps:
        ranges = [line.split("-")[0] for line in maps if entry in line]
    assert any(0 <= found.data_ptr() - int(start, 16) < 4096 for start in ranges)


# as a teacher


def config(*words: str) -> Config:
    short = ["train.epochs=2", "teacher.epochs=2", "data.flip=true"]
    return build(read([*short, *words]))


def opened(made: Config) -> teachers.FusedTeacher:
    return distill.open_teacher(made, distill.open_task(made))


@pytest.mark.parametrize("scale", ["model", "match_std"])
def test_scales_and_shares_hold_for_crops_too(cache_root, batch, scale):
    extra = "clip.extra=[{model: miniature, pretrained: null, prompts: digits-written, views: 3, weight: 0.3}]"
    made = config(f"cache={cache_root}", "clip.views=18", f"clip.scale={scale}", extra)
    teacher = opened(made)
    rows, views = batch
    each = [clip.logits(rows, views) for clip in teacher.clips]
    first, second = teacher.factors
    expected = 0.7 * first * each[0] + 0.3 * second * each[1]
    torch.testing.assert_close(teacher.zero_shot_logits(rows, views), expected)
    target = fusion.target(
        teacher.task.logits(rows, views), expected, teacher.alpha, teacher.temperature, "logits"
    )
    torch.testing.assert_close(teacher.said(rows, views).target, target)
    whole = opened(config(f"cache={cache_root}", f"clip.scale={scale}"))
    assert first == whole.factors[0]
    assert torch.equal(teacher.clips[0].train, whole.clips[0].train)


def test_identity_changes_with_the_views(cache_root):
    found = [
        opened(config(f"cache={cache_root}", f"clip.views={views}")).identities["clip"]
        for views in ("whole", 1, 2, "online")
    ]
    assert len(set(found)) == 4


def test_trainings_with_all_views_and_online_are_one_and_differ_from_the_whole_image(
    cache_root, tmp_path
):
    losses = {}
    for views in ("whole", 2, 18, "online"):
        made = config(f"cache={cache_root}", f"clip.views={views}", "fusion.alpha=0.3")
        distill.run(made, tmp_path / str(views))
        lines = (tmp_path / str(views) / "metrics.jsonl").read_text().splitlines()
        losses[views] = [json.loads(line)["train/loss"] for line in lines]
    assert losses[18] == pytest.approx(losses["online"], rel=1e-4)
    for views in ("whole", 2):
        assert losses[views] != pytest.approx(losses[18], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clip.views=19"], r"clip.views must be at most 18.*but got 19"),
        (["clip.views=0"], "clip.views must be whole, online or a number .* from 1 on"),
        (["clip.views=some"], "clip.views must be whole, online or a number"),
        (["clip.views=true"], "clip.views must be a whole number or text"),
        (["clip.views=online", "clip.logits=x.npy"], "needs a model but clip.logits=x.npy knows"),
        (
            ["clip.extra=[{logits: x.npy, views: 4, weight: 0.5}]"],
            r"clip.extra\[0\]: .*needs a model",
        ),
    ],
)
def test_views_that_cannot_be_are_one_clear_line(cache_root, words, message):
    with pytest.raises(ConfigError, match=message):
        opened(config(f"cache={cache_root}", *words))
