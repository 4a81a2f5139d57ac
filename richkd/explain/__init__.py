"""What the networks look at, and what fusion did to an image: pictures for people.

    python -m richkd explain runs/ce runs/kd runs/richkd-l     # Grad-CAM of teacher and students, samples of the fused teacher
    python -m richkd explain my.yaml fusion.alpha=0.2          # of the teachers of a config alone

    FOLDER/     explain.html  explain.md  explain.json  grad-cam.svg .png .csv  repaired.svg ...

Rows are drawn by `seed`: the same call shows the same images.
"""

import contextlib
import re
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from richkd import cache, checkpoint, distill, page
from richkd.config import Config
from richkd.data.views import normalise
from richkd.draw import Picture, kept, nothing
from richkd.errors import ConfigError, DataError
from richkd.evaluate.outcomes import TOP, happened
from richkd.explain import panels, samples
from richkd.explain.cam import Cam, grad_cam
from richkd.files import make_folder, read_record, write_json
from richkd.progress import Progress, stoppable
from richkd.student import Student, find_checkpoint, run_config
from richkd.teachers import FusedTeacher, Outputs

IMAGES, SAMPLES = 8, 3  # in the Grad-CAM panel; of each outcome
WIDTH = 80  # columns of a line
MOST = 16  # of either, so that a picture can be looked at
PARTS = ("best", "last")  # checkpoints of a run
BESIDE = ("ce", "kd")  # refits of a sweep that its best is looked at beside


class Explained(NamedTuple):
    """What `look` found: pictures, and the same as plain JSON."""

    pictures: list[Picture]
    found: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Watched:
    """A network that is looked at.

    Attributes:
        network: Returns logits.
        images: Given rows of the test set, what it sees `(N, C, H, W)`.
    """

    network: nn.Module
    images: Callable[[Tensor], Tensor]


