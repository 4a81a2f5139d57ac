"""ImageNet from a folder: its classes' names, its files read one by one, its teachers."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import models
from torchvision.transforms import v2

from richkd import checkpoint, distill, load_student, zeroshot
from richkd.config import Data
from richkd.data import Stream, load, rows
from richkd.data.imagenet import names_of
from richkd.errors import ConfigError, DataError
from richkd.export import config_of
from richkd.layers import build, read

WNIDS = {  # known to everybody
    "n01440764": "tench",
    "n02123045": "tabby cat",
    "n03773504": "missile",
    "n04008634": "projectile",
}
TRAIN, VAL = 6, 2


@pytest.fixture
def root(tmp_path):
    """Some photographs of some classes, each of another size, wide and high."""
    rng = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("val", VAL)):
        for wnid in WNIDS:
            folder = tmp_path / "imagenet" / part / wnid
            folder.mkdir(parents=True)
            for k in range(count):
                size = tuple(rng.integers(60, 120, 2).tolist())
                coarse = rng.integers(0, 256, (5, 5, 3), np.uint8)
                Image.fromarray(coarse).resize(size, 3).save(folder / f"{wnid}_{k}.JPEG")
    return tmp_path / "imagenet"


def data(root, **more) -> Data:
    return Data(
        **{"source": "imagenet", "root": root and str(root), "augment": "resized", "size": 56}
        | more
    )


def test_classes_are_called_as_open_clip_calls_them_whichever_are_there():
    assert names_of(list(WNIDS)) == tuple(WNIDS.values())
    assert names_of(["n02123045"]) == ("tabby cat",)
    assert names_of(["n02123045", "n99999999"]) == ("n02123045", "n99999999")


def test_all_thousand_names_differ_and_two_are_not_open_clip_s():
    import open_clip
    from timm.data import ImageNetInfo

    found = names_of(ImageNetInfo().label_names())
    assert len(set(found)) == 1000
    pairs = zip(found, open_clip.IMAGENET_CLASSNAMES, strict=True)
    assert sum(ours != theirs for ours, theirs in pairs) == 2


def test_files_are_listed_and_none_is_decoded(root, tmp_path, monkeypatch):
    (root / "train/n02123045/n02123045_3.JPEG").write_bytes(b"none")  # nobody has looked
    (root / "train/n02123045/.hidden.JPEG").write_bytes(b"")
    found = load(data(root), tmp_path / "cache")
    assert found.names == tuple(WNIDS.values())
    assert (found.train.pixels, found.size, found.channels) == (None, (56, 56), 3)
    assert found.train.labels.tolist() == np.repeat(range(4), TRAIN).tolist()
    assert found.test.ids.tolist() == list(range(4 * TRAIN, 4 * (TRAIN + VAL)))
    assert found.train.files[7] == root / "train/n02123045/n02123045_1.JPEG"
    lines = rows(data(root), found)
    assert lines[7] == "train/n02123045/n02123045_1.JPEG\ttabby cat"
    assert len(lines) == 4 * (TRAIN + VAL)
    assert not (tmp_path / "cache").exists()
    again = root.rename(tmp_path / "elsewhere")  # where it lies is not what it is
    assert load(data(again), tmp_path / "cache").digest == found.digest
    (again / "val/n02123045/n02123045_0.JPEG").write_bytes(b"other")
    monkeypatch.setattr("richkd.data._loaded", {})
    assert load(data(again), tmp_path / "cache").digest != found.digest


def test_test_images_are_the_central_224_of_256_pixels_and_clip_sees_all(root, tmp_path):
    found = load(data(root), tmp_path)
    ours = Stream(found.test, found, torch.device("cpu"))
    theirs = v2.Compose([v2.Resize(64), v2.CenterCrop(56)])
    for row, pixels in enumerate(ours.pixels(torch.arange(len(ours)))):
        picture = Image.open(found.test.files[row])
        expected = np.asarray(theirs(picture)).astype(int)
        # torchvision cuts at whole pixels of the scaled image; without a border it is 15 and more
        assert np.abs(pixels.numpy().astype(int) - expected).mean() < 5
        fitted = ImageOps.fit(picture, (56, 56), Image.Resampling.BILINEAR, 1 / 16)
        assert np.abs(pixels.numpy().astype(int) - np.asarray(fitted)).max() <= 1
    sizes = {picture.size for picture in found.train.pictures(0, 24)}
    assert len(sizes) > 20

    class Encoder:
        logit_scale = 1.0

        def encode_texts(self, texts):
            return torch.ones(len(texts), 2)

        def encode_images(self, pictures):
            return torch.tensor([picture.size for picture in pictures]).float()

    clip = zeroshot.ZeroShot("sizes", Encoder, tmp_path)
    features = zeroshot.image_features(clip, found.train, tmp_path)
    assert {tuple(size) for size in features.int().tolist()} == sizes


@pytest.mark.filterwarnings("ignore:teacher.checkpoint is right on")
def test_a_student_learns_from_a_teacher_of_torchvision_s(root, cache_root, tmp_path):
    torch.manual_seed(0)
    torch.save(models.resnet18(num_classes=4).state_dict(), tmp_path / "teacher.pth")
    words = [
        *("data.source=imagenet", f"data.root={root}", "data.augment=resized", "data.size=56"),
        *("data.validation=4", "train.epochs=1", "train.batch_size=5", "method.name=kd"),
        *("teacher.name=torchvision/resnet18", f"teacher.checkpoint={tmp_path / 'teacher.pth'}"),
        *("student.name=torchvision/resnet18", f"cache={cache_root}", "device=cpu"),
    ]
    outcome = distill.run(build(read(words)), tmp_path / "run")
    tested = distill.test(outcome)
    assert {"test/top1", "teacher/top1"} <= tested.keys()
    student = load_student(tmp_path / "run")
    test = outcome.task.dataset.test
    with torch.inference_mode():
        seen = student(student.read(*[test.files[k] for k in range(len(test))])).argmax(1)
    right = (seen.numpy() == test.labels).mean()
    assert 100 * right == pytest.approx(tested["test/top1"])
    meta = checkpoint.load(tmp_path / "run" / "best").meta
    outside = config_of(student, meta)["outside"]
    assert (outside["border"], outside["resample"]) == (1 / 16, "bilinear, antialiased")


def test_what_is_missing_is_said(root, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="read file by file but data.augment=crop"):
        load(data(root, augment="crop", size=32))
    monkeypatch.delenv("RICHKD_DATA", raising=False)
    with pytest.raises(ConfigError, match="data.root must be a folder with train/WNID .* None"):
        load(data(None))
    monkeypatch.setenv("RICHKD_DATA", str(root.parent))
    assert len(load(data(None)).train) == 4 * TRAIN
    (root / "val/n00000001").mkdir()
    with pytest.raises(DataError, match="same classes .*n00000001"):
        load(data(root))
    (root / "train/n00000001").mkdir()
    with pytest.raises(DataError, match="each class needs images but .*n00000001 has none"):
        load(data(root))
