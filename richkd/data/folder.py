"""Image files of one's own in class folders, decoded once into the cache.

    DIR/train/CLASS/**  with  DIR/test/CLASS/**  or  DIR/val/CLASS/**  or both
    DIR/CLASS/**                cut into training and test rows by `data.folds` and `data.fold`
    DIR/unlabelled/**           in either layout: training rows without a label

Where there are both, `val` rows are held out for settings and epochs and `test` rows are tested; one alone is
the test set. An entry of the cache holds `images.npy`, the pixels of training rows, then test rows, and
`card.json`, what was found in the files.
"""

import contextlib
import hashlib
import json
import math
import os
import stat
import warnings
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

from richkd import cache
from richkd.config import Data
from richkd.data.dataset import Dataset, Images, check_names, moments
from richkd.data.names import read_names
from richkd.data.pictures import pixels, reason, suffixes
from richkd.data.subsets import fold_of
from richkd.errors import ConfigError, DataError
from richkd.files import read_record, write_json
from richkd.progress import Progress
from richkd.threads import ahead

FORMAT = 1  # of the entry, and of what is done to a picture before it is kept
PIXELS, CARD = "images.npy", "card.json"
SHOWN = 5  # files named in a message


class Listing(NamedTuple):
    """All files of a source, in the order of the source.

    Attributes:
        root: Folder of the source.
        files: Relative paths of N files.
        labels: `(N,)`, -1 where none is known.
        names: Class names in the order of the labels.
        train: Positions of the training rows.
        test: Positions of the test rows.
        held_out: Positions of the training rows that the source sets aside, None if it sets none.
    """

    root: Path
    files: list[str]
    labels: np.ndarray
    names: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray
    held_out: np.ndarray | None


class Found(NamedTuple):
    """What is in a file: the digest of its bytes, and its pixels or why there are none."""

    sha256: str
    image: np.ndarray | None
    problem: str | None


def folder(config: Data, root: Path, progress: Progress | None) -> Dataset:
    """Return the images under `data.path`, each brought to `data.size` pixels of a side.

    Raises:
        ConfigError: If there is no such folder.
        DataError: If its folders are no classes, or more files are unreadable than `data.unreadable` allows.
    """
    listed = listing(config)
    order = np.concatenate([listed.train, listed.test])
    key = {
        "format": FORMAT,
        "pillow": PIL.__version__,
        "size": config.size,
        "train": len(listed.train),
        "files": _stamp(listed, order),
    }

    def build(place: Path) -> None:
        _build(place, listed, order, config.size, progress)

    entry = cache.folder(root, "images", key, build, progress=progress)
    card = read_record(entry / CARD, "mean", "std", "problems", "sha256")
    found = np.load(entry / PIXELS, mmap_mode="r", allow_pickle=False)
    readable = np.array([problem is None for problem in card["problems"]])
    unreadable = tuple(
        f"{listed.files[k]}: {problem}"
        for k, problem in sorted(zip(order.tolist(), card["problems"], strict=True))
        if problem is not None
    )
    _apply_policy(unreadable, len(order), config)
    ids = order[readable]
    digests = [sha256 for sha256, good in zip(card["sha256"], readable, strict=True) if good]

    def part(start: int, stop: int) -> Images:
        mine = ids[start:stop]
        labels = listed.labels[mine]
        return Images(
            pixels=found[start:stop],
            labels=labels,
            ids=mine,
            files=tuple(listed.root / listed.files[k] for k in mine),
            digest=_digest(digests[start:stop], labels, config.size),
        )

    train = int(readable[: len(listed.train)].sum())
    held_out = None
    if listed.held_out is not None:
        held_out = np.flatnonzero(np.isin(ids[:train], listed.held_out))
        if len(held_out) == 0:
            raise DataError(
                f"data.path: val beside test holds the validation images but none of {listed.root / 'val'} can be "
                "used; add some, or remove it to have them taken from train."
            )
    return Dataset(
        name="folder",
        names=listed.names,
        train=part(0, train),
        test=part(train, len(ids)),
        pad=config.size // 8,  # 4 of 32, as for CIFAR
        flip=True,
        held_out=held_out,
        unreadable=unreadable,
        first_test=None if _layout(listed.root) == [""] else int(listed.test[0]),
        mean=tuple(card["mean"]),
        std=tuple(card["std"]),
    )


