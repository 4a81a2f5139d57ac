"""The verbs of a cluster.

    python -m tune cache my.yaml                      # CLIP over all images, by all workers of a cluster
    python -m tune plan                               # what the sweep would take, before it starts
    python -m tune sweep                              # the embedded default, some minutes on two cores
    python -m tune sweep my.yaml sweep.trials=50
    python -m tune status                             # how it stands
    python -m tune resume                             # go on with an interrupted sweep
    python -m tune resume --add-trials 16             # or give a finished one more to do
    python -m tune report                             # its pictures and leaderboard, as one page
    python -m tune compare first second               # sweeps beside each other
    python -m tune table conf/paper/table13.yaml      # the paper's figures and ours
    python -m tune retry --class lost                 # try failed trials again
    python -m tune sync                               # send MLflow what it has missed
    python -m tune doctor                             # what faults left behind
    python -m tune train resources.workers=2          # one distillation over two workers
    python -m tune scale resources.workers=1,2        # images per second over so many workers
    python -m tune best --copy-to student             # the best checkpoint, verified
    python -m tune promote                            # into MLflow's model registry
    python -m tune log digits figures/                # a folder beside a run, in MLflow

SWEEP is a name, a folder or an MLflow run id; the default is the sweep started last.
"""

import argparse
import ipaddress
import os
import shlex
import socket
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from richkd.command import Done, Verb, main, say
from richkd.config import CHOSEN_ON_TEST, run_folder
from richkd.effects import check_effects
from richkd.errors import ConfigError
from richkd.layers import build, read

if TYPE_CHECKING:
    from tune.launch import More

T = TypeVar("T", int, float)


def _state(overrides: list[str]) -> Path:
    from tune.settings import Settings
    from tune.sweep import state_of

    layers = read(overrides)
    return state_of(build(layers, Settings), build(layers))


def _named(words: list[str]) -> tuple[str | None, Path]:
    """Return what was said of a sweep that exists: its name, if one was given, and where sweeps lie."""
    names, overrides = _said(words, PLACES)
    if len(names) > 1:
        raise ConfigError(f"one SWEEP at a time but got {', '.join(names)}.")
    return names[0] if names else None, _state(overrides)


