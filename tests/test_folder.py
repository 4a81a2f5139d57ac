"""Image files: what becomes of each kind of picture, and of folders of them."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torchvision.transforms import v2

from richkd import __main__ as command_line
from richkd import distill, load_student
from richkd.command import main
from richkd.config import Data
from richkd.data import Batches, Dataset, Images, Views, rows, split
from richkd.data.dataset import moments
from richkd.data.digits import digits
from richkd.data.folder import CARD, PIXELS, folder
from richkd.data.pictures import decode, pixels, suffixes
from richkd.errors import ConfigError, DataError, Interrupted
from richkd.layers import build, read

SIZE = 8


def noise(*shape: int, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    high = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def smooth(height: int = 20, width: int = 30) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([5 * x + 60, 4 * y + 80, 3 * x + 2 * y + 70], -1).astype(np.uint8)


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def seen(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    """Return what `decode` makes of an image that was saved."""
    found = decode(stored(image, kind, **options))
    assert found.mode == "RGB"
    return np.array(found)


def apart(found: np.ndarray, expected: np.ndarray) -> int:
    return int(np.abs(found.astype(int) - expected.astype(int)).max())


# pictures


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_an_rgb_picture_comes_as_it_is(kind):
    values = noise(7, 9, 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(seen(Image.fromarray(values), kind, **options), values)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_is_the_same_in_all_channels(mode):
    grey = Image.fromarray(noise(7, 9)).convert(mode)
    found = seen(grey)
    assert (found == found[..., :1]).all()
    assert np.array_equal(found[..., 0], np.array(grey.convert("L")))


def test_a_palette_is_looked_up():
    image = Image.fromarray(noise(6, 6) % 4).copy()
    image = image.convert("P")
    colours = noise(4, 3, seed=1)
    image.putpalette(colours.tobytes())
    assert np.array_equal(seen(image), colours[np.array(image)])


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_entry_of_a_palette_is_white(kind):
    index = noise(6, 6) % 4
    image = Image.fromarray(index).convert("P")
    colours = noise(4, 3, seed=1)
    image.putpalette(colours.tobytes())
    colours[2] = 255
    assert np.array_equal(seen(image, kind, transparency=2), colours[index])


def test_a_palette_with_half_transparent_entries_lies_over_white():
    index = noise(6, 6) % 4
    image = Image.fromarray(index).convert("P")
    colours = noise(4, 3, seed=1)
    image.putpalette(colours.tobytes())
    alpha = np.array([0, 85, 170, 255])[index][..., None] / 255
    found = seen(image, transparency=bytes([0, 85, 170, 255]))
    assert apart(found, np.rint(alpha * colours[index] + (1 - alpha) * 255)) <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_lie_over_white(mode):
    values = noise(16, 16, len(mode))
    colours, alpha = values[..., :-1], values[..., -1:] / 255
    expected = np.rint(alpha * colours + (1 - alpha) * 255)
    assert apart(seen(Image.fromarray(values)), expected) <= 1


def test_one_transparent_colour_is_white():
    values = noise(6, 6, 3)
    values[2, 3] = values[0, 0]
    found = seen(Image.fromarray(values), transparency=tuple(values[0, 0].tolist()))
    values[[0, 2], [0, 3]] = 255
    assert np.array_equal(found, values)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_is_mixed(kind):
    values = np.broadcast_to(np.array([200, 40, 90, 30], np.uint8), (16, 16, 4)).copy()
    image = Image.frombytes("CMYK", (16, 16), values.tobytes())
    expected = (255 - values[..., :3].astype(float)) * (255 - 30) / 255
    assert apart(seen(image, kind), np.rint(expected)) <= (1 if kind == "TIFF" else 4)


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF")])
def test_16_bit_grey_is_scaled_not_clipped(mode, kind):
    values = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (8, 6), values.astype(order).tobytes())
    found = seen(image, kind)
    assert np.array_equal(found, np.rint(values / 257).astype(np.uint8)[..., None].repeat(3, -1))
    assert (found[0, 0, 0], found[-1, -1, 0]) == (0, 255)


def test_16_bit_colour_keeps_its_high_bytes():
    values = noise(2, 3, 3, dtype=np.uint16)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    found = np.array(decode(png(3, 2, 16, 2, zlib.compress(lines))))
    assert apart(found, values / 257) <= 1


def test_32_bit_grey_is_scaled_within_16_bits_and_refused_beyond():
    values = np.array([[0, 300], [40000, 65535]], np.int32)
    assert np.array_equal(seen(Image.fromarray(values), "TIFF")[..., 0], np.rint(values / 257))
    for outside in (-1, 65536, 2**31 - 1):
        values[0, 0] = outside
        with pytest.raises(DataError, match="32-bit pixels .* whose range is unknown"):
            seen(Image.fromarray(values), "TIFF")


def test_floating_point_pixels_are_refused():
    with pytest.raises(DataError, match="floating-point pixels, whose range is unknown"):
        seen(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")


@pytest.mark.parametrize("mode", ["YCbCr", "LAB"])
def test_other_colour_spaces_become_rgb(mode):
    image = Image.fromarray(smooth())
    if mode == "LAB":
        spaces = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*spaces, "RGB", "LAB"))
    else:
        image = image.convert(mode)
    assert apart(seen(image, "TIFF", compression="raw"), smooth()) <= 6


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_turns_a_picture_upright(orientation):
    values = noise(5, 9, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(seen(Image.fromarray(values), exif=exif), TURNS[orientation](values))


def test_torn_exif_leaves_the_picture_as_it_is():
    values = noise(5, 9, 3)
    content = stored(Image.fromarray(values), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12")
    assert np.array_equal(np.array(decode(content)), values)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    found = seen(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert found.shape == (5, 6, 3)
    assert (found == [255, 0, 0]).all()


def png(width: int, height: int, bits: int, colour: int, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_a_header_of_huge_size_is_refused_before_memory_is_taken():
    with pytest.raises(DataError, match="decompression bomb"):
        decode(png(100_000, 100_000, 8, 2, zlib.compress(b"\0" * 100)))


@pytest.mark.parametrize(("limit", "refused"), [(100, False), (99, True), (50, True), (49, True)])
@pytest.mark.parametrize("filtered", ["error", "ignore"])
def test_pillow_s_limit_is_one_to_refuse_not_to_warn_of(monkeypatch, limit, refused, filtered):
    content = stored(Image.new("RGB", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(filtered)
        if refused:
            with pytest.raises(DataError, match="pixels"):
                decode(content)
        else:
            decode(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
def test_a_cut_file_is_refused(kind):
    content = stored(Image.fromarray(noise(20, 20, 3)), kind)
    for length in range(0, len(content) - 30, 7):
        with pytest.raises(DataError) as caught:
            decode(content[:length])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
def test_where_only_the_end_mark_is_cut_no_pixel_is_made_up(kind):
    content = stored(Image.fromarray(noise(20, 20, 3)), kind)
    whole = np.array(decode(content))
    for length in range(len(content) - 30, len(content)):
        try:
            assert np.array_equal(np.array(decode(content[:length])), whole)
        except DataError:
            continue


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns of torn metadata
def test_a_flipped_bit_ends_in_a_picture_or_in_our_error(kind):
    content = stored(Image.fromarray(noise(12, 12, 3)), kind)
    rng = np.random.default_rng(0)
    for place in rng.integers(8 * len(content), size=150).tolist():
        torn = bytearray(content)
        torn[place // 8] ^= 1 << place % 8
        try:
            assert decode(bytes(torn)).mode == "RGB"
        except DataError as error:
            assert str(error).strip() and "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"this is no picture\n" * 20, "no format that Pillow knows"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS is a program"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_file(tmp_path, content, why):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"picture.png cannot be read as an image \({why}.*repair"):
        decode(path)


def test_a_file_that_is_missing_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="missing.png .*No such file"):
        decode(tmp_path / "missing.png")


def test_no_file_stays_open(tmp_path):
    (tmp_path / "good.png").write_bytes(content := stored(Image.fromarray(noise(9, 9, 3))))
    (tmp_path / "cut.png").write_bytes(content[:-60])
    (tmp_path / "text.png").write_text("text")
    before = len(os.listdir("/proc/self/fd"))
    kept = [decode(tmp_path / "good.png") for _ in range(20)]
    for name in ("cut.png", "text.png"):
        with pytest.raises(DataError):
            decode(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(kept) == 20


def test_threads_decode_as_one_does():
    contents = [stored(Image.fromarray(noise(30, 40, 3, seed=k)), "JPEG") for k in range(40)]
    alone = [pixels(content, SIZE) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda content: pixels(content, SIZE), contents * 3))
    assert all(map(np.array_equal, alone * 3, together))


@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (24, 72), (16, 16), (4, 8)])
def test_the_centre_square_is_torchvision_s_resize_and_crop(shape):
    values = noise(*shape, 3)
    image = Image.fromarray(values)
    usual = v2.Compose(
        [v2.Resize(SIZE, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(SIZE)]
    )
    # Pillow may scale rows before columns or after, with what that rounds
    assert apart(pixels(stored(image), SIZE), np.array(usual(image))) <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (33, 57), (8, 8), (9, 8)])
def test_any_shape_becomes_a_square(shape):
    found = pixels(stored(Image.fromarray(np.full((*shape, 3), 77, np.uint8))), SIZE)
    assert (found.shape, found.dtype) == ((SIZE, SIZE, 3), np.uint8)
    assert (found == 77).all()


def test_suffixes_are_those_that_pillow_reads():
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif", ".mpo"} <= suffixes()
    assert not {".pdf", ".txt", ".json", ".npy", ""} & suffixes()


# folders


def fill(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Write so many pictures, no two alike, into each folder."""
    for k, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for j in range(count):
            Image.fromarray(noise(10, 12, 3, seed=1000 * k + j + seed)).save(
                root / name / f"{j:02}.png"
            )
    return root


