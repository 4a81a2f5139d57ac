"""The verbs of one machine.

python -m richkd distill                          # richkd-l on the embedded digits
python -m richkd distill my.yaml method.name=kd seed=3 --name kd3
python -m richkd evaluate runs/kd3                # all that is to be known of its student
python -m richkd evaluate my.yaml                 # its teachers, alone and fused
python -m richkd diagnose my.yaml                 # whether fusing them helps, and with which weight
python -m richkd export runs/kd3                  # ONNX, torch.export, safetensors and a model card
python -m richkd predict runs/kd3 photos/ a.jpg   # its most probable classes
python -m richkd explain runs/kd3                 # where it looks, and what fusion did, as pictures
python -m richkd cache my.yaml                    # CLIP over all images, once
python -m richkd bench my.yaml                    # how fast this machine trains with it
"""

import argparse
import contextlib
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from richkd import escape
from richkd.command import Done, Verb, main, say
from richkd.config import Config, is_url, run_folder
from richkd.effects import check_effects
from richkd.errors import ConfigError, Interrupted, Stopped
from richkd.files import NO_SPACE, check_writable, write_atomic
from richkd.layers import CONF, SWEEP_SECTIONS, UNHASHED, Layers, build, find_layer, read
from richkd.progress import Progress, epoch_line, lines, stoppable


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show preparations on a terminal as a bar, elsewhere as a few lines."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lines(console.print)
        return
    tasks: dict[str, Any] = {}
    with Bars(console=console, transient=True) as bars:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield progress


def one_run(layers: Layers) -> Config:
    """Return the config of a single run; a sweep's sections may be in its layers, but are no overrides."""
    for entry in layers.entries:
        section = entry.key.split(".")[0]
        if not entry.origin and section in SWEEP_SECTIONS:
            raise ConfigError(
                f"{entry.key} is a matter of a sweep, and this is a single run; leave it out, or use "
                "python -m tune."
            )
    return build(layers)


def percent(found: dict[str, float]) -> dict[str, float]:
    """Return what is printed of an evaluation."""
    return {"top1": found["top1"], "top5": found["top5"]}


def mean_over_classes(config: Config) -> list[str]:
    """Return the line that says so of the accuracy that epochs are chosen by, none where it is not one."""
    tail = config.data.imbalance
    if tail is None:
        return []
    return [f"{config.part} top1 is the mean over classes, under data.imbalance={tail}"]


def distill(arguments: argparse.Namespace) -> Done:
    """Distil one student."""
    layers = read(arguments.words)
    config = one_run(layers)
    folder = run_folder(config, arguments.name, resume=arguments.resume)
    check_effects(config, layers)

    from richkd import distill as training
    from richkd.card import terms
    from richkd.record import result_of

    say(f"{config.method.name} on {config.data.source}, into {folder}")
    if config.caution:
        say(config.caution)
    for line in mean_over_classes(config):
        say(line)
    for line in terms(config):
        say(line)

    def row(metrics: dict[str, Any], _checkpoint: Path) -> None:
        say(epoch_line(metrics, config.train.epochs, config.part))

    def how_to_go_on() -> str:
        line = ["distill", *arguments.words]
        if (folder / "run.json").exists():
            line += ["--name", folder.name, "--resume"]
        return f"go on with: python -m richkd {shlex.join(line)}"

    try:
        with progress_bar() as progress:
            outcome = training.run(
                config,
                folder,
                report=row,
                resume=arguments.resume,
                stop=arguments.stop,
                progress=progress,
            )
        training.test(outcome)
    except Interrupted as interrupted:
        message = f"{interrupted}; {how_to_go_on()}"
        raise Interrupted(interrupted.signum, message) from None
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise Stopped(
            f"the disk is full ({error.filename or folder}); free some space and {how_to_go_on()}"
        ) from error
    answer = result_of(folder)
    _print(answer)
    return Done(answer)


def _print(answer: dict[str, Any]) -> None:
    from richkd.record import result_lines

    for line in result_lines(answer):
        say(line)


