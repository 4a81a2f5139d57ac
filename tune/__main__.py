"""The verbs of a cluster.

    python -m tune sweep                              # the embedded default, some minutes on two cores
    python -m tune sweep my.yaml sweep.trials=50
    python -m tune resume                             # go on with an interrupted sweep
    python -m tune train resources.workers=2          # one distillation over two workers
    python -m tune best --copy-to student             # the best checkpoint, verified

SWEEP is a name, a folder or an MLflow run id; the default is the sweep started last.
"""

import argparse
import shlex
import sys
from pathlib import Path

from richkd import config
from richkd.command import Done, Verb, main, say
from richkd.errors import ConfigError


def _storage(overrides: list[str]) -> Path:
    return Path(config.build(config.read(overrides)).storage)


def _one_sweep(words: list[str], *, finished: bool = False) -> Path:
    from tune.best import find_sweep

    names = [word for word in words if "=" not in word]
    for word in words:
        if "=" in word and not word.startswith("storage="):
            raise ConfigError(
                f"of a sweep that exists only storage=FOLDER can be said, where it lies, but got {word}; what it runs "
                "is settled."
            )
    if len(names) > 1:
        raise ConfigError(f"one SWEEP at a time but got {', '.join(names)}.")
    storage = _storage([word for word in words if "=" in word])
    return find_sweep(names[0] if names else None, storage, finished=finished)


def sweep(arguments: argparse.Namespace) -> Done:
    """Search, refit, compare."""
    layers = config.read(arguments.words)
    config.build(layers)  # most mistakes are refused here, before the slow imports
    from tune.sweep import start

    answer = start(layers, address=arguments.address, stop=arguments.stop)
    return Done(answer, 3 if answer["failed"] else 0)


def train(arguments: argparse.Namespace) -> Done:
    """Distil one student over several workers."""
    layers = config.read(arguments.words)
    # most mistakes are refused here, before the slow imports
    folder = config.run_folder(config.build(layers), arguments.name, resume=arguments.resume)
    from richkd.record import result_lines
    from tune.train import train as run

    again = ["python", "-m", "tune", "train", *arguments.words, "--name", folder.name]
    if arguments.address is not None:
        again += ["--address", arguments.address]
    answer = run(
        layers,
        folder,
        command=shlex.join(again),
        resume=arguments.resume,
        address=arguments.address,
        stop=arguments.stop,
    )
    for line in result_lines(answer):
        say(line)
    for what, text in answer["mlflow"]["lines"].items():
        say(f"{what:<11}{text}")
    return Done(answer)


def resume(arguments: argparse.Namespace) -> Done:
    """Go on with a sweep."""
    folder = _one_sweep(arguments.words)
    from tune.sweep import resume as go_on

    answer = go_on(folder, address=arguments.address, stop=arguments.stop)
    return Done(answer, 3 if answer["failed"] else 0)


def best(arguments: argparse.Namespace) -> Done:
    """Verify the best checkpoint, and hand over a copy."""
    folder = _one_sweep(arguments.words, finished=True)
    from tune.best import best as verify

    copy_to = arguments.copy_to
    if copy_to is not None and not copy_to.strip():
        raise ConfigError("--copy-to must name a new folder but is empty.")
    answer = verify(folder, None if copy_to is None else Path(copy_to))
    recorded, found = answer["recorded"], answer["found"]
    say(f"checkpoint {answer['checkpoint']}")
    say("checksums  as recorded")
    for part in ("val", "test"):
        key = f"{part}_top1"
        say(f"{part:<5}top1  recorded {recorded[key]:.2f} %, found {found[key]:.2f} %")
    say("verified   " + ("yes" if answer["verified"] else "NO: it does not reproduce its accuracy"))
    if "copy" in answer:
        say(f"copy       {answer['copy']}")
    place = answer.get("copy", answer["checkpoint"])
    say(f'use it     from richkd import load_student; student = load_student("{place}")')
    return Done(answer, 0 if answer["verified"] else 1)


ADDRESS = {
    "address=HOST:PORT": "a running Ray cluster, as RAY_ADDRESS; else a local one is started"
}

VERBS = {
    "sweep": Verb(run=sweep, help="search, refit over seeds, compare", flags=ADDRESS),
    "train": Verb(
        run=train,
        help="distil one student, over several workers",
        flags={"name=NAME": "name of the run", "resume": "go on with the run of that name"}
        | ADDRESS,
    ),
    "resume": Verb(
        run=resume, help="go on with a sweep", words="[SWEEP] [storage=FOLDER]", flags=ADDRESS
    ),
    "best": Verb(
        run=best,
        help="verify the best checkpoint",
        words="[SWEEP] [storage=FOLDER]",
        flags={"copy-to=DIR": "copy the checkpoint into a new folder"},
    ),
}

ABOUT = "Search, refit and compare distillations on this machine or on a Ray cluster."

if __name__ == "__main__":
    sys.exit(main("python -m tune", ABOUT, VERBS, sys.argv[1:]))