APART = {"train/cat": 4, "train/dog": 3, "test/cat": 2, "test/dog": 2}
CUT = {"cat": 6, "dog": 7}


def opened(path: Path, tmp_path: Path, progress=None, **settings: object) -> Dataset:
    cache = tmp_path / "cache"
    cache.mkdir(exist_ok=True)
    return folder(Data(source="folder", path=str(path), size=SIZE, **settings), cache, progress)


def paths(images: Images, root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in images.files]


def test_training_and_test_folders_are_read_in_order(tmp_path):
    root = fill(tmp_path / "d", APART)
    task = opened(root, tmp_path)
    assert (task.name, task.names, task.pad, task.flip) == ("folder", ("cat", "dog"), 1, True)
    assert task.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert task.test.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(task.train.ids, np.arange(7))
    assert np.array_equal(task.test.ids, np.arange(7, 11))
    assert paths(task.train, root)[3:5] == ["train/cat/03.png", "train/dog/00.png"]
    assert task.held_out is None
    for part in (task.train, task.test):
        for row, file in zip(part.pixels, part.files, strict=True):
            assert np.array_equal(row, pixels(file, SIZE))


def test_pixels_are_one_map_that_nobody_can_write(tmp_path):
    task = opened(fill(tmp_path / "d", APART), tmp_path)
    for part in (task.train, task.test):
        assert isinstance(part.pixels, np.memmap)
        assert not part.pixels.flags.writeable


