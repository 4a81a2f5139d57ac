"""The verbs of one machine.

python -m richkd distill                          # richkd-l on the embedded digits
python -m richkd distill my.yaml method.name=kd seed=3 --name kd3
python -m richkd evaluate runs/kd3
python -m richkd evaluate my.yaml                 # its teachers, alone and fused
python -m richkd cache my.yaml                    # CLIP over all images, once
"""

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from richkd import config as configuration
from richkd.command import Done, Verb, main, say
from richkd.config import Config
from richkd.errors import ConfigError, Interrupted, Stopped
from richkd.files import NO_SPACE, write_atomic
from richkd.progress import Progress, lines, stoppable


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


def one_run(words: list[str]) -> Config:
    """Return the config of a single run; a sweep's sections may be in its layers, but are no overrides."""
    layers = configuration.read(words)
    for entry in layers.entries:
        section = entry.key.split(".")[0]
        if not entry.origin and section in configuration.SWEEP_SECTIONS:
            raise ConfigError(
                f"{entry.key} is a matter of a sweep, and this is a single run; leave it out, or use "
                "python -m tune."
            )
    return configuration.build(layers)


def percent(found: dict[str, float]) -> dict[str, float]:
    """Return what is printed of an evaluation."""
    return {"top1": found["top1"], "top5": found["top5"]}


def distill(arguments: argparse.Namespace) -> Done:
    """Distil one student."""
    config = one_run(arguments.words)
    name = arguments.name
    if name is None:
        name = f"{config.method.name}-seed{config.seed}-{time.strftime('%y%m%d-%H%M%S')}"
    configuration.check_name("--name", name)
    folder = Path(config.storage) / name
    if arguments.resume and not (folder / "run.json").exists():
        raise ConfigError(
            f"--resume goes on with the run in {folder}, but there is none; give its --name, or leave --resume out."
        )

    from richkd import distill as training

    say(f"{config.method.name} on {config.data.source}, into {folder}")
    if config.loss.logit:
        fused = f"alpha {config.fusion.alpha:g} at clip.scale {config.clip.scale}, "
        say(
            f"{fused if config.fusion.alpha < 1 else ''}T {config.loss.temperature:g} of the "
            f"{config.loss.temperature_of} logits, weight {config.loss.logit:g}"
        )

    def row(metrics: dict[str, Any], _checkpoint: Path) -> None:
        say(
            f"epoch {metrics['epoch']:4d}/{config.train.epochs}  loss {metrics['train/loss']:7.3f}  "
            f"val top1 {metrics['val/top1']:6.2f} %  best {metrics['best_val_top1']:6.2f} %  "
            f"{metrics['images_per_second']:7.0f} images/s"
        )

    def how_to_go_on() -> str:
        line = ["distill", *arguments.words]
        if (folder / "run.json").exists():
            line += ["--name", name, "--resume"]
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
        tested = training.test(outcome)
    except Interrupted as interrupted:
        message = f"{interrupted}; {how_to_go_on()}"
        raise Interrupted(interrupted.signum, message) from None
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise Stopped(
            f"the disk is full ({error.filename or folder}); free some space and {how_to_go_on()}"
        ) from error
    found = outcome.metrics
    answer = {
        "run": str(folder),
        "checkpoint": str(folder / "best"),
        "val": {"top1": found["best_val_top1"], "top5": found["best_val_top5"]},
        "test": {"top1": tested["test/top1"], "top5": tested["test/top5"]},
        "images_per_second": found["images_per_second"],
    }
    for who in ("teacher", "clip", "fused"):
        if f"{who}/top1" in tested:
            answer[who] = {"top1": tested[f"{who}/top1"]}
            say(f"{who:<10} test top1 {answer[who]['top1']:6.2f} %")
    _print_found(answer)
    return Done(answer)


def _print_found(answer: dict[str, Any]) -> None:
    say(
        f"student    test top1 {answer['test']['top1']:6.2f} %  top5 {answer['test']['top5']:6.2f} %"
    )
    say(f"           val  top1 {answer['val']['top1']:6.2f} %  top5 {answer['val']['top5']:6.2f} %")
    say(f"checkpoint {answer['checkpoint']}")


