"""What can go wrong, as one small tree: each class carries the exit code of the command line.

A message names the field, the rule, the value, and what to do next; it is printed as one line, without a traceback.
"""

from collections.abc import Iterator


class RichkdError(Exception):
    """Base of everything that richkd raises on purpose: the run failed."""

    exit_code = 1


class ConfigError(RichkdError):
    """A key, a value, a file or a combination that cannot be used; raised before any training."""

    exit_code = 2


class DataError(ConfigError):
    """Images, labels, class names, prompts or logits that do not fit together."""


class NonFiniteError(RichkdError):
    """NaN or infinity during training; the message names epoch, step and term."""


class CorruptError(RichkdError):
    """A file whose size or checksum is not the recorded one."""

    exit_code = 4


class Stopped(RichkdError):
    """Stopped before the end, resumable: by a budget, a lost cluster or store, or a full disk."""

    exit_code = 75


class Interrupted(Stopped):
    """Stopped by a signal, resumable; the exit code is 128 plus the signal's number."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it, back to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