def test_mean_and_deviation_are_those_of_the_training_rows(tmp_path):
    task = opened(fill(tmp_path / "d", APART | {"unlabelled": 3}), tmp_path)
    assert (task.mean, task.std) == moments(np.array(task.train.pixels))


def test_clip_sees_the_originals(tmp_path):
    task = opened(fill(tmp_path / "d", APART), tmp_path)
    picture = next(task.train.pictures(2, 3))
    assert picture.size == (12, 10)
    assert np.array_equal(np.array(picture), np.array(Image.open(task.train.files[2])))


def test_val_alone_is_the_test_set(tmp_path):
    counts = {name.replace("test", "val"): count for name, count in APART.items()}
    root = fill(tmp_path / "d", counts)
    task = opened(root, tmp_path)
    assert paths(task.test, root) == [f"val/{n}/0{k}.png" for n in ("cat", "dog") for k in (0, 1)]
    assert task.held_out is None


def test_val_beside_test_is_held_out(tmp_path):
    root = fill(tmp_path / "d", APART | {"val/cat": 1, "val/dog": 1, "unlabelled/x": 1})
    task = opened(root, tmp_path)
    assert task.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 1, -1]
    assert task.held_out.tolist() == [7, 8]
    assert paths(task.train, root)[7:] == [
        "val/cat/00.png",
        "val/dog/00.png",
        "unlabelled/x/00.png",
    ]
    assert np.array_equal(task.test.ids, np.arange(10, 14))
    cut = split(task, Data(), 0)
    assert cut.validation.tolist() == [7, 8]
    assert cut.transfer.tolist() == [0, 1, 2, 3, 4, 5, 6, 9]