def evaluate(arguments: argparse.Namespace) -> Done:
    """Evaluate the student of a run, a sweep or a checkpoint again, or the teachers of a config."""
    names = [word for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word]
    changes, folder = _changes(overrides)
    place = _existing(names[0], folder) if len(names) == 1 else None
    target = None if arguments.logits is None else Path(arguments.logits)
    if place is None:
        _check_layers(names, folder, "evaluate takes a run, a sweep, a checkpoint or layers")
        return _evaluate_teachers(arguments, target)
    if target is not None:
        raise ConfigError(
            f"--logits writes what the task teacher of a config says but {names[0]} is a run; give layers, such as its "
            "config.yaml."
        )
    for key in changes:
        if key not in UNHASHED and not key.startswith("evaluate."):
            raise ConfigError(
                f"of a run it can be said where things lie, {', '.join(UNHASHED)}, and how it is looked at, evaluate.certain, "
                f"but got {key}; what it is, is settled."
            )
    from richkd import appraise, evaluation
    from richkd.card import terms
    from richkd.record import result_lines
    from richkd.student import find_checkpoint

    checkpoint = find_checkpoint(place)
    with progress_bar() as progress:
        appraisal = appraise.appraise(checkpoint, changes, stoppable(progress, arguments.stop))
    answer = appraisal.found
    for line in [*mean_over_classes(appraisal.config), *terms(appraisal.config)]:
        say(line)
    *accuracies, where = result_lines(answer)
    run = checkpoint.parent
    beside = run / "evaluation" if (run / "run.json").exists() else Path(f"{checkpoint}-evaluation")
    target = Path(arguments.to) if arguments.to else beside
    answer["page"] = str(evaluation.write(appraisal, target, _called(checkpoint.resolve())))
    for line in [*accuracies, *evaluation.lines(answer), where, f"page       {answer['page']}"]:
        say(line)
    return Done(answer)


def _changes(overrides: list[str]) -> tuple[dict[str, Any], Path]:
    """Return what overrides change of runs that exist, by dotted key, and the folder in which runs lie."""
    given = read(["data.source=digits", *overrides])
    changes = {entry.key: entry.value for entry in given.entries[1:]}
    return changes, Path(str(changes.get("storage", Config().storage)))


def _check_layers(names: list[str], storage: Path, takes: str) -> None:
    """Raise ConfigError, which begins by what a verb takes, unless all of these words, which are no runs, are layers."""
    for name in names:
        try:
            find_layer(name)
        except ConfigError as error:
            raise ConfigError(
                f"{takes} but {name} is none: no folder here or in {storage}/, and {error}"
            ) from error


def _existing(name: str, storage: Path) -> Path | None:
    """Return the folder that `name` calls, by its path or as a run in `storage`, None if there is none.

    A folder that happens to be called like a layer, such as that of the data, is none.
    """
    for path in (Path(name), storage / name):
        made_by_us = any(
            (path / file).exists() for file in ("run.json", "sweep.json", "manifest.json")
        )
        layers = (CONF / f"{name}{end}" for end in ("", ".yaml"))
        if path.is_dir() and (made_by_us or not any(layer.is_file() for layer in layers)):
            return path
    return None


def _evaluate_teachers(arguments: argparse.Namespace, target: Path | None) -> Done:
    """Evaluate the teachers of a config, alone and fused, un-augmented, on all rows whose labels are known.

    They are taken as they are, whatever `clip.control` says. What the task teacher says goes into `target`, if one is named.
    """
    config = one_run(read(arguments.words))
    # a control is of what the student hears: some rows would show it, and others not
    config = replace(config, clip=replace(config.clip, control="none"))
    from richkd import distill as training
    from richkd import logits

    if target is not None:
        logits.check_target(target)
        if config.teacher.logits is not None:
            raise ConfigError(
                f"--logits writes what a network says but teacher.logits={config.teacher.logits} is given; use that file."
            )

    with progress_bar() as progress:
        prepared = stoppable(progress, arguments.stop)
        task = training.open_task(config, prepared)
        teacher = training.open_teacher(config, task, prepared)
        if teacher is None:
            raise ConfigError(
                f"evaluate needs a run, or a config with a teacher, but method.name={config.method.name} has none; give "
                "method.name=kd or richkd-l."
            )
        found = training.evaluate_teachers(task, teacher)
        if target is not None:
            if teacher.task is None:
                raise ConfigError(
                    f"--logits writes what the task teacher says but method.name={config.method.name} has none; give "
                    "method.name=kd."
                )
            logits.write(target, teacher.task.train, teacher.task.test, task.dataset)
    answer: dict[str, Any] = {"alpha": config.fusion.alpha, "scale": config.clip.scale}
    if "fused" in found:
        say(f"fused at alpha {config.fusion.alpha:g}, clip.scale {config.clip.scale}")
    for who, parts in found.items():
        answer[who] = {
            part: percent(values)
            | {"nll": values["loss"], "ece": values["ece"], "rows": values["rows"]}
            for part, values in parts.items()
        }
        for part, values in answer[who].items():
            say(
                f"{who:<8} {part:<5} top1 {values['top1']:6.2f} %  top5 {values['top5']:6.2f} %  "
                f"ECE {values['ece']:5.2f} %  NLL {values['nll']:.3f}  of {values['rows']} rows"
            )
    if target is not None:
        answer["logits"] = str(target)
        say(f"task teacher's logits of all images in {target}")
    return Done(answer)