def explain(
    students: dict[str, Path],
    config: Config,
    folder: Path,
    *,
    images: int = IMAGES,
    shown: int = SAMPLES,
    stop: Callable[[], int | None] = lambda: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Look at students and their teachers, and write what was found into a folder: pictures, tables, a page, JSON.

    Args:
        students: Checkpoints by what their students are called.
        config: Whose data they are of, and whose teachers are looked at.
        folder: Where; what `explain` wrote there before is replaced.
        images: In the Grad-CAM panel.
        shown: Samples of each outcome, at most.
        stop: Asked while something is prepared; a signal number ends it.
        progress: Told what is being prepared.

    Returns:
        What `explain.json` holds, and `folder` and `page`.
    """
    drawn, found = look(students, config, images=images, shown=shown, stop=stop, progress=progress)
    title = f"{', '.join(students) or 'Teachers'} on {config.data.source}"
    blocks: list[page.Block] = [
        page.Text(f"Test images, drawn by seed {config.seed}.", "soft"),
        *(page.Text(note, "note") for note in found["notes"]),
        page.Heading("Where the networks look"),
        page.Pictures(drawn[:1]),
        page.Heading("What fusion did"),
        *([page.Text(found["fusion"], "lead")] if "fusion" in found else []),
        page.Pictures(drawn[1:]),
    ]
    make_folder(folder, "--to")
    html = page.write(folder, "explain", title, blocks)
    kept(folder, drawn)
    write_json(folder / "explain.json", found)
    return found | {"folder": str(folder), "page": str(html)}


def look(
    students: dict[str, Path],
    config: Config,
    *,
    images: int = IMAGES,
    shown: int = SAMPLES,
    stop: Callable[[], int | None] = lambda: None,
    progress: Progress | None = None,
) -> Explained:
    """Look at students and their teachers; the arguments are those of `explain`.

    Returns:
        The pictures, the Grad-CAM panel first, those that cannot be drawn among them, which say why; and `data`, `seed`, the
        `rows` and `labels` of the Grad-CAM panel, by network its `layers`, `networks` with what each says of those rows, by
        outcome the `samples`, in a sentence what `fusion` did, and `notes`.

    Raises:
        ConfigError: If a checkpoint is no student of this task.
    """
    prepared = stoppable(progress, stop)
    task = distill.open_task(config, prepared)
    watched, notes = {}, list[str]()
    teacher = _teacher(students, config, task, prepared, notes)
    if teacher is not None and teacher.task is not None:
        own = teacher.task.network
        if own is None:
            notes.append(
                "The task teacher was given as logits, so that there is no network of it to look at."
            )
        else:
            bare = own.network if isinstance(own, Outputs) else own
            watched["teacher"] = Watched(network=bare, images=teacher.task.test_views.images)
    watched |= {name: student_of(path, task) for name, path in students.items()}
    drawn, found = _cams(watched, task, config, images, notes, prepared)
    more, picked = _samples(teacher, task, config, shown, prepared)
    answer = {"data": task.dataset.name, "seed": config.seed, **found, **picked, "notes": notes}
    return Explained([*drawn, *more], answer)


def _teacher(
    students: dict[str, Path],
    config: Config,
    task: distill.Task,
    progress: Progress,
    notes: list[str],
) -> FusedTeacher | None:
    """Return the teachers of a config; those of students only as they had them, and `notes` says where that cannot be."""
    try:
        # one is not trained again for a look at its students
        with cache.found_only("teachers") if students else contextlib.nullcontext():
            teacher = distill.open_teacher(config, task, progress)
    except cache.Missing:
        notes.append(
            "Without teachers: those of the runs are in this cache no more; cache=FOLDER says where they are."
        )
        return None
    own = {} if teacher is None else teacher.identities
    for name, path in students.items():
        record = path.parent / "run.json"
        then = read_record(record).get("teachers", {}) if record.exists() else {}
        others = sorted(who for who in own.keys() & then.keys() if own[who] != then[who])
        if others:
            notes.append(f"The {' and the '.join(others)} that {name} had is another one.")
    return teacher


def students_of(places: list[Path]) -> dict[str, Path]:
    """Return the checkpoints that runs, checkpoints and sweeps stand for, by what their students are called.

    A student is called by its method and, where another has it too, by its run. A sweep stands for its best refit, with the
    refits of plain labels and of plain distillation that have the same seed.

    Raises:
        ConfigError: If there is no checkpoint.
        CorruptError: If it is damaged.
    """
    found: list[tuple[str, Path]] = []
    for place in places:
        own = find_checkpoint(place)
        run = own.absolute().parent
        refit = re.fullmatch(r"(.+)-seed(\d+)", run.name)
        if (place / "summary.json").exists() and refit:
            beside = [(name, run.with_name(f"{name}-seed{refit[2]}") / "best") for name in BESIDE]
            found += [(name, path) for name, path in beside if checkpoint.exists(path)]
            found.append((refit[1], own))
        else:
            found.append((config_of(own).method.name, own))
    names = Counter(name for name, _ in found)
    runs = (path.absolute().parent if path.name in PARTS else path for _, path in found)
    return {
        name if names[name] == 1 else f"{name} {run.name}": path
        for (name, path), run in zip(found, runs, strict=True)
    }


def folder_of(place: Path) -> Path:
    """Return where the pictures of a run, a checkpoint or a sweep are written if no folder is named: inside, or beside it."""
    place = place.absolute()
    for run in (place, place.parent):
        if any((run / file).exists() for file in ("run.json", "sweep.json")):
            return run / "explain"
    return Path(f"{place.name}-explain")


def lines(answer: dict[str, Any]) -> list[str]:
    """Return what was found as lines for the terminal."""
    found = [line for note in answer["notes"] for line in textwrap.wrap(note, WIDTH)]
    if answer["layers"]:
        found.append(
            f"grad-cam     {', '.join(answer['layers'])} on {len(answer['rows'])} test images"
        )
    for name, each in answer["samples"].items():
        title = samples.OUTCOMES[name][0].lower()
        found.append(f"{title:<34} {each['count']:,} test images, {len(each['shown'])} shown")
    found += textwrap.wrap(answer.get("fusion", ""), WIDTH)
    return [*found, f"pictures     {answer['page']}"]


def config_of(folder: Path, changes: dict[str, Any] | None = None) -> Config:
    """Return the run that made a checkpoint, on whatever this machine has.

    Args:
        folder: Checkpoint of a student.
        changes: Dotted keys that say where things lie now.
    """
    return run_config(checkpoint.load(folder), changes)


def together(configs: list[Config]) -> Config:
    """Return the first of several runs that listens to the most teachers: theirs are the ones to look at."""
    return max(configs, key=lambda config: config.loss.distils + config.asks_clip)


def student_of(folder: Path, task: distill.Task) -> Watched:
    """Return the student of a checkpoint.

    Raises:
        ConfigError: If it is none, or one of another task.
        CorruptError: If it is damaged.
    """
    saved = checkpoint.load(folder)
    student, dataset = Student(saved).eval().requires_grad_(False).to(task.device), task.dataset
    if saved.meta.get("data") != dataset.digest or student.names != dataset.names:
        raise DataError(
            f"{folder} was made with other images or classes than {dataset.name} has here (digest "
            f"{str(saved.meta.get('data'))[:12]}, now {dataset.digest[:12]}); say where its data lie, or look at it alone."
        )

    def images(rows: Tensor) -> Tensor:
        return normalise(task.test.pixels(rows), student.mean, student.std)

    return Watched(network=student.network, images=images)


def _cams(
    watched: dict[str, Watched],
    task: distill.Task,
    config: Config,
    images: int,
    notes: list[str],
    progress: Progress,
) -> tuple[list[Picture], dict[str, Any]]:
    """Return the Grad-CAM panel and what is in it; networks without a place to look at are told in `notes`."""
    count = len(task.dataset.test)
    drawn = np.random.default_rng([config.seed, 7]).permutation(count)[:images]
    rows = torch.from_numpy(np.sort(drawn))
    labels = torch.from_numpy(task.dataset.test.labels)[rows]
    cams: dict[str, Cam] = {}
    for k, (name, each) in enumerate(watched.items()):
        progress("maps", k, len(watched))
        try:
            cams[name] = grad_cam(each.network, each.images(rows), labels)
        except ConfigError as error:
            notes.append(f"{name}: {error}")
    layers = {}
    for name, cam in cams.items():
        height, width = cam.layer.layout.grid
        layers[name] = f"{cam.layer.name} ({height} x {width})"
    shares = {name: cam.logits.double().softmax(1) for name, cam in cams.items()}
    names = task.dataset.names
    found = {
        "rows": rows.tolist(),
        "labels": [names[k] for k in labels.tolist()],
        "layers": layers,
        "networks": {name: _said(own, labels, names) for name, own in shares.items()},
    }
    if not cams:
        text = "there is neither a student nor a task teacher with a network to look at."
        return [nothing("grad-cam", "Where the networks look", text)], found
    progress("maps", len(watched), len(watched))
    panel = panels.maps_picture(
        list(task.test.pixels(rows).cpu().numpy()),
        rows.tolist(),
        labels.tolist(),
        names,
        {name: (cam.maps, shares[name]) for name, cam in cams.items()},
        layers,
    )
    return [panel], found


def _said(shares: Tensor, labels: Tensor, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return what a network says of images, given its probabilities `(N, K)`."""
    values, classes = shares.max(1)
    own = shares.gather(1, labels[:, None])[:, 0]
    each = zip(classes.tolist(), values.tolist(), own.tolist(), labels.tolist(), strict=True)
    return [
        {"class": names[k], "probability": p, "probability_of_label": q, "right": k == label}
        for k, p, q, label in each
    ]


def _samples(
    teacher: FusedTeacher | None,
    task: distill.Task,
    config: Config,
    most: int,
    progress: Progress,
) -> tuple[list[Picture], dict[str, Any]]:
    """Return a picture of each outcome of fusion and what is in them, a single one that says so where nothing is fused."""
    shown = {} if teacher is None else teacher.shown("test")
    if "fused" not in shown:
        why = (
            "given logits do not cover the test images"
            if teacher is not None and teacher.task is not None and teacher.clips
            else f"{config.method.name} does not listen to both a task teacher and CLIP"
        )
        text = f"there are no samples to show, since {why}."
        return [nothing("samples", "Samples", text)], {"samples": {}}
    shown = {who: logits.cpu() for who, logits in shown.items()}
    labels = torch.from_numpy(task.dataset.test.labels)
    which = happened(shown["teacher"], shown["fused"], labels)
    picked = samples.pick(which, most, config.seed)
    names, drawn, found = task.dataset.names, list[Picture](), dict[str, Any]()
    how = f"alpha {config.fusion.alpha:g}"
    if config.fusion.weighting != "one":
        how += f" by {config.fusion.weighting}"
    warmth = "T = 1"
    if config.fusion.space == "probs":
        warmth += f", of the fused teacher at T = {teacher.temperature:g}"
    for k, (name, (title, meaning)) in enumerate(samples.OUTCOMES.items()):
        progress("samples", k, len(samples.OUTCOMES))
        count, rows = int(which[name].sum()), picked[name]
        chosen = [samples.sample(row, int(labels[row]), shown) for row in rows]
        found[name] = {"count": count, "shown": [_sample(each, names) for each in chosen]}
        if not chosen:
            drawn.append(nothing(name, title, f"there is no such test image; {meaning}."))
            continue
        text = (
            f"{len(rows)} of {count} such test images, and how probable their classes are at {warmth}; the true class lies on a "
            "green band, the first choice is dark."
        )
        pixels = list(task.test.pixels(torch.tensor(rows)).cpu().numpy())
        drawn.append(panels.bars_picture(name, title, meaning, text, pixels, chosen, names, how))
    progress("samples", len(samples.OUTCOMES), len(samples.OUTCOMES))
    counts = {name: int(rows.sum()) for name, rows in which.items()}
    wrong = counts["repaired"] + counts["both_wrong"]
    fusion = (
        f"Of {len(labels):,} test images the task teacher gets {wrong} wrong; fusion at {how}, clip.scale {config.clip.scale}, repairs "
        f"{counts['repaired']} of them, {counts['from_outside']} from outside the teacher's first {TOP} classes, and harms "
        f"{counts['harmed']} of its {len(labels) - wrong} right answers."
    )
    return drawn, {"samples": found, "fusion": fusion}


def _sample(one: samples.Sample, names: tuple[str, ...]) -> dict[str, Any]:
    """Return a sample as plain JSON."""
    shares = {
        who: {names[k]: own[k].item() for k in one.classes} for who, own in one.shares.items()
    }
    first = {who: names[int(own.argmax())] for who, own in one.shares.items()}
    return {
        "row": one.row,
        "label": names[one.label],
        "predictions": first,
        "probabilities": shares,
    }