def test_class_folders_alone_are_cut_and_each_row_is_tested_in_one_fold(tmp_path):
    root = fill(tmp_path / "d", CUT | {"unlabelled": 2})
    tested = []
    for fold in range(3):
        task = opened(root, tmp_path, folds=3, fold=fold)
        ids = np.concatenate([task.train.ids, task.test.ids])
        assert np.array_equal(np.sort(ids), np.arange(15))
        assert task.train.labels.tolist()[-2:] == [-1, -1]
        assert task.train.ids.tolist()[-2:] == [13, 14]
        assert (np.diff(task.train.ids) > 0).all()
        listed = sorted(p for p in paths(task.train, root) + paths(task.test, root))
        assert len(set(listed)) == 15
        for part in (task.train, task.test):
            assert all(map(np.array_equal, part.pixels, (pixels(f, SIZE) for f in part.files)))
        tested += task.test.ids.tolist()
    assert sorted(tested) == list(range(13))


def test_unlabelled_pictures_lie_at_any_depth(tmp_path):
    root = fill(tmp_path / "d", APART | {"unlabelled": 1, "unlabelled/a/b": 1})
    task = opened(root, tmp_path)
    assert task.train.labels.tolist()[-2:] == [-1, -1]
    assert paths(task.train, root)[-2:] == ["unlabelled/00.png", "unlabelled/a/b/00.png"]


@pytest.mark.parametrize("counts", [APART, CUT])
def test_the_other_spelling_of_unlabelled_is_no_class_and_not_passed_over(tmp_path, counts):
    root = fill(tmp_path / "d", counts | {"unlabeled": 5})
    with pytest.raises(DataError, match="lie in unlabelled but .*/d has unlabeled; rename it"):
        opened(root, tmp_path, folds=2)


def test_files_are_sorted_by_class_then_by_path_and_others_passed_over(tmp_path):
    root = fill(tmp_path / "d", {"b": 5, "B": 5, "a/z": 3, "a/b/c": 1, "a/.hidden": 2, ".git": 1})
    content = stored(Image.new("RGB", (3, 3)))
    for name in ("a/b.PNG", "a/é.jpeg", "a/.dot.png", "a/notes.txt", "a/noend", "loose.png"):
        (root / name).write_bytes(content)
    task = opened(root, tmp_path, folds=2)
    assert task.names == ("B", "a", "b")
    every = dict(zip(task.train.ids.tolist(), paths(task.train, root), strict=True))
    every |= zip(task.test.ids.tolist(), paths(task.test, root), strict=True)
    assert [every[k] for k in range(5, 11)] == [
        *("a/b.PNG", "a/b/c/00.png", "a/z/00.png", "a/z/01.png", "a/z/02.png", "a/é.jpeg"),
    ]
    assert len(every) == 16


def test_files_beside_class_folders_are_ignored(tmp_path):
    root = fill(tmp_path / "d", APART | {"train": 2})
    assert len(opened(root, tmp_path).train) == 7


def test_links_are_followed_and_loops_end(tmp_path):
    root = fill(tmp_path / "d", APART)
    elsewhere = fill(tmp_path / "e", {"more": 2}, seed=77)
    (root / "train/cat/link.png").symlink_to(elsewhere / "more/00.png")
    (root / "train/dog/linked").symlink_to(elsewhere / "more")
    (root / "train/dog/up").symlink_to(root / "train/dog")
    (root / "train/dog/linked/down").symlink_to(root / "train")
    (root / "train/dog/itself").symlink_to("itself")
    found = paths(opened(root, tmp_path).train, root)
    assert "train/cat/link.png" in found
    assert "train/dog/linked/00.png" in found
    assert len(found) == len(set(found)) < 20


@pytest.mark.parametrize("what", ["dangling", "itself", "pipe"])
def test_what_is_no_file_is_named_and_nothing_waits_for_it(tmp_path, what):
    root = fill(tmp_path / "d", APART)
    path = root / "train/cat/odd.png"
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("odd.png" if what == "itself" else "nowhere.png")
    with pytest.raises(DataError, match=r"odd.png cannot be read from the disk \(.*remove it"):
        opened(root, tmp_path, unreadable=0.5)


def test_names_are_given_to_the_sorted_folders(tmp_path):
    root = fill(tmp_path / "d", APART)
    (tmp_path / "names.txt").write_text("tabby\n\nhound\n")
    task = opened(root, tmp_path, names=str(tmp_path / "names.txt"))
    assert task.names == ("tabby", "hound")
    assert task.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert task.digest != opened(root, tmp_path).digest
    (tmp_path / "names.txt").write_text("tabby\n")
    with pytest.raises(DataError, match="each of the 2 classes but .* has 1"):
        opened(root, tmp_path, names=str(tmp_path / "names.txt"))