def diagnose(arguments: argparse.Namespace) -> Done:
    """Say whether the fused teacher is better than the task teacher, by how much, with which weight, and why."""
    layers = read(arguments.words)
    config = one_run(layers)
    key = "clip.prompts" if config.clip.logits is None else "clip.logits"
    folder = _new_folder(config, arguments.to, "diagnosis")
    from richkd import diagnose as diagnosing
    from richkd.diagnose import show

    with progress_bar() as progress:
        told = stoppable(progress, arguments.stop)
        found = diagnosing.diagnose(config, searched(layers, key), told)
    found = show.write(found, folder)
    for line in show.lines(found):
        say(line)
    return Done(found)


def searched(layers: Layers, key: str) -> list[str]:
    """Return the values of a key among which a sweep of these layers chooses, none if it does not."""
    space = [entry.value for entry in layers.entries if entry.key == f"sweep.space.{key}"]
    return list(space[-1].get("choice", [])) if space and isinstance(space[-1], dict) else []


def _new_folder(config: Config, wanted: str | None, what: str) -> Path:
    """Return the folder that `--to` names, else a new one in `storage`, after what lies in it, the data and the time."""
    if wanted is not None:
        folder = Path(wanted)
    elif is_url(config.storage):
        raise ConfigError(
            f"storage must be a folder here but got {config.storage}; say where to write: --to=DIR."
        )
    else:
        name = f"{what}-{config.data.source}-{time.strftime('%y%m%d-%H%M%S')}"
        folder = Path(config.storage) / name
    check_writable(folder, "--to" if wanted else "storage")
    return folder


def _runs_and_layers(words: list[str]) -> tuple[list[Path], list[str], dict[str, Any] | None]:
    """Return the runs, sweeps and checkpoints among words, all other words, and what these change of runs without layers.

    Raises:
        ConfigError: If a word is neither, or something of runs is changed beside where things lie.
    """
    changes, storage = _changes([word for word in words if "=" in word])
    found = {word: None if "=" in word else _existing(word, storage) for word in words}
    places = [place for place in found.values() if place is not None]
    others = [word for word in words if found[word] is None]
    layers = [word for word in others if "=" not in word]
    _check_layers(layers, storage, "explain takes runs, sweeps, checkpoints and layers")
    if layers or not places:
        return places, others, None
    for key in changes:
        if key not in UNHASHED:
            raise ConfigError(
                f"of runs only where things lie can be said, {', '.join(UNHASHED)}, but got {key}; give layers, too, for other "
                "teachers than theirs."
            )
    return places, others, changes


def explain(arguments: argparse.Namespace) -> Done:
    """Draw where students and their task teacher look, and what fusion did to test images."""
    places, layers, changes = _runs_and_layers(arguments.words)
    # of runs alone their own configs say what is looked at
    settings = None if changes is not None else one_run(read(layers))

    from richkd import explain as explaining

    flags = {"images": ("--images", arguments.images), "shown": ("--samples", arguments.samples)}
    wanted = {
        name: count_of(text, flag, explaining.MOST)
        for name, (flag, text) in flags.items()
        if text is not None
    }
    students = explaining.students_of(places)
    if settings is None:
        configs = [explaining.config_of(path, changes) for path in students.values()]
        settings = explaining.together(configs)
    elif not students and not settings.loss.distils:
        raise ConfigError(
            f"explain needs runs, or a config with a teacher, but method.name={settings.method.name} has none; give "
            "method.name=kd or richkd-l."
        )
    inside = explaining.folder_of(places[0]) if places and arguments.to is None else None
    target = _new_folder(settings, arguments.to if inside is None else str(inside), "explain")
    with progress_bar() as progress:
        answer = explaining.explain(
            students, settings, target, stop=arguments.stop, progress=progress, **wanted
        )
    for line in explaining.lines(answer):
        say(line)
    return Done(answer)