def _said(words: list[str], keys: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the names among the words, and the overrides, which may be of these keys only."""
    overrides = [word for word in words if "=" in word]
    for word in overrides:
        if word.partition("=")[0] not in keys:
            raise ConfigError(
                f"of what exists only {', '.join(keys)} can be said, where it lies, but got {word}; what it runs is "
                "settled."
            )
    return [word for word in words if "=" not in word], overrides


def _one_sweep(words: list[str], *, finished: bool = False) -> Path:
    from tune.best import find_sweep

    return find_sweep(*_named(words), finished=finished)


def _cluster(arguments: argparse.Namespace) -> dict[str, str | None]:
    """Return where the Ray cluster is, and where one that is started here shows its dashboard, if anywhere.

    Raises:
        ConfigError: If --dashboard is no address of this machine, or the cluster is not ours.
    """
    address, host = arguments.address, arguments.dashboard
    if host is None:
        return {"address": address, "dashboard": None}
    if there := address or os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"--dashboard={host} concerns a cluster that is started here but that at {there} has its own; leave it out."
        )
    try:
        with socket.create_server((host, 0)) as server:
            loopback = ipaddress.ip_address(server.getsockname()[0]).is_loopback
    except OSError as error:
        raise ConfigError(
            f"--dashboard must be an address of this machine but got {host!r} ({error.strerror}); give 127.0.0.1."
        ) from error
    if not loopback:
        warnings.warn(
            f"--dashboard={host}: anybody who reaches Ray's dashboard can run code as you; prefer 127.0.0.1 and an SSH "
            "tunnel.",
            stacklevel=2,
        )
    return {"address": address, "dashboard": host}


def sweep(arguments: argparse.Namespace) -> Done:
    """Search, refit, compare."""
    layers = read(arguments.words)
    build(layers)  # most mistakes are refused here, before the slow imports
    cluster = _cluster(arguments)
    from tune.launch import start
    from tune.tiny import TINY, scaled

    layers = scaled(arguments.words, arguments.scale)

    answer = start(
        layers, resume=arguments.resume, changed=arguments.changed, **cluster, stop=arguments.stop
    )
    if arguments.scale == "tiny":
        say(TINY)
    return Done(answer, 3 if answer["failed"] else 0)


def plan(arguments: argparse.Namespace) -> Done:
    """Say what a sweep would take."""
    from tune.plan import plan as look
    from tune.plan import table

    answer = look(arguments.words, address=arguments.address, stop=arguments.stop)
    for line in table(answer):
        say(line)
    for line in answer["mistakes"]:
        print(f"python -m tune plan: {line}", file=sys.stderr)
    if not answer["mistakes"]:
        given = [] if arguments.address is None else ["--address", arguments.address]
        say(
            f"it can start: {shlex.join(['python', '-m', 'tune', 'sweep', *arguments.words, *given])}"
        )
    return Done(answer, 2 if answer["mistakes"] else 0)


def cache(arguments: argparse.Namespace) -> Done:
    """Compute what all runs share."""
    layers = read(arguments.words)
    source = build(layers).data.source
    cluster = _cluster(arguments)
    from richkd.distill import prepared_lines
    from tune.first import compute

    again = ["python", "-m", "tune", "cache", *arguments.words]
    if arguments.address is not None:
        again += ["--address", arguments.address]
    answer = compute(layers, command=shlex.join(again), stop=arguments.stop, **cluster)
    for line in prepared_lines(source, answer):
        say(line)
    return Done(answer)


def train(arguments: argparse.Namespace) -> Done:
    """Distil one student over several workers."""
    layers = read(arguments.words)
    config = build(layers)  # most mistakes are refused here, before the slow imports
    folder = run_folder(config, arguments.name, resume=arguments.resume)
    check_effects(config, layers)
    cluster = _cluster(arguments)
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
        **cluster,
        stop=arguments.stop,
    )
    for line in result_lines(answer):
        say(line)
    for what, text in answer["mlflow"]["lines"].items():
        say(f"{what:<11}{text}")
    return Done(answer)


def resume(arguments: argparse.Namespace) -> Done:
    """Go on with a sweep, or give it more to do."""
    from tune.launch import More

    more = More(
        trials=_number("add-trials", arguments.add_trials, int),
        hours=_number("add-hours", arguments.add_hours, float),
        gpu_hours=_number("add-gpu-hours", arguments.add_gpu_hours, float),
    )
    return _go_on(arguments, more)


def retry(arguments: argparse.Namespace) -> Done:
    """Try failed trials again, and go on."""
    from tune.launch import More

    kinds = tuple((vars(arguments)["class"] or ",".join(RETRIED)).split(","))
    more, folder = More(retry=kinds), _one_sweep(arguments.words)
    from tune.status import status as look

    found = look(folder)
    if not any(kind in kinds for kind, _ in found["failures"].values()):
        say(
            f"{folder.name}: nothing has failed by {', '.join(kinds)}; there is nothing to try again"
        )
        return Done(found)
    return _go_on(arguments, more)


def _go_on(arguments: argparse.Namespace, more: "More") -> Done:
    folder, cluster = _one_sweep(arguments.words), _cluster(arguments)
    from tune.launch import go_on

    answer = go_on(folder, more=more, changed=arguments.changed, **cluster, stop=arguments.stop)
    return Done(answer, 3 if answer["failed"] else 0)


def _number(flag: str, text: str | None, kind: type[T]) -> T:
    """Return the number that a flag gives, 0 without it."""
    try:
        return kind(text or 0)
    except ValueError:
        raise ConfigError(f"--{flag} must be a number but got {text!r}.") from None


def status(arguments: argparse.Namespace) -> Done:
    """Show how a sweep stands."""
    folder = _one_sweep(arguments.words)
    from tune.status import lines
    from tune.status import status as look

    found = look(folder)
    for line in lines(found):
        say(line)
    return Done(found)


def report(arguments: argparse.Namespace) -> Done:
    """Write the report of a sweep anew."""
    folder = _one_sweep(arguments.words)
    from tune.findings import found_in

    found = found_in(folder)
    from tune.report import answer, lines, write

    page = write(found)
    for line in lines(found, page):
        say(line)
    return Done(answer(found, page))


def evaluate(arguments: argparse.Namespace) -> Done:
    """Evaluate and explain the students of a sweep, or of a single run."""
    names, overrides = _said(arguments.words, (*PLACES, "tracking.uri", *DATA, *LOOKS))
    here = [word for word in overrides if word.partition("=")[0] in PLACES]
    tracked = [word for word in overrides if word.startswith("tracking.")]
    uri = _tracking(tracked) if tracked else None
    given = read(["data.source=digits", *(w for w in overrides if w not in (*here, *tracked))])
    changes = {e.key: e.value for e in given.entries if not e.origin and e.key != "data.source"}
    places = [_state(here) / names[0], Path(names[0])] if len(names) == 1 else []
    run = next((place for place in places if (place / "run.json").exists()), None)
    if run is not None:
        from tune.evaluate import evaluate_run, lines_of_run

        answer = evaluate_run(run, changes, uri=uri, stop=arguments.stop)
        said = lines_of_run(answer)
    else:
        folder = _one_sweep([*names, *here], finished=True)
        from tune.evaluate import evaluate as look
        from tune.evaluate import lines
        from tune.findings import found_in

        answer = look(folder, changes, uri=uri, stop=arguments.stop)
        said = lines(answer, found_in(folder))
    for line in said:
        say(line)
    return Done(answer)


def compare(arguments: argparse.Namespace) -> Done:
    """Lay sweeps beside each other."""
    names = [word for word in arguments.words if "=" not in word]
    place = _named([word for word in arguments.words if "=" in word])[1]
    from tune.best import find_sweep

    folders = [find_sweep(name, place) for name in names]
    from tune.compare import compare as look
    from tune.compare import lines

    found = look(folders, None if arguments.csv is None else Path(arguments.csv))
    for line in lines(found):
        say(line)
    return Done(found)


def table(arguments: argparse.Namespace) -> Done:
    """Lay a table of the paper beside ours."""
    from tune.table import lines
    from tune.table import table as look

    bench = None if arguments.bench is None else Path(arguments.bench)
    diagnosis = None if arguments.diagnosis is None else Path(arguments.diagnosis)
    found = look(
        arguments.words,
        scale=arguments.scale,
        bench=bench,
        diagnosis=diagnosis,
        stop=arguments.stop,
    )
    for line in lines(found):
        say(line)
    return Done(found)


def doctor(arguments: argparse.Namespace) -> Done:
    """Find, and mend, what faults left behind."""
    folder = _one_sweep(arguments.words)
    from tune.best import called
    from tune.doctor import examine, mend

    found = examine(folder, arguments.address)
    for finding in found:
        later = "with --fix " if finding.mend is not None and not arguments.fix else ""
        say(f"{finding.what}\n    {later}{finding.advice}")
    left = found
    if arguments.fix:
        mend(folder, found)
        left = examine(folder, arguments.address)
    mended = len(found) - len(left)
    curable = sum(finding.mend is not None for finding in left)
    hint = f"; mend {curable}: python -m tune doctor {called(folder)} --fix" if curable else ""
    say(f"{folder.name}: {len(found)} found, {mended} mended{hint}")
    answer = {"found": [finding.what for finding in found], "mended": mended}
    return Done(answer | {"left": [finding.what for finding in left]})


def sync(arguments: argparse.Namespace) -> Done:
    """Send MLflow what it lacks."""
    from tune import sync as module

    answer = module.sync(module.find(*_named(arguments.words)))
    say(
        f"sent       {answer['operations']} operations that waited, {answer['points']} points that only run folders had"
    )
    for run in answer["unopened"]:
        say(f"left out   {run}, which MLflow has not opened")
    return Done(answer)


def _counts(words: list[str]) -> tuple[list[int], list[str]]:
    """Take resources.workers=1,2,... out of the words, and return its numbers and the other words."""
    key = "resources.workers="
    lists = [word.removeprefix(key) for word in words if word.startswith(key)]
    try:
        counts = sorted({int(number) for number in lists[-1].split(",")})
    except (IndexError, ValueError):
        got = f"but got {lists[-1]!r}" if lists else "but they are not given"
        raise ConfigError(
            f"{key}1,2,... must say which numbers of workers to measure {got}."
        ) from None
    return counts, [word for word in words if not word.startswith(key)]


def scale(arguments: argparse.Namespace) -> Done:
    """Measure how speed grows with workers."""
    counts, words = _counts(arguments.words)
    layers = read(words)
    build(layers)  # most mistakes are refused here, before the slow imports
    epochs, cluster = arguments.epochs, _cluster(arguments)
    if epochs is not None and not (epochs.isdecimal() and int(epochs) > 1):
        raise ConfigError(
            f"--epochs must be 2 or more, since the first one warms up, but got {epochs!r}."
        )
    from tune.scale import EPOCHS
    from tune.scale import scale as measure

    answer = measure(layers, counts, epochs=int(epochs or EPOCHS), **cluster, stop=arguments.stop)
    return Done(answer)


def best(arguments: argparse.Namespace) -> Done:
    """Verify the best checkpoint, and hand over a copy; of a run that is not here, the one that MLflow keeps."""
    names, overrides = _said(arguments.words, (*PLACES, "tracking.uri", *DATA))
    here = [word for word in overrides if word.partition("=")[0] in PLACES]
    given = read(["data.source=digits", *overrides])
    changes = {entry.key: entry.value for entry in given.entries if entry.key in DATA}
    if arguments.copy_to is not None and not arguments.copy_to.strip():
        raise ConfigError("--copy-to must name a new folder but is empty.")
    copy_to = None if arguments.copy_to is None else Path(arguments.copy_to)
    from tune.best import best as verify
    from tune.restore import is_run_id, restore

    cell = arguments.cell
    try:
        folder = _one_sweep([*names, *here], finished=True)
    except ConfigError:
        if len(names) != 1 or not is_run_id(names[0]):
            raise
        answer = restore(names[0], _tracking(overrides), copy_to, changes)
    else:
        answer = verify(folder, copy_to, changes, cell)
    recorded, found = answer["recorded"], answer["found"]
    say(f"checkpoint {answer['checkpoint']}")
    say("checksums  as recorded")
    if answer["selection"] == "paper":
        say(f"val        is of test rows: {CHOSEN_ON_TEST}")
    for part in ("val", "test"):
        key = f"{part}_top1"
        say(f"{part:<5}top1  recorded {recorded[key]:.2f} %, found {found[key]:.2f} %")
    say("verified   " + ("yes" if answer["verified"] else "NO: it does not reproduce its accuracy"))
    if "copy" in answer:
        say(f"copy       {answer['copy']}")
    place = answer.get("copy", answer["checkpoint"])
    if place.startswith("runs:/"):
        say("keep it    with --copy-to DIR")
    else:
        say(f'use it     from richkd import load_student; student = load_student("{place}")')
    return Done(answer, 0 if answer["verified"] else 1)


def _tracking(overrides: list[str]) -> str:
    """Return the address of MLflow that the words give, else the usual one."""
    from tune.settings import Settings
    from tune.tracking import Tracker

    given = [word for word in overrides if word.startswith("tracking.")]
    return Tracker.address(build(read(given), Settings).tracking.uri)


def promote(arguments: argparse.Namespace) -> Done:
    """Put the best checkpoint into the model registry."""
    folder = _one_sweep(arguments.words, finished=True)
    from tune.promote import lines
    from tune.promote import promote as put

    answer = put(folder, cell=arguments.cell, dry_run=arguments.dry_run)
    for line in lines(answer):
        say(line)
    return Done(answer)


def log(arguments: argparse.Namespace) -> Done:
    """Attach a folder, or a file, to a run in MLflow."""
    names, overrides = _said(arguments.words, (*PLACES, "tracking.uri"))
    if len(names) != 2:
        raise ConfigError(
            f"log takes RUN and FOLDER but got {shlex.join(names) or 'neither'}; RUN is a run, a sweep, or an id in MLflow."
        )
    from tune.attach import attach

    here = [word for word in overrides if not word.startswith("tracking.")]
    uri = _tracking(overrides) if len(here) < len(overrides) else None
    answer = attach(names[0], Path(names[1]), _state(here), uri)
    say(f"{answer['files']} file{'s' * (answer['files'] != 1)} beside {answer['name']}")
    say(answer["link"])
    return Done(answer)


CLUSTER = {
    "address=HOST:PORT": "a running Ray cluster, as RAY_ADDRESS; else a local one is started",
    "dashboard=HOST": "show Ray's dashboard at HOST:8265, such as 127.0.0.1; anybody who reaches it can run code",
}

PLACES = ("storage", "sweep.state")  # keys that say where sweeps lie
DATA = ("data.root", "data.path", "data.names", "data.memory", "cache", "device")  # and data
LOOKS = ("evaluate.certain", "evaluate.rows", "evaluate.corrupted")  # how students are looked at
CHANGED = {"changed": "go on though code or settings have changed since the sweep began"}
SCALE = {"scale=tiny": "any grid in minutes on two cores, to see that it runs"}
CELL = {"cell=ROW-METHOD": "of a grid: which of its students"}
RETRIED = ("error", "lost", "hung", "metric")  # classes whose cause may have gone
EXISTING = "[SWEEP] [storage=FOLDER] [sweep.state=FOLDER]"

VERBS = {
    "plan": Verb(
        run=plan,
        help="what a sweep would take, and whether it can start",
        flags={
            "address=HOST:PORT": "the Ray cluster to look at, as RAY_ADDRESS; else this machine"
        },
    ),
    "cache": Verb(
        run=cache,
        help="compute what all runs share, over all workers of the cluster",
        flags=CLUSTER,
    ),
    "sweep": Verb(
        run=sweep,
        help="search, refit over seeds, compare",
        flags={"resume": "go on with the sweep of that name, if there is one"}
        | CHANGED
        | SCALE
        | CLUSTER,
    ),
    "train": Verb(
        run=train,
        help="distil one student, over several workers",
        flags={"name=NAME": "name of the run", "resume": "go on with the run of that name"}
        | CLUSTER,
    ),
    "resume": Verb(
        run=resume,
        help="go on with a sweep, or give it more to do",
        words=EXISTING,
        flags={
            "add-trials=N": "so many more trials of each search",
            "add-hours=H": "so many more hours than sweep.hours",
            "add-gpu-hours=H": "so many more than sweep.gpu_hours",
        }
        | CHANGED
        | CLUSTER,
    ),
    "retry": Verb(
        run=retry,
        help="try failed trials again, and go on",
        words=EXISTING,
        flags={
            "class=KINDS": f"which, of error,nan,memory,lost,hung,metric; else {','.join(RETRIED)}"
        }
        | CHANGED
        | CLUSTER,
    ),
    "status": Verb(run=status, help="show how a sweep stands", words=EXISTING, flags={}),
    "report": Verb(
        run=report, help="write a sweep's report anew, from its files", words=EXISTING, flags={}
    ),
    "evaluate": Verb(
        run=evaluate,
        help="evaluate a sweep's students from all sides, and explain them",
        words=f"[SWEEP | RUN] {EXISTING.partition(' ')[2]} [evaluate.rows=N] [data.root=DIR ...]",
        flags={},
    ),
    "compare": Verb(
        run=compare,
        help="lay sweeps beside each other",
        words="SWEEP SWEEP ... [storage=FOLDER] [sweep.state=FOLDER]",
        flags={"csv=FILE": "where the table goes; comparison.csv beside the sweeps, if not given"},
    ),
    "table": Verb(
        run=table,
        help="lay a table of the paper beside ours",
        words="LAYER.yaml [SWEEP ...] [key=value ...]",
        flags=SCALE
        | {
            "bench=FILE": "what `richkd bench --table12 --json` printed; else it is measured now",
            "diagnosis=FILE": "what `richkd diagnose` wrote, of table10; else it is measured now",
        },
    ),
    "doctor": Verb(
        run=doctor,
        help="find what faults left behind",
        words=EXISTING,
        flags={
            "fix": "mend what can be mended",
            "address=HOST:PORT": "of a Ray cluster: find what it keeps for drivers that ended",
        },
    ),
    "sync": Verb(
        run=sync,
        help="send MLflow what it has missed",
        words=EXISTING,
        flags={},
    ),
    "scale": Verb(
        run=scale,
        help="measure images per second over 1, 2, ... workers",
        words="[LAYER.yaml ...] [key=value ...] resources.workers=1,2,...",
        flags={"epochs=N": "epochs of each, 6 if not given; the first one warms up"} | CLUSTER,
    ),
    "best": Verb(
        run=best,
        help="verify the best checkpoint",
        words=f"{EXISTING} [tracking.uri=ADDRESS] [data.root=FOLDER ...]",
        flags={"copy-to=DIR": "copy the checkpoint into a new folder"} | CELL,
    ),
    "promote": Verb(
        run=promote,
        help="put the best checkpoint into MLflow's model registry",
        words=EXISTING,
        flags={"dry-run": "say what would happen"} | CELL,
    ),
    "log": Verb(
        run=log,
        help="attach a folder to a run in MLflow",
        words="RUN FOLDER [storage=FOLDER] [sweep.state=FOLDER] [tracking.uri=ADDRESS]",
        flags={},
    ),
}

ABOUT = "Search, refit and compare distillations on this machine or on a Ray cluster."

if __name__ == "__main__":
    sys.exit(main("python -m tune", ABOUT, VERBS, sys.argv[1:]))