@pytest.mark.parametrize(
    "odd",
    [*("-", "%s", "{}", "{0!r}", "it's", '"x"', " cat", "cat ", "=1+1", "<b>", "$(ls)")]
    + ["👩‍🚀", "زرافه", "caf\u00e9", "cafe\u0301", "x" * 200, "a\\b", "*", "train.png"],
)
def test_any_line_of_text_is_a_class_folder_taken_literally(tmp_path, odd):
    root = fill(tmp_path / "d", {odd: 5, "dog": 5})
    task = opened(root, tmp_path)
    assert set(task.names) == {odd, "dog"}
    lines = rows(Data(source="folder", path=str(root)), task)
    assert f"{odd}/00.png\t{odd}" in lines


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            {"caf\u00e9": 5, "cafe\u0301": 5},
            "must differ, also .* after Unicode's NFC, but 2 of the 2",
        ),
        ({"a\nb": 5, "c": 5}, "one line of text"),
        ({os.fsdecode(b"caf\xe9"): 5, "c": 5}, r"must be UTF-8 but .* has b'caf\\xe9'; rename"),
        ({" ": 5, "c": 5}, "one line of text"),
        ({"..cat": 5, "dog": 5}, "at least 2 classes but .* has 1 folders"),
        ({"a": 5}, "at least 2 classes but .* has 1 folders"),
        ({"a": 5, "unlabelled": 5}, "at least 2 classes but .* has 1 folders"),
        ({".": 5}, "at least 2 classes but .* has 0 folders"),
        ({"train/a": 5, "test/a": 5}, "at least 2 classes but .*train has 1 folders"),
        ({"train": 5, "test": 5}, "at least 2 classes but .*train has 0 folders"),
        ({"a": 5, "b": 0, "c": 5}, r"must hold images but .*/d/b has none"),
        (APART | {"train/cow": 1}, r"needs test images but \['cow'\] have no folder in .*test"),
        (APART | {"train/cow": 1, "test/cow": 0}, "must hold images but .*test/cow has none"),
        (APART | {"test/cow": 1}, r"known to train but \['cow'\] in .*test are not"),
        (APART | {"val/cow": 1}, r"known to train but \['cow'\] in .*val are not"),
        (APART | {"val": 2}, "none of .*val can be used"),
        (APART | {"val/cat": 0}, "must hold images but .*val/cat has none"),
        ({"train/a": 5, "train/b": 5, "valid/a": 1}, "one of test and val.* has 'train', 'valid'"),
        ({"test/a": 5, "test/b": 5}, "must hold train and one of test and val.* has 'test'"),
        ({"a": 5, "b": 3}, "class 1 has 3; lower data.folds"),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path, counts, message):
    with pytest.raises(DataError, match=message):
        opened(fill(tmp_path / "d", counts), tmp_path)


@pytest.mark.parametrize("path", [None, "nowhere", "file"])
def test_a_folder_that_is_none_is_a_config_error(tmp_path, path):
    (tmp_path / "file").write_text("")
    wanted = None if path is None else str(tmp_path / path)
    with pytest.raises(ConfigError, match="data.path must be a folder .* but got"):
        folder(Data(source="folder", path=wanted), tmp_path, None)


# unreadable files


def spoil(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).write_text("no picture")
    return root


def test_by_default_a_file_that_cannot_be_read_is_an_error_that_names_them(tmp_path):
    bad = [f"train/cat/x{k}.png" for k in range(6)]
    root = spoil(fill(tmp_path / "d", APART), *bad)
    with pytest.raises(DataError) as caught:
        opened(root, tmp_path)
    text = str(caught.value)
    assert "6 of the 17 files" in text
    assert all(f"{name}: no format that Pillow knows" in text for name in bad[:5])
    assert bad[5] not in text
    assert "repair or remove them, or allow a share with data.unreadable=0.353" in text


def test_a_share_of_files_may_be_left_out_and_is_counted_each_time(tmp_path):
    root = spoil(fill(tmp_path / "d", APART), "train/cat/01.png", "test/dog/00.png")
    listed = ("train/cat/01.png: no format that Pillow knows",)
    listed += ("test/dog/00.png: no format that Pillow knows",)
    for _ in range(2):
        with pytest.warns(UserWarning, match="2 of the 11 files .* first is train/cat/01.png: no"):
            task = opened(root, tmp_path, unreadable=0.2)
        assert task.unreadable == listed
        assert task.train.ids.tolist() == [0, 2, 3, 4, 5, 6]
        assert task.test.ids.tolist() == [7, 8, 10]
        assert task.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        for part in (task.train, task.test):
            assert all(map(np.array_equal, part.pixels, (pixels(f, SIZE) for f in part.files)))
        assert task.mean == moments(np.array(task.train.pixels))[0]