def cache(arguments: argparse.Namespace) -> Done:
    """Compute and keep what all runs of a config share: the teacher, CLIP's features."""
    config = one_run(read(arguments.words))
    from richkd import data
    from richkd import distill as training

    with progress_bar() as progress:
        told = stoppable(progress, arguments.stop)
        task = training.open_task(config, told)
        if arguments.rows is not None:
            text = "".join(f"{line}\n" for line in data.rows(config.data, task.dataset))
            write_atomic(Path(arguments.rows), text.encode("utf-8", "surrogateescape"))
            names = ", ".join(task.dataset.names[:8]) + ", ..." * (len(task.dataset.names) > 8)
            say(f"rows in {arguments.rows}; the columns of logits are {names}")
        teacher = training.open_teacher(config, task, told)
        if config.teacher.views == "exact" and teacher is not None and teacher.task is not None:
            teacher.task.fill(told)
    answer = training.prepared(task, teacher)
    for line in training.prepared_lines(config.data.source, answer):
        say(line)
    return Done(answer)


def _model(words: list[str]) -> tuple[Path, list[str]]:
    """Return the folder of the model that the first word calls, and the words behind it; `storage=FOLDER` is where runs lie."""
    wanted = [word for word in words if word.startswith("storage=")]
    storage = Path(build(read(["data.source=digits", *wanted])).storage)
    names = [word for word in words if word not in wanted]
    if not names:
        raise ConfigError(
            "MODEL must be a run, a sweep or a checkpoint but none is given; name one."
        )
    place = _existing(names[0], storage)
    if place is None:
        raise ConfigError(
            f"MODEL must be a run, a sweep or a checkpoint but got {names[0]}: no folder here or in {storage}/."
        )
    return place, names[1:]


def _called(place: Path) -> str:
    """Return what the student of a run, a sweep or a checkpoint is called: of a run in a sweep with the sweep's name."""
    run = place.parent if place.name in ("best", "last") else place
    for sweep in run.parents:
        if (sweep / "sweep.json").exists():
            return "-".join((sweep.name, *run.relative_to(sweep).parts))
    return run.name


def export(arguments: argparse.Namespace) -> Done:
    """Write the student of a run, a sweep or a checkpoint for other programs."""
    place, more = _model(arguments.words)
    if more:
        raise ConfigError(
            f"export takes one model, and storage=FOLDER where it lies, but got {', '.join(more)}, too; leave it out."
        )
    from richkd import export as exporting
    from richkd.student import find_checkpoint

    checkpoint = find_checkpoint(place)
    name = _called(place.resolve())
    target = Path(f"{name}-export" if arguments.to is None else arguments.to)
    answer = exporting.export(checkpoint, target, name, arguments.stop)
    say(f"{name}, {answer['parameters']:,} parameters, into {answer['folder']}")
    for file, size in answer["files"].items():
        gaps = answer["difference"].get(file, {})
        checked = f"  differs from PyTorch by at most {max(gaps.values()):.1e}" if gaps else ""
        say(f"  {file:<17} {size:>11,} bytes{checked}")
    say(
        "README.md is its card: fill in the licences, and look at the paths in it, before you publish"
    )
    return Done(answer)


def predict(arguments: argparse.Namespace) -> Done:
    """Say what a student sees in images."""
    place, words = _model(arguments.words)
    top = 3 if arguments.top is None else count_of(arguments.top, "--top")
    target = None if arguments.to is None else Path(arguments.to)
    import torch

    from richkd import load_student
    from richkd import predict as predicting

    if target is not None:
        predicting.check_target(target)
    if not words:
        raise ConfigError("IMAGES must be files, folders of images or patterns but none is given.")
    paths = predicting.find_images(words)
    student = load_student(place).to("cuda" if torch.cuda.is_available() else "cpu")
    width = min(max(map(len, paths)), 60)
    predictions = []
    with progress_bar() if target else contextlib.nullcontext() as progress:
        seen = predicting.predict(student, paths, top)
        for k, prediction in enumerate(seen, start=1):
            predictions.append(prediction)
            if prediction.problem is not None:
                print(f"python -m richkd: {escape.line(prediction.problem)}", file=sys.stderr)
            elif target is None:
                say(predicting.row(prediction, width))
            if progress is not None:
                progress("images", k, len(paths))
            if (signum := arguments.stop()) is not None:
                raise Interrupted(
                    signum,
                    f"stopped after {k} of {len(paths)} files"
                    + "; nothing was written" * bool(target),
                )
    failed = [each.to_dict() for each in predictions if each.problem is not None]
    answer = {"model": str(place), "images": len(paths) - len(failed), "failed": failed}
    if target is None:
        answer["predictions"] = [each.to_dict() for each in predictions if each.problem is None]
    else:
        write_atomic(target, predicting.to_file(predictions, target.suffix))
        answer["to"] = str(target)
        say(f"{answer['images']} image{'s' * (answer['images'] != 1)} in {target}")
    if failed:
        print(
            f"python -m richkd: {len(failed)} of {len(paths)} files could not be read",
            file=sys.stderr,
        )
    return Done(answer, 1 if failed else 0)


