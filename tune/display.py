"""What the terminal shows while a sweep runs: a live table of 80 columns or fewer, or plain lines."""

import contextlib
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from richkd.command import Stop, silence
from richkd.config import Config
from richkd.layers import brief
from richkd.progress import lines
from tune.agenda import Agenda, Job
from tune.best import called
from tune.summary import columns

SHOWN = 12  # rows of the live table
SHORT = {
    "fusion.alpha": "alpha",
    "loss.temperature": "T",
    "loss.logit": "w",
    "clip.prompts": "",  # the name of a set says it
    "clip.logits": "",
    "student.name": "",
}
UNITS = {"top1": "top-1, %", "latency": "latency, ms an image"}
FORMATS = {"top1": "{:.2f}", "parameters": "{:,.0f}"}
STYLES = {
    "finished": "green",
    "running": "cyan",
    "pruned": "dim",
    "failed": "red",
    "stopped": "yellow",
}


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"


def describe(params: dict[str, Any]) -> str:
    """Return settings in one short line; a temperature says what it is relative to, if `params` do."""
    parts = []
    for key, value in params.items():
        if key not in ("seed", "loss.temperature_of"):
            shown = Path(value).name if key == "clip.logits" else brief(value)
            parts.append(f"{SHORT.get(key, key.rpartition('.')[2])} {shown}".strip())
        if key == "loss.temperature" and "loss.temperature_of" in params:
            parts.append(f"of {params['loss.temperature_of']}")
    return " ".join(parts)


def describe_job(job: Job) -> str:
    """Return what distinguishes a job; with T of the fused logits, which is not comparable, marked."""
    loss, alpha = job.config.loss, job.config.fusion.alpha
    marked = (
        {"loss.temperature_of": "fused"} if loss.temperature_of == "fused" and alpha < 1 else {}
    )
    return describe(job.params | marked)


class Terminal(Console):
    """The console of a sweep, which goes on where the reader of its output has gone."""

    def on_broken_pipe(self) -> None:
        """Say no more; rich itself would end the process."""
        self.quiet = True
        silence()