def test_the_policy_is_applied_to_what_is_cached_already(tmp_path):
    root = spoil(fill(tmp_path / "d", APART), "train/cat/01.png")
    with pytest.raises(DataError, match="data.unreadable=0 but 1 of the 11"):
        opened(root, tmp_path)
    with pytest.warns(UserWarning):
        opened(root, tmp_path, unreadable=0.5)
    for share in (0, 0.09):
        with pytest.raises(DataError, match=f"data.unreadable={share:g} but 1 of the 11"):
            opened(root, tmp_path, unreadable=share)
    fill(root, {"train/cat": 2})  # repaired
    assert opened(root, tmp_path).unreadable == ()


@pytest.mark.parametrize(("bad", "of"), [(1, 20), (29, 100), (7, 25)])
def test_exactly_the_share_is_allowed(tmp_path, bad, of):
    root = fill(tmp_path / "d", {"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1})
    content = (root / "train/a/00.png").read_bytes()
    for k in range(of - 4):
        (root / "train/a" / f"x{k:02}.png").write_bytes(b"x" if k < bad else content)
    with pytest.warns(UserWarning, match=f"{bad} of the {of}"):
        opened(root, tmp_path, unreadable=bad / of)
    with pytest.raises(DataError):
        opened(root, tmp_path, unreadable=bad / of - 1e-3)


def test_where_nothing_can_be_read_no_share_is_offered(tmp_path):
    root = fill(tmp_path / "d", APART)
    spoil(root, *[path.relative_to(root).as_posix() for path in root.rglob("*.png")])
    with pytest.raises(DataError, match=r"11 of the 11 .* repair or remove them\.$"):
        opened(root, tmp_path, unreadable=0.5)


def test_a_class_that_is_left_without_rows_is_refused(tmp_path):
    root = spoil(fill(tmp_path / "d", APART), "test/dog/00.png", "test/dog/01.png")
    with (
        pytest.warns(UserWarning),
        pytest.raises(DataError, match=r"none for \['dog'\] among its test rows"),
    ):
        opened(root, tmp_path, unreadable=0.5)


def test_a_failure_of_the_disk_is_no_fault_of_a_file_and_is_forgotten(tmp_path, monkeypatch):
    root = fill(tmp_path / "d", APART)
    read_bytes = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "02.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(
        DataError, match=r"02.png cannot be read from the disk \(Permission denied\)"
    ):
        opened(root, tmp_path, unreadable=0.5)
    monkeypatch.undo()
    assert len(opened(root, tmp_path).train) == 7


# digest and cache


def test_the_digest_knows_content_not_place_or_time(tmp_path):
    one = fill(tmp_path / "one", APART)
    other = fill(tmp_path / "other" / "deeper", APART)
    for path in other.rglob("*.png"):
        os.utime(path, (1, 1))
    assert opened(one, tmp_path).digest == opened(other, tmp_path).digest


def test_the_digest_changes_with_bytes_labels_and_size(tmp_path):
    root = fill(tmp_path / "d", APART)
    digests = {opened(root, tmp_path).digest}
    path = root / "train/cat/00.png"
    with open(path, "ab") as file:  # behind the end of the picture: other bytes, same pixels
        file.write(b"\0")
    digests.add(opened(root, tmp_path).digest)
    path.rename(root / "train/dog/00z.png")
    digests.add(opened(root, tmp_path).digest)
    digests.add(folder(Data(path=str(root), size=9), tmp_path / "cache", None).digest)
    assert len(digests) == 4


def counted(told: list) -> object:
    return lambda *what: told.append((*what, threading.get_ident()))


def test_files_are_decoded_once_and_progress_is_told_by_the_caller(tmp_path):
    root = fill(tmp_path / "d", APART)
    told = []
    opened(root, tmp_path, counted(told))
    assert told == [("images", k, 11, threading.get_ident()) for k in range(12)]
    told.clear()
    opened(root, tmp_path, counted(told))
    assert told == []
    os.utime(root / "train/cat/00.png", (1, 1))
    opened(root, tmp_path, counted(told))
    assert told
    assert len(list((tmp_path / "cache" / "images").glob("*.json"))) == 2


def test_other_pictures_of_the_same_names_sizes_and_times_are_decoded_anew(tmp_path):
    found = []
    for grey in (50, 200):
        root = fill(tmp_path / f"of {grey}", APART)
        for path in root.rglob("*.png"):
            path.write_bytes(stored(Image.new("RGB", (8, 8), (grey, grey, grey)), "BMP"))
            os.utime(path, (1, 1))
        found.append(opened(root, tmp_path))
    assert found[0].digest != found[1].digest
    assert [int(dataset.train.pixels.max()) for dataset in found] == [50, 200]


@pytest.mark.parametrize("after", [0, 1, 5, 11])
def test_a_stop_leaves_nothing_and_the_next_time_works(tmp_path, after):
    root = fill(tmp_path / "d", APART)

    def stopping(_what: str, done: int, _total: int) -> None:
        if done == after:
            raise Interrupted(signal.SIGINT, "stop")

    with pytest.raises(Interrupted):
        opened(root, tmp_path, stopping)
    assert not [path for path in (tmp_path / "cache/images").iterdir() if path.is_dir()]
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
    assert len(opened(root, tmp_path).train) == 7


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(tmp_path):
    root = fill(tmp_path / "d", APART)
    code = """
import os, sys
from pathlib import Path
from richkd.config import Data
from richkd.data.folder import folder
def die(what, done, total):
    if done == 6:
        os.kill(os.getpid(), 9)
folder(Data(path=sys.argv[1], size=8), Path(sys.argv[2]), die)
"""
    (tmp_path / "cache").mkdir()
    ended = subprocess.run([sys.executable, "-c", code, str(root), str(tmp_path / "cache")])
    assert ended.returncode == -signal.SIGKILL
    assert list((tmp_path / "cache/images").glob(".*.partial"))
    task = opened(root, tmp_path)
    assert len(task.train) == 7
    assert not list((tmp_path / "cache/images").glob(".*.partial"))


def test_a_full_disk_is_an_error_of_the_system_that_leaves_nothing(tmp_path):
    root = fill(tmp_path / "d", APART)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            opened(root, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in (tmp_path / "cache/images").iterdir() if path.is_dir()]
    assert len(opened(root, tmp_path).train) == 7


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone", "card", "no card", "header"])
def test_a_damaged_entry_is_decoded_again(tmp_path, damage):
    root = fill(tmp_path / "d", APART)
    before = opened(root, tmp_path)
    (entry,) = (path for path in (tmp_path / "cache/images").iterdir() if path.is_dir())
    content = bytearray((entry / PIXELS).read_bytes())
    if damage == "flip":
        content[-50] ^= 4
    elif damage == "cut":
        content = content[:-1]
    elif damage == "header":
        content[:10] = b"0123456789"
    elif damage == "longer":
        content = content.replace(b"(11,", b"(10,")
    (entry / PIXELS).write_bytes(content)
    if damage == "gone":
        (entry / PIXELS).unlink()
    elif damage == "card":
        (entry / CARD).write_text("{")
    elif damage == "no card":
        (entry / CARD).unlink()
    with pytest.warns(UserWarning, match=f"{entry.name} is damaged, and is built again"):
        again = opened(root, tmp_path)
    assert np.array_equal(again.train.pixels, before.train.pixels)
    assert again.digest == before.digest


# large sets


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("pad", "flip"), [(0, False), (2, True), (1, False)])
def test_streamed_views_are_those_in_memory_bit_for_bit(tmp_path, channels, pad, flip):
    np.save(tmp_path / "pixels.npy", noise(7, 6, 5, channels))
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    images = Images(pixels=mapped, labels=np.array([0, 1, 0, 1, 0, 1, 1]))
    task = Dataset(name="toy", names=("a", "b"), train=images, test=images, pad=pad, flip=flip)
    device = torch.device("cpu")
    memory, streamed = (Views(images, task, device, limit) for limit in (1.0, 0.0))
    assert memory.view is not None and streamed.view is None
    offsets = range(2 * pad + 1)
    every = [(n, dy, dx, f) for n in range(7) for dy in offsets for dx in offsets for f in (0, 1)]
    every = torch.tensor(every)
    every = every[every[:, 3] < 1 + flip]
    every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    for one, other in ((memory.pixels, streamed.pixels), (memory.images, streamed.images)):
        assert torch.equal(one(every[:, 0], every[:, 1:]), other(every[:, 0], every[:, 1:]))
        assert torch.equal(one(every[:, 0]), other(every[:, 0]))


