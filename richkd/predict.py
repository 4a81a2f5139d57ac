"""What a student sees in images of any size and format: its most probable classes.

Only checkpoints of richkd are loaded, whose weights are safetensors: nothing of them runs.
"""

import glob
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from richkd import files
from richkd.data.folder import image_files
from richkd.errors import ConfigError, DataError
from richkd.escape import line, to_csv
from richkd.files import to_json
from richkd.student import Student
from richkd.threads import ahead

BATCH = 64  # images; with those in flight all that is in memory
COLUMNS = ("path", "rank", "class", "probability")


class Prediction(NamedTuple):
    """What was seen in a file: the most probable classes with their probabilities, or why it could not be read."""

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        if self.problem is not None:
            return {"path": self.path, "problem": self.problem}
        classes = [{"class": name, "probability": share} for name, share in self.classes]
        return {"path": self.path, "classes": classes}


def find_images(words: Iterable[str]) -> list[str]:
    """Return the files that words stand for: each word's sorted, in the order of the words, each file once.

    Args:
        words: Files, folders (the images at any depth below, by their suffix), and patterns, where `**` is any depth.

    Raises:
        ConfigError: If a word stands for nothing.
    """
    found: list[str] = []
    for word in words:
        matched = [word] if Path(word).exists() else sorted(glob.glob(word, recursive=True))
        files = [file for each in matched for file in _inside(Path(each))]
        if not files:
            what = "that folder has no image" if matched else "there is no such file or folder"
            raise ConfigError(
                f"IMAGES must be files, folders of images or patterns but {what}: {word!r}; give another."
            )
        found += files
    return list(dict.fromkeys(found))


def _inside(path: Path) -> list[str]:
    if not path.is_dir():
        return [str(path)]
    return [str(path / file) for file in image_files(path, ".")]


@torch.inference_mode()
def predict(student: Student, paths: Iterable[str], top: int) -> Iterator[Prediction]:
    """Yield what a student sees in each file, in order.

    Args:
        student: In eval mode, on any device.
        paths: Files. One that cannot be read is yielded with its problem, and the others go on.
        top: Classes for each, at most.
    """
    top = min(top, len(student.names))
    found = ahead(partial(_read, student), paths)
    while batch := list(islice(found, BATCH)):
        images = [image for _, image in batch if isinstance(image, torch.Tensor)]
        best = iter(())
        if images:
            logits = student(torch.cat(images).to(student.mean.device))
            shares, classes = (part.tolist() for part in logits.double().softmax(1).topk(top))
            best = zip(shares, classes, strict=True)
        for path, image in batch:
            if not isinstance(image, torch.Tensor):
                yield Prediction(path, problem=image)
                continue
            seen = zip(*next(best), strict=True)
            yield Prediction(path, tuple((student.names[k], share) for share, k in seen))


def _read(student: Student, path: str) -> tuple[str, torch.Tensor | str]:
    if not Path(path).is_file():  # a pipe would never end
        return path, f"{path} cannot be read as an image (no regular file); repair or remove it."
    try:
        return path, student.read(path)
    except DataError as error:
        return path, str(error)


def row(prediction: Prediction, width: int) -> str:
    """Return a prediction as a line for the terminal, its path padded to `width`."""
    seen = (f"{line(name)} {100 * share:.1f} %" for name, share in prediction.classes)
    return "  ".join([line(prediction.path).ljust(width), *seen])


def check_target(path: Path) -> None:
    """Raise ConfigError unless predictions can be written to `path`."""
    if path.suffix not in (".csv", ".json"):
        raise ConfigError(
            f"--to must be a file FILE.csv or FILE.json but got {path}; name another."
        )
    files.check_target(path, "--to")


def to_file(predictions: list[Prediction], kind: str) -> bytes:
    """Return predictions as a file: `.json`, a list, or `.csv`, a row for each class of each image that could be read."""
    if kind == ".json":
        return to_json([each.to_dict() for each in predictions])
    rows = (
        (each.path, rank, name, round(share, 6))
        for each in predictions
        for rank, (name, share) in enumerate(each.classes, start=1)
    )
    return to_csv(COLUMNS, rows)