def count_of(text: str, flag: str, most: int | None = None) -> int:
    """Return the value of a flag that counts things, from 1 to `most`."""
    if not text.isdecimal() or not 1 <= int(text) <= (most or int(text)):
        wanted = "1 or more" if most is None else f"1 to {most}"
        raise ConfigError(
            f"{flag} must be a whole number, {wanted}, but got {text!r}; say how many, such as {flag}=5."
        )
    return int(text)


def seconds_of(text: str) -> float:
    """Return the value of --seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(
            f"--seconds must be a positive number but got {text!r}; say how long to measure, such as --seconds=20."
        )
    return seconds


def bench(arguments: argparse.Namespace) -> Done:
    """Measure how fast this machine trains with a config, beside a loop as it is usually written."""
    given = {} if arguments.seconds is None else {"seconds": seconds_of(arguments.seconds)}
    config = one_run(read(arguments.words))
    from richkd import bench as benchmark
    from richkd.bench import show, variants

    wanted = variants.wanted(config, arguments.variants, live=arguments.table12)
    with progress_bar() as progress:
        found = benchmark.measure(config, wanted, progress=progress, stop=arguments.stop, **given)
    for line in [*show.table(found), *(show.table12(found) if arguments.table12 else [])]:
        say(line)
    return Done(found)


VERBS = {
    "distill": Verb(
        run=distill,
        help="distil one student",
        flags={
            "name=NAME": "name of the run's folder",
            "resume": "go on with the run of that name",
        },
    ),
    "evaluate": Verb(
        run=evaluate,
        help="appraise a run's student from all sides, or a config's teachers",
        words="RUN | LAYER.yaml ... [key=value ...]",
        flags={
            "to=DIR": "folder of a run's tables, pictures and page, RUN/evaluation if not given",
            "logits=FILE.npy": "write what the task teacher of a config says, for clip.logits or teacher.logits",
        },
    ),
    "diagnose": Verb(
        run=diagnose,
        help="say whether CLIP will help, by how much, and with which weight",
        words="[LAYER.yaml ...] [key=value ...] [diagnose.rows=test|all] [diagnose.prompts=[SET,...]]",
        flags={"to=DIR": "folder for its page and files, a new one in storage if not given"},
    ),
    "explain": Verb(
        run=explain,
        help="draw where students and teacher look, and what fusion did to images",
        words="[RUN | SWEEP | CHECKPOINT ...] [LAYER.yaml ...] [key=value ...]",
        flags={
            "images=N": "in the Grad-CAM panel, 8 if not given",
            "samples=N": "of each outcome of fusion, 3 if not given",
            "to=DIR": "folder of the pictures, RUN/explain if not given",
        },
    ),
    "export": Verb(
        run=export,
        help="write ONNX, torch.export, safetensors and a model card of a student",
        words="RUN | SWEEP | CHECKPOINT [storage=FOLDER]",
        flags={"to=DIR": "new folder, NAME-export if not given"},
    ),
    "predict": Verb(
        run=predict,
        help="say what a student sees in images",
        words="RUN | SWEEP | CHECKPOINT IMAGES ... [storage=FOLDER]",
        flags={
            "top=N": "classes for each image, 3 if not given",
            "to=FILE": "write FILE.csv or FILE.json instead of lines",
        },
    ),
    "cache": Verb(
        run=cache,
        help="compute what all runs of a config share: teacher, CLIP's features",
        flags={"rows=FILE": "write what each image is, in the order in which logits must come"},
    ),
    "bench": Verb(
        run=bench,
        help="measure how fast this machine trains with a config",
        flags={
            "seconds=N": "how long to measure, 20 if not given, beside what has to be prepared",
            "variants=NAME,...": "student, kd, richkd-l, crd, richkd-f, richkd-lf, each with any of +table +bf16 +live, beside the reference",
            "table12": "with CLIP live, and as Table 12 of the paper's supplement",
        },
    ),
}

ABOUT = (
    "Distil a small image classifier from a task teacher fused with a frozen CLIP, on one machine."
)

if __name__ == "__main__":
    sys.exit(main("python -m richkd", ABOUT, VERBS, sys.argv[1:]))