def test_batches_of_a_streamed_folder_are_those_in_memory(tmp_path):
    task = opened(fill(tmp_path / "d", APART | {"unlabelled": 4}), tmp_path)
    cut = split(task, Data(validation=2), 0)
    found = []
    for limit in (1.0, 0.0):
        views = Views(task.train, task, torch.device("cpu"), limit)
        batches = Batches(cut, views, 4, 0.5, seed=0)
        epoch = [(r, labels, views.images(r, v)) for r, labels, v in batches.epoch(1)]
        found.append([torch.cat(parts) for parts in zip(*epoch, strict=True)])
    assert all(map(torch.equal, *found))


# from start to end


def test_rows_of_a_folder_name_each_file_also_those_that_cannot_be_read(tmp_path):
    root = spoil(fill(tmp_path / "d", CUT | {"unlabelled": 1}), "cat/02.png")
    with pytest.warns(UserWarning):
        task = opened(root, tmp_path, unreadable=0.1)
    lines = rows(Data(source="folder", path=str(root)), task)
    assert len(lines) == 14
    assert lines[2] == "cat/02.png\tcat"
    assert lines[13] == "unlabelled/00.png\t"
    for part in (task.train, task.test):
        for place, path, label in zip(part.ids, paths(part, root), part.labels, strict=True):
            assert lines[place] == f"{path}\t{task.names[label] if label >= 0 else ''}"
    (root / "dog/a\tb.png").write_bytes((root / "dog/00.png").read_bytes())
    with pytest.raises(DataError, match="one line without tabs"):
        rows(Data(source="folder", path=str(root)), task)


