"""What both command lines share: verbs, arguments, one-line errors, exit codes, `--json`, signals.

An argument with `=` is an override, one without is a layer or a name; what begins with `--` concerns this
invocation alone.
"""

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn

from richkd.errors import ConfigError, Interrupted, RichkdError, Stopped
from richkd.files import NO_SPACE

NO_ACCESS = (
    *(errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)


class Done(NamedTuple):
    """What a verb returns: the object that `--json` prints, and the exit code."""

    answer: dict[str, Any]
    code: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """One word of a command line.

    Attributes:
        run: Carries it out, given the parsed arguments: `words`, one attribute a flag, and `stop`, which
            says whether a signal came.
        help: What it does, in a line.
        words: What its words are, for the usage.
        flags: Flag without dashes -> what it does; with `=NAME` behind it takes a value.
    """

    run: Callable[[argparse.Namespace], Done]
    help: str
    words: str = "[LAYER.yaml ...] [key=value ...]"
    flags: dict[str, str]


class Stop:
    """Remembers a signal; asked between steps. A second signal ends the run where it is."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self.shown = False  # by a display, whose lines another writer would break

    def __call__(self) -> int | None:
        """Return the signal that came, None so far."""
        return self.signum

    def _handle(self, signum: int, _frame: object) -> None:
        if self.signum is not None:
            raise Interrupted(signum, "stopped at once; the last finished epoch is kept")
        self.signum = signum
        if self.shown:
            return
        # not print: its lock may be held by the code that this interrupts
        os.write(2, b"\nstopping as soon as nothing is lost; once more to stop at once\n")

    def install(self) -> None:
        """Handle SIGINT and SIGTERM from now on, also after a library has put its own handlers in place."""
        for signum in self.SIGNALS:
            signal.signal(signum, self._handle)

    @contextlib.contextmanager
    def installed(self) -> Iterator["Stop"]:
        """Handle SIGINT and SIGTERM inside the context."""
        before = {signum: signal.getsignal(signum) for signum in self.SIGNALS}
        self.install()
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help.")


def _parse(program: str, name: str, verb: Verb, argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog=f"{program} {name}",
        usage=f"{program} {name} {verb.words} [--flags]",
        description=verb.help,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for flag, text in (
        {"json": "print one JSON object as the last line of output"} | verb.flags
    ).items():
        flag, _, value = flag.partition("=")
        kind = {"metavar": value} if value else {"action": "store_true"}
        parser.add_argument(f"--{flag}", help=text, **kind)
    return parser.parse_intermixed_args(argv)


def _usage(program: str, about: str, verbs: dict[str, Verb]) -> str:
    lines = [f"usage: {program} VERB [LAYER.yaml ...] [key=value ...] [--flags]", "", about, ""]
    lines += [f"  {name:<10} {verb.help}" for name, verb in verbs.items()]
    return "\n".join([*lines, "", f"{program} VERB --help shows a verb's flags."])


def say(text: str) -> None:
    """Print a line of output; where its reader has gone (`| head`), say no more and go on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        silence()


def silence() -> None:
    """Send what would still be written to standard output nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(program: str, about: str, verbs: dict[str, Verb], argv: list[str]) -> int:
    """Run one verb and return the exit code; errors that were foreseen are one line on standard error."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        if argv:
            say(_usage(program, about, verbs))
            return 0
        print(_usage(program, about, verbs), file=sys.stderr)
        return 2
    as_json, stop = "--json" in argv, Stop()
    # the last line of standard output is the JSON object's alone
    stdout = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with stop.installed(), stdout, _plain_warnings(program):
            if argv[0] not in verbs:
                near = get_close_matches(argv[0], verbs, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(verbs)}."
                raise ConfigError(f"there is no verb {argv[0]}; {hint}")
            verb = verbs[argv[0]]
            arguments = _parse(program, argv[0], verb, argv[1:])
            arguments.stop = stop
            answer, code = verb.run(arguments)
    except SystemExit as left:  # argparse has shown its help
        answer, code = {}, int(left.code or 0)
    except (RichkdError, OSError) as problem:
        error = _foreseen(problem)
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        answer, code = {"error": str(error)}, error.exit_code
    if as_json:
        say(json.dumps(answer))
    return code


@contextlib.contextmanager
def _plain_warnings(program: str) -> Iterator[None]:
    """Print each warning once, as one line: where in our code it was raised is of no use to a user."""

    def show(message: Warning | str, *_: Any) -> None:
        print(f"{program}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _foreseen(problem: RichkdError | OSError) -> RichkdError:
    """Return what a failure of the system means to a user; others stay exceptions with a traceback."""
    if isinstance(problem, RichkdError):
        return problem
    where = f" ({problem.filename})" if problem.filename else ""
    if problem.errno in NO_SPACE:
        return Stopped(f"the disk is full{where}; free some space and run the same command again.")
    if problem.errno in NO_ACCESS:
        return ConfigError(f"{problem.strerror}{where}; choose another storage, cache or folder.")
    raise problem