def listing(config: Data) -> Listing:
    """Return all image files under `data.path`, without reading them.

    A file is an image if Pillow knows its suffix. What begins with a dot is passed over. Links are followed;
    below a class each real folder is entered once.

    Raises:
        ConfigError: If there is no such folder.
        DataError: If its folders are no classes.
    """
    if config.path is None or not Path(config.path).is_dir():
        raise ConfigError(
            f"data.path must be a folder that holds a folder of images for each class but got {config.path}."
        )
    root = Path(config.path).absolute()
    if (root / "unlabeled").is_dir():  # it would be a class, or passed over
        raise DataError(
            f"data.path: pictures without a label lie in unlabelled but {root} has unlabeled; rename it."
        )
    prefixes = _layout(root)
    classes = {prefix: folders(root / prefix) for prefix in prefixes}
    if prefixes == [""]:
        classes[""] = [name for name in classes[""] if name != "unlabelled"]
    known = classes[prefixes[0]]
    _check_classes(root, classes)
    names = tuple(known)
    if config.names is not None:
        names = read_names(Path(config.names), len(known))
    check_names("data.path", names)
    files, labels, ends = [], [], []
    for prefix in prefixes:
        for label, name in enumerate(known):
            if name not in classes[prefix]:
                continue
            found = image_files(root, prefix + name)
            if not found:
                raise DataError(
                    f"data.path: each class folder must hold images but {root / prefix / name} has none, in a format "
                    "that Pillow reads; fill or remove it."
                )
            files += found
            labels += [label] * len(found)
        ends.append(len(files))
    loose = image_files(root, "unlabelled") if (root / "unlabelled").is_dir() else []
    at = ends[-1] if prefixes == [""] else ends[-2]
    files[at:at], labels[at:at] = loose, [-1] * len(loose)
    labels, everything = np.array(labels), np.arange(len(files))
    test = fold_of(labels, config) if prefixes == [""] else everything[at + len(loose) :]
    return Listing(
        root=root,
        files=files,
        labels=labels,
        names=names,
        train=np.setdiff1d(everything, test),
        test=test,
        held_out=everything[ends[0] : ends[1]] if len(prefixes) == 3 else None,
    )


def _layout(root: Path) -> list[str]:
    """Return where class folders lie below `root`: training first, the test set last; once if it is cut by us."""
    parts = [part for part in ("train", "val", "test") if (root / part).is_dir()]
    if not parts:
        return [""]
    if "train" not in parts or len(parts) == 1:
        raise DataError(
            f"data.path must hold train and one of test and val, or class folders alone, but {root} has "
            f"{', '.join(map(repr, folders(root)))}; rename its folders, or give one of them as data.path to have "
            "test rows cut from it."
        )
    return [f"{part}/" for part in parts]


def _check_classes(root: Path, classes: dict[str, list[str]]) -> None:
    """Raise DataError unless there are two classes, of readable names, and all parts know the same ones."""
    first, *others = classes
    known = classes[first]
    for name in known:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"data.path: the names of class folders must be UTF-8 but {root / first} has {os.fsencode(name)!r}; "
                "rename it."
            ) from error
    if len(known) < 2:
        raise DataError(
            f"data.path must hold a folder of images for each of at least 2 classes but {root / first} has "
            f"{len(known)} folders; put the images of each class into one of its own."
        )
    for prefix in others:
        if foreign := sorted(set(classes[prefix]) - set(known)):
            raise DataError(
                f"data.path: each class must be known to train but {foreign[:SHOWN]!r} in {root / prefix} are not; "
                "move or remove them."
            )
    last = [*classes][-1]
    if missing := sorted(set(known) - set(classes[last])):
        raise DataError(
            f"data.path: each class needs test images but {missing[:SHOWN]!r} have no folder in {root / last}; "
            "add some."
        )