def evaluate(arguments: argparse.Namespace) -> Done:
    """Evaluate the student of a run, a sweep or a checkpoint again, or the teachers of a config."""
    words = arguments.words
    path = Path(words[0] if words else "")
    named = Path(configuration.Config().storage) / path  # a run may be called by its name
    if len(words) != 1 or "=" in words[0] or path.is_file() or _is_layer(words[0], path, named):
        return _evaluate_teachers(arguments)
    from richkd import distill as training
    from richkd.student import find_checkpoint

    checkpoint = find_checkpoint(path if path.exists() or not named.exists() else named)
    found, speed, _ = training.retest(checkpoint)
    answer = {
        "run": str(checkpoint.parent),
        "checkpoint": str(checkpoint),
        "val": percent(found["val"]),
        "test": percent(found["test"]),
        "images_per_second": speed,
    }
    _print_found(answer)
    return Done(answer)


def _is_layer(word: str, path: Path, named: Path) -> bool:
    """Say whether a word that may name a run or a layer under `conf/` names a layer."""
    if path.exists() or named.exists():
        return False
    return any((configuration.CONF / f"{word}{end}").is_file() for end in ("", ".yaml"))


def _evaluate_teachers(arguments: argparse.Namespace) -> Done:
    """Evaluate the teachers of a config, alone and fused, un-augmented, on all rows whose labels are known."""
    config = one_run(arguments.words)
    from richkd import distill as training

    with progress_bar() as progress:
        prepared = stoppable(progress, arguments.stop)
        task = training.open_task(config, prepared)
        teacher = training.open_teacher(config, task, prepared)
        if teacher is None:
            raise ConfigError(
                f"evaluate needs a run, or a config with a teacher, but method.name={config.method.name} has none."
            )
        found = training.evaluate_teachers(task, teacher)
    answer = {}
    for who, parts in found.items():
        answer[who] = {
            part: percent(values) | {"rows": values["rows"]} for part, values in parts.items()
        }
        for part, values in answer[who].items():
            say(
                f"{who:<8} {part:<5} top1 {values['top1']:6.2f} %  top5 {values['top5']:6.2f} %  "
                f"of {values['rows']} rows"
            )
    return Done(answer)


def cache(arguments: argparse.Namespace) -> Done:
    """Compute and keep what all runs of a config share: the teacher, CLIP's features."""
    config = one_run(arguments.words)
    from richkd import data
    from richkd import distill as training

    with progress_bar() as progress:
        told = stoppable(progress, arguments.stop)
        task = training.open_task(config, told)
        if arguments.rows is not None:
            text = "".join(f"{line}\n" for line in data.rows(config.data, task.dataset))
            write_atomic(Path(arguments.rows), text.encode("utf-8", "surrogateescape"))
        teacher = training.open_teacher(config, task, told)
    answer = {
        "cache": str(task.cache),
        "train": len(task.dataset.train),
        "test": len(task.dataset.test),
    }
    if task.dataset.unreadable:
        answer["unreadable"] = list(task.dataset.unreadable)
    say(f"cached for {config.data.source} in {task.cache}")
    rows = task.split.validation
    for who, logits in (teacher.shown("train") if teacher else {}).items():
        top1 = training.accuracy(logits[rows].cpu(), task.labels[rows])["top1"]
        answer[who] = {"val_top1": top1}
        say(f"{who:<10} val top1 {top1:6.2f} %")
    return Done(answer)


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
        help="evaluate a run again, or the teachers of a config",
        words="RUN | [LAYER.yaml ...] [key=value ...]",
        flags={},
    ),
    "cache": Verb(
        run=cache,
        help="compute what all runs of a config share: teacher, CLIP's features",
        flags={"rows=FILE": "write what each image is, in the order in which logits must come"},
    ),
}

ABOUT = (
    "Distil a small image classifier from a task teacher fused with a frozen CLIP, on one machine."
)

if __name__ == "__main__":
    sys.exit(main("python -m richkd", ABOUT, VERBS, sys.argv[1:]))