class Display:
    """Listens to an agenda and draws it; also shows the progress of preparations."""

    def __init__(
        self, title: str, console: Console | None = None, stop: Stop | None = None
    ) -> None:
        self.console = console or Terminal(highlight=False, soft_wrap=True)
        self.title, self.stop, self.started_at = title, stop or Stop(), time.monotonic()
        self.rows: dict[str, dict[str, Any]] = {}
        self.best: tuple[float, str] | None = None
        self.agenda: Agenda | None = None
        self.live: Live | None = None
        self.preparing = ""
        self.lines = lines(self.line)

    def follow(self, agenda: Agenda) -> None:
        """Count this agenda's jobs, those of an earlier driver included."""
        self.agenda = agenda
        search = next(iter(agenda.searches), None)  # a grid has none
        if search is not None and (best := search.best()) is not None:
            self.best = (best.values[0], f"trial-{search.label(best.number)}")

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live = Live(
                console=self.console, get_renderable=self.draw, refresh_per_second=4, transient=True
            )
            self.live.start()
            self.stop.shown = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.stop.shown = False
            self.live.stop()
            self.live = None

    def line(self, text: str, style: str = "") -> None:
        """Print one line that stays."""
        self.console.print(Text(text, style=style))

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far a preparation is."""
        percent = 100 * done // max(total, 1)
        self.preparing = f"{what}: {percent:3d} % " + "━" * (percent * 40 // 100)
        if self.live is None:
            self.lines(what, done, total)

    def started(self, job: Job) -> None:
        """Add a row."""
        self.preparing = ""
        self.rows[job.id] = {
            "state": "running",
            "epoch": 0,
            "top1": None,
            "job": job,
            "at": time.monotonic(),
        }

    def epoch(self, job: Job, metrics: dict[str, Any]) -> None:
        """Update a row."""
        if "best_val_top1" in metrics:
            self.rows[job.id] |= {"epoch": metrics["epoch"], "top1": metrics["best_val_top1"]}

    def ended(self, job: Job, state: str, metrics: dict[str, Any]) -> None:
        """Finish a row; a plain stream gets its one line."""
        row = self.rows[job.id]
        row["state"] = state
        if state == "finished":
            row["top1"] = metrics["best_val_top1"]
            if job.kind == "trial" and (self.best is None or row["top1"] > self.best[0]):
                self.best = (row["top1"], job.id)
        known = metrics.get("duplicate_of")
        if known is not None:
            row["top1"] = metrics["best_val_top1"]
        if self.live is None:
            top1 = "-" if row["top1"] is None else f"{row['top1']:.2f}"
            took = f"{time.monotonic() - row['at']:.1f} s" if known is None else f"as trial {known}"
            self.line(
                f"{job.id:<28} {state:<9} {job.config.part} {top1:>6}  {describe_job(job)}  ({took})"
            )

    def header(self) -> str:
        """Return the line of counts."""
        states = [row["state"] for row in list(self.rows.values())]  # drawn by a thread of its own
        elapsed = int(time.monotonic() - self.started_at)
        done = sum(state not in ("running", "stopped") for state in states)
        total = 0
        if self.agenda:
            done, total = done + self.agenda.before, self.agenda.total
        parts = [f"{done} of {total} runs"]
        parts += [f"{states.count(s)} {s}" for s in ("pruned", "failed") if states.count(s)]
        if self.best:
            parts.append(f"best {self.best[0]:.2f} % ({self.best[1]})")
        if self.stop() is not None or (self.agenda and self.agenda.stopping):
            parts.append("stopping (again: at once)")
        return f"{', '.join(parts)}, {elapsed // 60}:{elapsed % 60:02d}"

    def draw(self) -> Table | Text:
        """Return what the live display shows now."""
        if not self.rows:
            return Text(self.preparing + "  stopping" * (self.stop() is not None))
        width = min(80, self.console.width)
        title = Text(f"{self.title[:width]}\n{self.header()}")  # a name in brackets is no markup
        table = Table(title=title, width=width, box=None, pad_edge=False)
        part = next(iter(self.rows.values()))["job"].config.part
        for name, justify in (
            ("run", "left"),
            ("state", "left"),
            ("epoch", "right"),
            (f"{part} top1", "right"),
        ):
            table.add_column(name, justify=justify, no_wrap=True)
        table.add_column("settings", ratio=1, no_wrap=True)  # what the others leave over
        for name, row in list(self.rows.items())[-SHOWN:]:
            job = row["job"]
            table.add_row(
                name,
                Text(row["state"], style=STYLES[row["state"]]),
                f"{row['epoch']}/{job.config.train.epochs}",
                "" if row["top1"] is None else f"{row['top1']:.2f}",
                Text(describe_job(job)),
            )
        return table


def show(result: dict[str, Any]) -> None:
    """Print the summary that a person reads."""
    console = Terminal(highlight=False, soft_wrap=True)
    # a narrower one wraps lines, where a table would lose its end; that of a grid has longer titles
    console.width = max(console.width, 80 if result["best"] else 120)

    def line(what: str, text: str = "", style: str | None = None) -> None:
        console.print(f"{what:<14}{text}" if text else what, style=style, markup=False)

    table = Table(box=None, pad_edge=False)
    config = Config(selection=result.get("selection", "validation"))
    found = columns(result["summary"], config.selection)
    for name in found:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in zip(*found.values(), strict=True):
        table.add_row(*row)
    best, summary = result["best"], result["summary"]
    n = max(entry.get("n", 0) for entry in summary.values() if entry)
    line("")
    console.print(table)
    if n > 1:
        line(f"mean ± standard deviation over {n} seeds; differences paired by seed")
    else:
        line("a single seed: it can mislead by points; see refit.seeds")
    if config.caution:
        line(config.caution)
    gap = summary.get("difference_tuned")
    if gap and gap["low"] == gap["high"] == 0:
        line("as found and kd tuned are equal, seed by seed")
    elif gap and gap["se"] is not None:
        line(
            f"as found against kd tuned by as many trials: {gap['mean']:+.2f} (95 % interval {gap['low']:+.2f} to "
            f"{gap['high']:+.2f}), {gap['wins']} of {gap['n']} wins"
        )
    if result.get("front"):  # a sweep of before has none
        line("")
        line(
            f"Pareto front on {config.judged}: no other trial is as good in each and better in one"
        )
        console.print(front_table(result["front"]))
        if (place := result["front"][0].get("checkpoint")) is not None:
            line(
                f"export one by its folder: python -m richkd export {short(Path(result['sweep']) / place)}"
            )
    line("")
    name = called(Path(result["sweep"]))
    if best is None:
        cell = next(iter(result["cells"]))
        line("a grid", f"has no best; one cell's: python -m tune best {name} --cell {cell}")
    else:
        settings = {key: value for key, value in best["settings"].items() if key != "clip.scale"}
        line("best setting", f"{describe(settings)} at clip.scale {best['scale']}")
        line("", f"trial {best['trial']}, {best['val_top1']:.2f} % on {config.judged}")
        if best["origin"]:
            line("", best["origin"])
        line("checkpoint", short(best["checkpoint"]))
        line("restore it", f"python -m tune best {name} --copy-to student")
    if result.get("report") is not None:
        line("report", short(result["report"]))
    for what, text in result["mlflow"]["lines"].items():
        line(what, text)
    if result.get("duplicates"):
        line("not run again", f"{result['duplicates']} trials, whose settings had run before")
    if result["failed"]:
        kinds = ", ".join(f"{n} {kind}" for kind, n in result["failures_by_class"].items())
        line("failed", f"{kinds}: {next(iter(result['failures'].values()))}", "red")
    line(f"{result['seconds']:.0f} s on {result['machine']['cores']} cores")


def front_table(front: list[dict[str, Any]]) -> Table:
    """Return the Pareto front of a search, most accurate first."""
    table = Table(box=None, pad_edge=False)
    objectives = [key for key in front[0] if key not in ("trial", "params", "checkpoint")]
    for name in ("trial", *objectives):
        table.add_column(UNITS.get(name, name), justify="left" if name == "trial" else "right")
    table.add_column("settings")
    for each in front:
        cells = [FORMATS.get(name, "{:.3g}").format(each[name]) for name in objectives]
        table.add_row(each["trial"], *cells, Text(describe(each["params"])))
    return table


def short(path: str | Path) -> str:
    """Return a path as seen from this folder, if it lies in it."""
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return str(path)