def folders(path: Path) -> list[str]:
    """Return the names of the folders in `path`, sorted."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.name[0] != "." and _is_folder(e))


def _is_folder(entry: os.DirEntry) -> bool:
    # DirEntry.is_dir() raises on a link that leads to itself
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def image_files(root: Path, folder: str) -> list[str]:
    """Return the image files at any depth below `folder`, a path relative to `root` as they are, sorted.

    A file is an image if Pillow knows its suffix. What begins with a dot is passed over. Links are followed; each real
    folder is entered once.
    """
    known, found, entered, waiting = suffixes(), [], set(), [folder]
    while waiting:
        inside = waiting.pop()
        status = os.stat(root / inside)
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        deeper = []
        with os.scandir(root / inside) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                if _is_folder(entry):
                    deeper.append(f"{inside}/{entry.name}")
                elif os.path.splitext(entry.name)[1].lower() in known:
                    found.append(f"{inside}/{entry.name}")
        waiting += sorted(deeper, reverse=True)
    return sorted(found)


def _stamp(listed: Listing, order: np.ndarray) -> str:
    """Return a digest that changes with the name, size or times of any file, and with the order of rows.

    The time of change is one of them, since that of modification can be anything: many archives give all files
    the same, and pictures without compression have the same size.
    """
    text = hashlib.sha256()
    for k in order:
        path = listed.root / listed.files[k]
        try:
            status = os.stat(path)
        except OSError as error:
            raise _refused(path, reason(error)) from error
        if not stat.S_ISREG(status.st_mode):
            raise _refused(path, "no regular file")
        times = status.st_mtime_ns, status.st_ctime_ns
        text.update(json.dumps([listed.files[k], status.st_size, *times]).encode())
    return text.hexdigest()


def _refused(path: Path, why: str) -> DataError:
    return DataError(
        f"data.path: {path} cannot be read from the disk ({why}); make it readable or remove it."
    )


def _build(
    place: Path, listed: Listing, order: np.ndarray, size: int, progress: Progress | None
) -> None:
    """Decode all files into `place`, readable or not, so that all that are not can be named."""
    count, sha256, problems = 0, [], []
    paths, read = (listed.root / listed.files[k] for k in order), partial(_read, size=size)
    # plain writes: on a full disk they raise, where a memory map would kill the process
    with open(place / PIXELS, "xb") as file, contextlib.closing(ahead(read, paths)) as decoded:
        file.write(_header(0, size))
        for found in decoded:
            if progress is not None:
                progress("images", len(sha256), len(order))
            sha256.append(found.sha256)
            problems.append(found.problem)
            if found.image is not None:
                file.write(found.image)
                count += 1
        file.seek(0)
        file.write(_header(count, size))
    if progress is not None:
        progress("images", len(order), len(order))
    readable = len(listed.train) - sum(p is not None for p in problems[: len(listed.train)])
    train = np.load(place / PIXELS, mmap_mode="r")[:readable]
    mean, std = moments(train) if readable else ((), ())
    card = {"mean": mean, "std": std, "problems": problems, "sha256": sha256}
    write_json(place / CARD, card)


def _read(path: Path, size: int) -> Found:
    try:
        content = path.read_bytes()
    except OSError as error:  # no fault of the image, so nothing to be remembered of it
        raise _refused(path, reason(error)) from error
    image = problem = None
    try:
        image = pixels(content, size)
    except DataError as error:
        problem = str(error)
    return Found(hashlib.sha256(content).hexdigest(), image, problem)


def _header(count: int, size: int) -> bytes:
    """Return the first bytes of the `.npy` file; as many whatever the count."""
    stream = BytesIO()
    layout = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    np.lib.format.write_array_header_1_0(stream, layout)
    return stream.getvalue()


def _apply_policy(unreadable: tuple[str, ...], total: int, config: Data) -> None:
    """Warn of files that are left out; a DataError if they are more than `data.unreadable` allows."""
    share = len(unreadable) / total
    if share > config.unreadable:
        more = "; ..." if len(unreadable) > SHOWN else ""
        needed = math.ceil(1000 * share) / 1000
        allow = f", or allow a share with data.unreadable={needed}" if needed <= 0.5 else ""
        raise DataError(
            f"data.unreadable={config.unreadable:g} but {len(unreadable)} of the {total} files in {config.path} cannot "
            f"be read as images ({'; '.join(unreadable[:SHOWN])}{more}); repair or remove them{allow}."
        )
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} of the {total} files in {config.path} cannot be read as images and are left out, the "
            f"first is {unreadable[0]}.",
            stacklevel=3,
        )


def _digest(sha256: list[str], labels: np.ndarray, size: int) -> str:
    """Return the digest of rows by their content: the same wherever the files lie."""
    text = hashlib.sha256(f"folder {size}".encode())
    for digest in sha256:
        text.update(bytes.fromhex(digest))
    text.update(labels.astype(np.int64))
    return text.hexdigest()
