"""Logits from files: each format read and refused, and rows put beside the images that they are of."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from richkd.config import Data
from richkd.data import Dataset, Images
from richkd.data.arrays import arrays
from richkd.data.folder import folder
from richkd.errors import ConfigError, CorruptError, DataError, RichkdError
from richkd.logits import aligned, read_logits

ROWS, CLASSES = 40, 4
LOGITS = np.random.default_rng(0).normal(0, 3, (ROWS, CLASSES)).astype(np.float32)


# files


def write(folder, suffix, values, key="train"):
    """Write `values` and return the spec that names them."""
    path = folder / f"logits{suffix}"
    if suffix == ".npy":
        np.save(path, values)
        return str(path)
    if suffix == ".npz":
        np.savez(path, **{key: values, "other": np.zeros(3)})
    else:
        save_file({key: torch.from_numpy(values), "other": torch.zeros(3)}, path)
    return f"{path}:{key}"


def read(spec):
    return read_logits(spec, [ROWS], CLASSES, field="teacher.logits")


SUFFIXES = pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])


@SUFFIXES
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_given_logits_come_back_as_float32(tmp_path, suffix, dtype):
    values = LOGITS.astype(dtype)
    found = read(write(tmp_path, suffix, values))
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), values.astype(np.float32))


@pytest.mark.parametrize("values", [LOGITS.astype(">f4"), np.asfortranarray(LOGITS)])
def test_byte_and_memory_order_do_not_matter(tmp_path, values):
    assert np.array_equal(read(write(tmp_path, ".npy", values)).numpy(), LOGITS)


def test_half_precision_of_either_kind_is_read_from_safetensors(tmp_path):
    values = torch.from_numpy(LOGITS).bfloat16()
    save_file({"train": values}, tmp_path / "x.safetensors")
    assert torch.equal(read(f"{tmp_path}/x.safetensors:train"), values.float())


@pytest.mark.parametrize("name", ["run:3", "a b", "ünïcode"])
@SUFFIXES
def test_a_path_may_hold_a_colon_a_blank_or_unicode(tmp_path, suffix, name):
    (tmp_path / name).mkdir()
    assert np.array_equal(read(write(tmp_path / name, suffix, LOGITS)).numpy(), LOGITS)


@pytest.mark.parametrize("spec", ["none.npy", "none.npz:train", "none.npz", "none", "", ".", ":"])
def test_a_missing_file_is_named_with_its_key(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="teacher.logits must name a file") as caught:
        read(spec)
    assert spec in str(caught.value)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("key", [":test", ":", ""])
def test_a_missing_key_is_told_which_there_are(tmp_path, suffix, key):
    path = write(tmp_path, suffix, LOGITS).rpartition(":")[0]
    with pytest.raises(
        ConfigError, match="names no entry of the file; it has (train, other|other, train)"
    ):
        read(path + key)


@pytest.mark.parametrize("name", ["logits.pt", "logits.csv", "logits.npy:train"])
def test_another_format_or_a_key_that_would_go_unread_is_refused(tmp_path, name):
    path = tmp_path / name.partition(":")[0]
    path.touch()
    with pytest.raises(ConfigError, match="must end in .npy, .npz:KEY or .safetensors:KEY but got"):
        read(str(tmp_path / name))


@SUFFIXES
@pytest.mark.parametrize(
    "shape", [(39, 4), (41, 4), (40, 3), (40, 100), (4, 40), (160,), (40, 4, 1)]
)
def test_another_shape_is_refused_by_both(tmp_path, suffix, shape):
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, suffix, np.zeros(shape, np.float32)))
    assert "(40, 4)" in str(caught.value)
    assert str(shape) in str(caught.value)


@SUFFIXES
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.complex64])
def test_what_is_no_real_number_is_refused(tmp_path, suffix, dtype):
    with pytest.raises(
        DataError, match="floating-point logits but .* has (torch|complex|<U|void|object)"
    ):
        read(write(tmp_path, suffix, np.ones((ROWS, CLASSES), dtype)))


@SUFFIXES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_logits_that_float32_cannot_hold_are_counted(tmp_path, suffix, value):
    values = LOGITS.astype(np.float64)
    values[[7, 7, 30], [0, 1, 2]] = value
    with pytest.raises(DataError, match="finite logits but 2 rows of .* the first is row 7"):
        read(write(tmp_path, suffix, values))


@SUFFIXES
def test_a_torn_file_is_one_clear_error_wherever_it_was_cut(tmp_path, suffix):
    spec = write(tmp_path, suffix, LOGITS)
    path = tmp_path / f"logits{suffix}"
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 16), *range(len(whole) - 32, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(
            CorruptError, match="teacher.logits: .* cannot be decoded: .*; write it anew"
        ):
            read(spec)


@SUFFIXES
def test_a_file_of_another_format_is_refused_as_such(tmp_path, suffix):
    spec = write(tmp_path, suffix, LOGITS)
    other = tmp_path / "logits.other"
    np.savez(other.with_suffix(".npz"), x=LOGITS) if suffix == ".npy" else np.save(other, LOGITS)
    source = other.with_suffix(".npz") if suffix == ".npy" else Path(f"{other}.npy")
    source.replace(tmp_path / f"logits{suffix}")
    with pytest.raises(CorruptError, match="cannot be decoded"):
        read(spec)


class Bomb:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_pickled_objects_are_never_run(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    spec = write(tmp_path, suffix, np.full((ROWS, CLASSES), Bomb(), object))
    with pytest.raises(RichkdError, match="allow_pickle=False|Object arrays|Python objects"):
        read(spec)
    assert not Path("exploded").exists()


# rows


def dataset(train_ids, test_ids, **changes):
    """Return images with the places that they have in their source; the label is the place modulo K."""
    parts = {
        part: Images(
            pixels=np.zeros((len(ids), 2, 2, 1), np.uint8),
            labels=np.array(ids) % CLASSES,
            ids=np.array(ids),
        )
        for part, ids in (("train", train_ids), ("test", test_ids))
    }
    return Dataset(name="toy", names=tuple("abcd"), pad=0, flip=False, **parts | changes)


# the source has 28 training and 12 test rows
GIVEN = dataset(range(28), range(28, ROWS), first_test=28)
CUT = dataset([k for k in range(ROWS) if k % 5], range(0, ROWS, 5))


def put(source, spec, field="teacher.logits"):
    return aligned(spec, source, field=field)


@SUFFIXES
def test_logits_of_a_whole_source_are_parted_as_it_is(tmp_path, suffix):
    train, test = put(GIVEN, write(tmp_path, suffix, LOGITS))
    assert np.array_equal(train, LOGITS[:28])
    assert np.array_equal(test, LOGITS[28:])


def test_logits_of_the_training_rows_leave_the_test_rows_unknown(tmp_path):
    train, test = put(GIVEN, write(tmp_path, ".npy", LOGITS[:28]))
    assert np.array_equal(train, LOGITS[:28])
    assert test is None


def test_of_a_source_that_is_cut_by_us_rows_are_picked_by_their_place(tmp_path):
    train, test = put(CUT, write(tmp_path, ".npy", LOGITS))
    assert np.array_equal(test, LOGITS[::5])
    assert np.array_equal(train, np.delete(LOGITS, np.s_[::5], 0))


@pytest.mark.parametrize("fold", [0, 3])
def test_each_fold_of_arrays_meets_its_own_rows(tmp_path, fold):
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.arange(ROWS) % CLASSES)
    # a picture says which row it is
    pixels = np.repeat(np.arange(ROWS, dtype=np.uint8), 12).reshape(ROWS, 2, 2, 3)
    np.savez(tmp_path / "data.npz", images=pixels, labels=labels)
    config = Data(source="arrays", path=str(tmp_path / "data.npz"), fold=fold)
    source = arrays(config, tmp_path, None)
    train, test = put(source, write(tmp_path, ".npy", LOGITS))
    assert len(test) == 8
    for found, images in ((train, source.train), (test, source.test)):
        assert np.array_equal(found, LOGITS[images.pixels[:, 0, 0, 0]])


@pytest.mark.parametrize("rows", [0, 12, 27, 29, 39, 41])
def test_another_number_of_rows_is_told_both_that_would_do(tmp_path, rows):
    with pytest.raises(DataError, match=r"one row an image .* \(28, 4\) or \(40, 4\), but"):
        put(GIVEN, write(tmp_path, ".npy", np.zeros((rows, CLASSES), np.float32)))


@pytest.mark.parametrize("rows", [8, 32])
def test_of_a_source_that_is_cut_by_us_only_all_rows_will_do(tmp_path, rows):
    with pytest.raises(DataError, match=r"one column a class, \(40, 4\), but"):
        put(CUT, write(tmp_path, ".npy", LOGITS[:rows]))


def with_labels(folder, labels, values=LOGITS):
    np.savez(folder / "x.npz", train=values, labels=labels)
    return f"{folder}/x.npz:train"


@pytest.mark.parametrize("source", [GIVEN, CUT])
@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8])
def test_labels_beside_the_logits_are_compared(tmp_path, source, dtype):
    labels = np.arange(ROWS) % CLASSES
    put(source, with_labels(tmp_path, labels.astype(dtype)))
    labels[[2, 30]] = labels[[30, 2]]
    labels[5] = (labels[5] + 1) % CLASSES
    differing = int((labels != np.arange(ROWS) % CLASSES).sum())
    with pytest.raises(DataError, match=f"clip.logits: the labels in .* in {differing} rows; are"):
        put(source, with_labels(tmp_path, labels.astype(dtype)), "clip.logits")


def test_labels_may_be_those_of_the_training_rows_alone(tmp_path):
    labels = np.arange(28) % CLASSES
    assert put(GIVEN, with_labels(tmp_path, labels, LOGITS[:28]))[1] is None
    assert put(GIVEN, with_labels(tmp_path, labels))[1] is not None
    with pytest.raises(DataError, match="in 28 rows"):
        put(GIVEN, with_labels(tmp_path, labels + 1, LOGITS[:28]))


def test_labels_that_are_not_known_on_either_side_are_not_compared(tmp_path):
    labels = np.arange(ROWS) % CLASSES
    own = labels[:28].copy()
    own[:20] = -1
    train = Images(pixels=GIVEN.train.pixels, labels=own)
    source = dataset(range(28), range(28, ROWS), train=train)
    labels[:20], labels[20:] = 3, np.where(labels[20:] == 2, -1, labels[20:])
    put(source, with_labels(tmp_path, labels))


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros(ROWS),
        np.full(ROWS, "a"),
        np.full(ROWS, True),
        np.zeros((ROWS, 1), int),
        np.array(3),
        np.full(ROWS, None, object),
    ],
)
def test_what_is_called_labels_and_is_none_is_ignored(tmp_path, labels):
    train, _ = put(GIVEN, with_labels(tmp_path, labels))
    assert np.array_equal(train, LOGITS[:28])


def test_damaged_labels_are_one_clear_error(tmp_path):
    spec, path = with_labels(tmp_path, np.arange(ROWS) % CLASSES), tmp_path / "x.npz"
    content = bytearray(path.read_bytes())
    content[content.index(b"labels.npy") + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="teacher.logits: .* cannot be decoded: .*; write it"):
        put(GIVEN, spec)


def pictures(root, *, without=()):
    """Make 2 classes of 3 training and 2 test files, some of them unreadable; return the names in order."""
    names = [
        f"{part}/{kind}/{k}.png"
        for part, count in (("train", 3), ("test", 2))
        for kind in "ab"
        for k in range(count)
    ]
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k, k, k)).save(root / name)
    for name in without:
        (root / name).write_bytes(b"no picture")
    return names


@pytest.mark.filterwarnings("ignore:.*are left out")
@pytest.mark.parametrize(
    "without",
    [
        (),
        ("train/a/0.png",),
        ("train/b/2.png",),
        ("test/a/0.png",),
        ("test/b/1.png",),
        ("train/b/2.png", "test/a/0.png"),
    ],
)
def test_rows_of_files_that_cannot_be_read_are_passed_over(tmp_path, without):
    names = pictures(tmp_path / "data", without=without)
    config = Data(source="folder", path=str(tmp_path / "data"), size=8, unreadable=0.5)
    source = folder(config, tmp_path / "cache", None)
    values = np.arange(20, dtype=np.float32).reshape(10, 2)  # of each file
    readable = [k for k, name in enumerate(names) if name not in without]
    train, test = put(source, write(tmp_path, ".npy", values))
    assert np.array_equal(train, values[[k for k in readable if k < 6]])
    assert np.array_equal(test, values[[k for k in readable if k >= 6]])
    train, test = put(source, write(tmp_path, ".npy", values[:6]))
    assert np.array_equal(train, values[[k for k in readable if k < 6]])
    assert test is None
    with pytest.raises(DataError, match=r"\(6, 2\) or \(10, 2\)"):
        put(source, write(tmp_path, ".npy", values[:7]))


def test_rows_that_nobody_asks_for_may_hold_anything(tmp_path):
    values = LOGITS.copy()
    values[[3, 7]] = np.nan
    spec = write(tmp_path, ".npy", values)
    found = read_logits(spec, [ROWS], CLASSES, field="clip.logits", unused=np.array([3, 7, 999]))
    assert np.array_equal(found.numpy(), values, equal_nan=True)
    with pytest.raises(DataError, match="1 rows of .* the first is row 7, counted from 0"):
        read_logits(spec, [ROWS], CLASSES, field="clip.logits", unused=np.array([3]))