def test_rows_of_a_source_without_files_are_numbers(tmp_path):
    task = digits(Data(), tmp_path, None)
    lines = rows(Data(), task)
    assert len(lines) == 1797
    assert lines[0] == f"0\t{task.names[task.train.labels[0]]}"
    assert lines[997] == f"997\t{task.names[task.test.labels[0]]}"


def test_a_student_learns_from_a_folder_and_the_run_tells_what_was_left_out(tmp_path, capsys):
    counts = {"train/a": 12, "train/b": 12, "test/a": 4, "test/b": 4, "unlabelled": 4}
    root = spoil(fill(tmp_path / "d", counts), "train/a/bad.png")
    words = ["data.source=folder", f"data.path={root}", "data.size=16", "method.name=ce"]
    words += ["student.name=cnn8", "train.epochs=1", "train.batch_size=8", "data.memory=0"]
    words += [f"cache={tmp_path / 'cache'}", "data.unreadable=0.1"]
    file = tmp_path / "rows.tsv"
    with pytest.warns(UserWarning, match="1 of the 37 files"):
        outcome = distill.run(build(read(words)), tmp_path / "run")
    state = json.loads((tmp_path / "run/run.json").read_text())
    told = ["train/a/bad.png: no format that Pillow knows"]
    assert (state["state"], state["unreadable"]) == ("finished", told)
    assert "test/top1" in distill.test(outcome)
    argv = ["cache", *words, "--rows", str(file), "--json"]
    assert main("python -m richkd", "", command_line.VERBS, argv) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["train"], answer["test"], answer["unreadable"]) == (28, 8, told)
    lines = file.read_text().splitlines()
    assert len(lines) == 37
    assert "train/a/bad.png\ta" in lines


def test_a_student_reads_a_file_as_it_was_trained_on_it(tmp_path):
    for k in range(12):
        (tmp_path / "d" / f"class{k % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(20 + k, 31, 3, seed=k)).save(
            tmp_path / "d" / f"class{k % 2}" / f"{k}.png"
        )
    overrides = [
        "data.source=folder",
        f"data.path={tmp_path / 'd'}",
        "data.size=16",
        "data.folds=3",
    ]
    short = ["data.validation=2", "method.name=ce", "student.name=cnn8", "train.epochs=1"]
    config = build(read([*overrides, *short, "train.batch_size=2", f"cache={tmp_path / 'cache'}"]))
    outcome = distill.run(config, tmp_path / "run")
    student, images = load_student(tmp_path / "run"), outcome.task.dataset.train
    found = student.read(*images.files)
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), images.pixels)
    assert student(found).shape == (len(images), 2)
    with pytest.raises(DataError, match="cannot be read as an image"):
        (tmp_path / "text.png").write_text("text")
        student.read(tmp_path / "text.png")
