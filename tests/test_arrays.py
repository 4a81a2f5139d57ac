"""Images in an `.npz` file: what is read, how it is cut, and what is refused."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from richkd.config import Data
from richkd.data import load, split
from richkd.errors import ConfigError, CorruptError, DataError, RichkdError

ROWS = 60
LABELS = np.array([0] * 30 + [1] * 20 + [2] * 10)  # unequal, so that shares can be seen


def pixels(rows=ROWS, size=(4, 4), channels=3):
    """Return pictures, each with its row as its grey level."""
    each = np.arange(rows, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(each, (rows, *size, channels)).copy()


def written(folder, **changes):
    content = {"images": pixels(), "labels": LABELS} | changes
    path = folder / "mine.npz"
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


def opened(path, tmp_path, **options):
    return load(Data(source="arrays", path=str(path), **options), tmp_path / "cache")


def refused(path, tmp_path, kind, **options):
    with pytest.raises(kind) as caught:
        opened(path, tmp_path, **options)
    return str(caught.value)


# what is read


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_keep_their_pixels_their_labels_and_their_places(tmp_path, dtype, save):
    save(tmp_path / "mine.npz", images=pixels(), labels=LABELS.astype(dtype))
    found = opened(tmp_path / "mine.npz", tmp_path)
    assert found.name == "arrays"
    for part in (found.train, found.test):
        assert np.array_equal(part.pixels, pixels()[part.ids])
        assert np.array_equal(part.labels, LABELS[part.ids])
    assert sorted([*found.train.ids, *found.test.ids]) == list(range(ROWS))


def test_classes_without_names_are_called_by_their_number(tmp_path):
    assert opened(written(tmp_path), tmp_path).names == ("0", "1", "2")


@pytest.mark.parametrize("dtype", [str, "S"])
def test_names_lie_in_the_file_as_text_or_as_bytes(tmp_path, dtype):
    path = written(tmp_path, names=np.array(["cat", "dog", "owl"], dtype))
    assert opened(path, tmp_path).names == ("cat", "dog", "owl")


def test_names_of_bytes_are_utf_8(tmp_path):
    path = written(tmp_path, names=np.array([b"chaise", "bébé".encode(), b"owl"]))
    assert opened(path, tmp_path).names == ("chaise", "bébé", "owl")


def test_a_file_of_names_goes_before_those_in_the_data(tmp_path):
    path = written(tmp_path, names=np.array(["cat", "dog", "owl"]))
    (tmp_path / "names.txt").write_text("ein\nzwei\n\ndrei\n")
    found = opened(path, tmp_path, names=str(tmp_path / "names.txt"))
    assert found.names == ("ein", "zwei", "drei")


@pytest.mark.parametrize(("text", "said"), [("a\nb\n", "has 2"), (None, "is missing")])
def test_a_file_of_names_must_have_one_a_class(tmp_path, text, said):
    if text:
        (tmp_path / "names.txt").write_text(text)
    text = refused(written(tmp_path), tmp_path, RichkdError, names=str(tmp_path / "names.txt"))
    assert text.startswith("data.names ")
    assert said in text


def test_crops_and_flips_can_be_chosen(tmp_path):
    path = written(tmp_path, images=pixels(size=(32, 24)))
    assert (opened(path, tmp_path).pad, opened(path, tmp_path).flip) == (4, True)
    found = opened(path, tmp_path, pad=0, flip=False)
    assert (found.pad, found.flip) == (0, False)


# how they are cut


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_the_folds_together_test_each_labelled_row_once(tmp_path, folds):
    labels = LABELS.copy()
    labels[::7] = -1
    sizes = np.bincount(labels[labels >= 0])
    path = written(tmp_path, labels=labels)
    if sizes.min() < folds:
        assert "lower data.folds" in refused(path, tmp_path, DataError, folds=folds)
        return
    parts = [opened(path, tmp_path, folds=folds, fold=k) for k in range(folds)]
    tested = np.concatenate([part.test.ids for part in parts])
    assert sorted(tested) == np.flatnonzero(labels >= 0).tolist()
    for part in parts:
        counts = np.bincount(part.test.labels, minlength=3)
        assert (abs(counts - sizes / folds) < 1).all()
        assert sorted([*part.train.ids, *part.test.ids]) == list(range(ROWS))
        assert set(np.flatnonzero(labels < 0)) <= set(part.train.ids)


def test_the_fold_is_the_same_for_every_seed(tmp_path):
    path = written(tmp_path)
    first, second = (opened(path, tmp_path, seed=seed) for seed in (0, 1))
    assert np.array_equal(first.test.ids, second.test.ids)
    parts = [split(first, Data(seed=seed, validation=6), 0).validation for seed in (0, 1)]
    assert not np.array_equal(*parts)


@pytest.mark.parametrize("labels", [np.full(ROWS, -1), np.r_[LABELS[:-7], np.full(7, -1)]])
def test_too_few_labelled_rows_for_the_folds_are_counted(tmp_path, labels):
    text = refused(written(tmp_path, labels=labels), tmp_path, DataError)
    assert "data.folds=5 labelled rows of each class" in text
    assert ("there is none" if labels.max() < 0 else "class 2 has 3") in text


@pytest.mark.parametrize(
    ("validation", "rows"), [(12, 12), (0.25, 12), (0.01, 3), (1 / 48, 3), (12.0, 12)]
)
def test_validation_is_a_number_of_rows_or_a_share_of_the_labelled_ones(tmp_path, validation, rows):
    config = Data(source="arrays", path=str(written(tmp_path)), validation=validation)
    found = load(config, tmp_path)
    cut = split(found, config, 0)
    assert len(found.train) == 48
    assert len(cut.validation) == rows
    assert np.bincount(found.train.labels[cut.validation], minlength=3).min() >= 1


@pytest.mark.parametrize("validation", [0, -1, 1.5, 2.25, float("nan"), 0.0])
def test_validation_is_no_other_number(validation):
    with pytest.raises(ConfigError, match="data.validation must"):
        Data(validation=validation)


# what is refused


@pytest.mark.parametrize("path", [None, "none.npz", "."])
def test_a_missing_file_is_asked_for(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match="data.path must be an .npz file .* but .* (given|no file)"
    ):
        load(Data(source="arrays", path=path), tmp_path)


@pytest.mark.parametrize("missing", ["images", "labels"])
def test_a_missing_entry_is_told_with_those_that_are_there(tmp_path, missing):
    path = written(tmp_path, **{missing: None}, x=np.zeros(2))
    text = refused(path, tmp_path, ConfigError)
    assert f"lacks {missing}; it has " in text
    assert text.endswith("x.")


def test_a_file_without_entries_says_so(tmp_path):
    np.savez(tmp_path / "mine.npz")
    text = refused(tmp_path / "mine.npz", tmp_path, ConfigError)
    assert text.endswith("lacks images, labels; it has nothing.")


@pytest.mark.parametrize("content", [b"", b"P", b"hello world\n", b"\x80\x04\x95"])
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    assert "as numpy.savez writes it, but" in refused(path, tmp_path, ConfigError)


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "mine.npy", pixels())
    assert "must be an .npz file" in refused(tmp_path / "mine.npy", tmp_path, ConfigError)


class Bomb:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("key", ["images", "labels", "names"])
def test_pickled_objects_are_refused_and_not_run(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, **{key: np.array([Bomb()] * 3, object)})
    assert "has Python objects; save them as arrays" in refused(path, tmp_path, DataError)
    assert not Path("exploded").exists()


def test_a_torn_file_is_damaged_wherever_it_was_cut(tmp_path):
    path = written(tmp_path)
    whole = path.read_bytes()
    for size in [*range(4, len(whole), 64), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:size])
        assert "cannot be decoded" in refused(path, tmp_path, CorruptError)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_is_found_or_harmless(tmp_path, save):
    path = tmp_path / "mine.npz"
    save(path, images=pixels(), labels=LABELS)
    whole = path.read_bytes()
    for place in range(2, len(whole), 23):
        changed = bytearray(whole)
        changed[place] ^= 0x55
        path.write_bytes(changed)
        try:
            found = opened(path, tmp_path, seed=place)
        except RichkdError as error:
            assert "data.path" in str(error)
        else:
            assert np.array_equal(found.train.pixels, pixels()[found.train.ids])


def test_an_array_that_claims_to_be_vast_is_refused(tmp_path):
    path = written(tmp_path)
    vast = np.lib.format
    with zipfile.ZipFile(path, "w") as archive:
        for key in ("images", "labels"):
            with archive.open(f"{key}.npy", "w") as file:
                layout = {"descr": "|u1", "fortran_order": False, "shape": (2**50, 8, 8, 3)}
                vast.write_array_header_1_0(file, layout)
    assert "cannot be decoded" in refused(path, tmp_path, CorruptError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": pixels().astype(np.float32)}, "images must be uint8 .* got float32"),
        ({"images": pixels()[..., 0]}, r"\(N, H, W, 1 or 3\) but got uint8 of shape \(60, 4, 4\)"),
        ({"images": pixels(channels=4)}, r"got uint8 of shape \(60, 4, 4, 4\)"),
        ({"images": pixels().transpose(0, 3, 1, 2)}, r"got uint8 of shape \(60, 3, 4, 4\)"),
        ({"images": pixels(59)}, r"one label an image but got \(60,\) for 59"),
        ({"labels": LABELS[:, None]}, r"one label an image but got \(60, 1\)"),
        ({"labels": LABELS.astype(float)}, "labels must be integers but got float64"),
        ({"labels": np.array(list("abc") * 20)}, "labels must be integers but got <U1"),
        (
            {"labels": np.append(LABELS[1:], 2**31 - 1)},
            "or be -1, but there is 2147483647 among 60",
        ),
        ({"names": np.array(3)}, "`names` must be text, one a class, but got int64 of shape"),
        ({"names": np.array([1, 2, 3])}, "`names` must be text, one a class, but got int64"),
        ({"names": np.array([["a", "b", "c"]])}, r"but got <U1 of shape \(1, 3\)"),
        ({"names": np.array([b"a", b"b", b"\xff"])}, "`names` must be UTF-8"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_the_file(tmp_path, changes, message):
    path = written(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        opened(path, tmp_path)
    assert str(caught.value).startswith(f"data.path={path}: ")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "labels must lie in 0 to 1"),
        (["a", "b", "c", "d"], "has none for .'d'."),
        (["a", "a", "b"], "class names must differ"),
    ],
)
def test_names_that_do_not_fit_the_labels_are_refused(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        opened(written(tmp_path, names=np.array(names)), tmp_path)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("digits", {"root": "x"}),
        ("digits", {"download": True}),
        ("digits", {"path": "x"}),
        ("cifar100", {"names": "x"}),
        ("cifar100", {"path": "x"}),
        ("cifar100", {"fold": 1}),
        ("cifar100", {"folds": 3}),
        ("folder", {"root": "x"}),
        ("arrays", {"download": True}),
        ("arrays", {"size": 64}),
        ("arrays", {"unreadable": 0.1}),
    ],
)
def test_a_key_of_another_source_is_not_passed_over(tmp_path, source, options):
    (key,) = options
    with pytest.raises(ConfigError, match=f"data.{key} is a matter of data.source=.*{source}; lea"):
        load(Data(source=source, **options), tmp_path)


def test_labels_that_begin_at_one_are_told_so(tmp_path):
    told = refused(written(tmp_path, labels=LABELS + 1), tmp_path, DataError)
    assert "labels must begin at 0 but the lowest is 1" in told
