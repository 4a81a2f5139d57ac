"""What a sweep would take, before anything starts: mistakes, runs, time, disk, and whether all that it needs answers.

    python -m tune plan my.yaml sweep.trials=50

Nothing stays behind but what the cache keeps of what was looked at.
"""

import contextlib
import os
import re
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from richkd import distill, estimate
from richkd.command import Stop
from richkd.config import Config
from richkd.errors import ConfigError, Interrupted, RichkdError
from richkd.files import NO_SPACE, check_writable, nearest
from richkd.layers import Layers, build, mistakes, read
from richkd.progress import Progress, stoppable
from tune.best import called
from tune.costs import cramped, folders_of, in_bytes, measured, side_by_side
from tune.display import Display
from tune.first import NAMED, earlier_points, is_earlier
from tune.places import check, machines_of, shared
from tune.settings import Settings
from tune.sharing import Tried, at_most, chosen, line, slower
from tune.sweep import Sweep, state_of
from tune.tracking import Tracker, public

WIDTH = 80


def plan(
    words: Sequence[str],
    *,
    address: str | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Return what the sweep of a command line would take, as plain JSON; it can start if `mistakes` is empty.

    Nothing is measured where settings, data or teachers are not sound, or the cluster has no place for a run.

    Args:
        words: Layers and overrides.
        address: Of a Ray cluster; without it, and without RAY_ADDRESS, it would be this machine.
        stop: Says whether a signal came.

    Raises:
        Interrupted: If `stop` said so.
    """
    sweep, told = understood(words)
    if sweep is None:
        return {"mistakes": told}
    typos, machines, task, found = list(told), [], None, {}
    with Display("plan", stop=stop) as display:
        progress = stoppable(display.progress, stop or Stop())
        with _into(told):
            machines = machines_of(address)
            side_by_side(sweep, machines)
        with _into(told):
            task = distill.open_task(sweep.typical, progress)
            opened = sweep.typical.data
            for config in choices(sweep):
                if config.data != opened:
                    task, opened = distill.open_task(config, progress), config.data
                told += estimate.mistakes(config, task, progress)
        told = _without_consequences(told, typos)
        if not told:
            with _into(told):
                sweep, tried = settled(sweep, machines, address, progress)
                slots, each = side_by_side(sweep, machines)
                found = measured(sweep, task, slots, each, slower(tried), progress)
                found["sharing"] = [asdict(one) for one in tried]
    found["cluster"] = {"machines": len(machines)} | {
        what: sum(node.get(what, 0) for node in machines) for what in ("CPU", "GPU")
    }
    tracking = Tracker.address(sweep.settings.tracking.uri)
    told += unanswered(sweep, tracking) + cramped(found.get("disk", []))
    with _into(told):
        told += check(
            len(machines),
            address,
            state_of(sweep.settings, sweep.base),
            tracking,
            sweep.shared,
        )
    return found | {"mistakes": list(dict.fromkeys(told))}


def settled(
    sweep: Sweep, machines: list[dict[str, float]], address: str | None, progress: Progress
) -> tuple[Sweep, list[Tried]]:
    """Return a sweep with a settled number of trials a GPU, and what was measured for that."""
    wanted, base = sweep.settings, sweep.base
    resources = wanted.resources
    runs = (not sweep.grid) * 2 * wanted.sweep.trials + len(sweep.students) * wanted.refit.seeds
    most = at_most(resources, machines, runs, gpu=base.device != "cpu")
    if most == 1:
        return sweep, []
    progress("trials a GPU", 0, 1)
    try:
        tried = shared(address, sweep.typical, resources, most)
    except RichkdError as error:  # as a sweep does without
        warnings.warn(f"trials a GPU could not be measured: {error}; it is one.", stacklevel=2)
        return sweep, []
    progress("trials a GPU", 1, 1)
    known = {"resources.trials_per_gpu": chosen(tried)}
    return Sweep(sweep.folder, sweep.layers.over("measured", known)), tried


@contextlib.contextmanager
def _into(told: list[str]) -> Iterator[None]:
    """Tell of what is refused inside, and go on."""
    try:
        yield
    except Interrupted:
        raise
    except RichkdError as error:
        told.append(str(error))
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        told.append(f"the disk is full ({error.filename}); free some space.")


def understood(words: Sequence[str]) -> tuple[Sweep | None, list[str]]:
    """Return the sweep of a command line without its mistakes, and these; None if nothing can be made of it."""
    told: list[str] = []
    sound = []
    for word in words:
        with _into(told):
            read([word])
            sound.append(word)

    def make(layers: Layers) -> Sweep:
        settings, base = build(layers, Settings), build(layers)
        Tracker.address(settings.tracking.uri)
        return Sweep(state_of(settings, base) / (settings.sweep.name or "plan"), layers)

    layers, more = mistakes(read(sound), make)
    told += more
    try:
        return make(layers), told
    except ConfigError:  # for a reason that is told already
        return None, told


def _without_consequences(told: list[str], typos: list[str]) -> list[str]:
    """Leave out what is missing only because a mistake was taken out: the key that it begins with was told of."""
    own = " ".join(line for line in typos if "sweep.space:" not in line)
    known = set(re.findall(r"\w+\.[\w.]*\w", own))
    later = [line for line in told if line not in typos]
    return typos + [line for line in later if re.match(r"[\w.]*", line)[0] not in known]


def choices(sweep: Sweep) -> list[Config]:
    """Return the configs that differ in what is looked up by name: of each cell, or as printed and of each searched choice."""
    wanted = [{key: choice} for key in NAMED for choice in sweep.space.choices(key)]
    return [*sweep.configs(), *map(sweep.resolve, wanted)]


def unanswered(sweep: Sweep, tracking: str) -> list[str]:
    """Return what of a sweep's folders and its tracker cannot be used, a line each; a few bytes are written and removed."""
    told: list[str] = []
    name = sweep.settings.sweep.name
    if name is not None and (sweep.folder / "sweep.json").exists():
        told.append(
            f"sweep.name={name} is taken: {sweep.folder} holds a sweep; go on with it (python -m tune resume {called(sweep.folder)}), "
            "or choose another."
        )
    for source in () if sweep.grid else sweep.settings.warmstart.sources:
        if is_earlier(source):
            with _into(told):
                earlier_points(sweep, source)
    for field, path in folders_of(sweep).items():
        with _into(told):
            check_writable(path, field)
            try:
                with tempfile.TemporaryFile(dir=nearest(path)) as file:
                    file.write(b"richkd")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise ConfigError(
                    f"{field} must lead to a folder that can be written but {path} cannot ({error.strerror}); choose another."
                ) from error
    if sweep.store is not None:
        with _into(told):
            sweep.store.probe()
    if (why := Tracker.probe(tracking)) is not None:
        told.append(
            f"tracking.uri={public(tracking)} cannot be used ({why}); start that server, or give another."
        )
    return told


def in_time(seconds: float) -> str:
    """Return a time for a person."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def table(found: dict[str, Any]) -> list[str]:
    """Return the lines that show what `plan` returned, none wider than WIDTH."""
    if "cluster" not in found:
        return []
    machines, cpus, gpus = (found["cluster"][what] for what in ("machines", "CPU", "GPU"))
    cluster = f"{machines} machine{'s' * (machines != 1)}, {cpus:g} CPUs, {gpus:g} GPUs"
    if "runs" not in found:
        return _lines([("cluster", cluster)])
    runs, each, pace, lacks, seconds = (
        found[key] for key in ("runs", "each", "pace", "lacks", "seconds")
    )
    rows = []
    for name, count in runs["trials"].items():
        text = f"{count}, {runs['expected'][name]:.1f} of {runs['epochs']} epochs expected"
        seeds = f", {runs['seeds']} seeds side by side" * (runs["seeds"] > 1)
        rows.append((f"trials of {name}", f"{text}{seeds}, {in_time(seconds['trial'][name])}"))
    text = f"{len(runs['students'])} students x {runs['refits']} seeds, {runs['epochs']} epochs"
    rows.append(("refits", f"{text}, up to {in_time(max(seconds['refit'].values()))}"))
    rows.append(("cluster", cluster))
    if found["sharing"]:
        rows.append(("a GPU", line([Tried(**one) for one in found["sharing"]])))
    takes = ", ".join(f"{each[what]:g} {what}" for what in ("CPU", "GPU") if what in each)
    rows.append(("side by side", f"{found['side_by_side']} runs of {each['workers']} x {takes}"))
    text = f"on the {found['device']} of this machine, others differ"
    if found["device"] == "cpu" and "GPU" in each:
        text += "; runs will have GPUs, and be faster"
    rows.append(("measured", text))
    for name, kinds in pace.items():
        own = kinds["taught"]
        text = f"{1000 * own['step']:.3g} ms a step, {own['steps']} steps"
        rows.append((f"  {name}", f"{text} and {in_time(own['epoch'])} an epoch"))
    made = [
        f"{one['what']}, {in_time(one['seconds'])}, {in_bytes(one['bytes'])}"
        for one in (*lacks["outputs"], *filter(None, [lacks["crops"]]))
    ]
    if count := len(lacks["first"] + lacks["later"]):
        made.append(f"task teachers of {count} seeds, {in_time(lacks['teacher'])} each")
    rows += [("to be made", text) for text in made] or [
        ("in the cache", "all that teachers say of the images")
    ]
    hours = ", ".join(f"{value:.3g} {what} hours" for what, value in found["hours"].items())
    rows.append(("device time", hours))
    start, prepare, work, wall = (
        in_time(seconds[key]) for key in ("start", "prepare", "runs", "wall")
    )
    text = f"{start} to start, {prepare} to prepare, {work} of runs"
    rows.append(("wall time", f"{wall}: {text}"))
    if (budget := found["budget"]) is not None:
        short = f"is not enough: {budget['trials']} of {sum(runs['trials'].values())} trials"
        rows.append(
            (
                "budget",
                "is enough" if budget["fits"] else short if runs["trials"] else "is not enough",
            )
        )
    for disk in found["disk"]:
        free = f"{in_bytes(disk['free'])} free in {disk['path']}"
        rows.append((disk["field"], f"{in_bytes(disk['needed'])} of {free}"))
    return _lines(rows)


def _lines(rows: list[tuple[str, str]]) -> list[str]:
    """Return rows of two columns, the second wrapped."""
    left = 2 + max(len(name) for name, _ in rows)
    found = []
    for name, text in rows:
        first, *more = textwrap.wrap(text, WIDTH - left)
        found += [f"{name:<{left}}{first}", *(" " * left + line for line in more)]
    return found
