"""What waits to be sent, on the disk: a line is written before its sending is tried, so that no kill loses it."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Spool:
    """A file to which every thread and every signal handler appends, and from which one thread reads.

    Without a lock, which a handler could wait for in vain: a line is a single `write` to a file opened for
    appending, and its place in the file is its number. A line whose end is missing, of a driver that was killed
    or on a disk that was full, was never put: its caller has heard so, or is dead.

    Args:
        path: The file, made if there is none; what an earlier driver left in it waits.

    Attributes:
        address: What its last writer said of where its lines are to be sent.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # never closed: a thread that MLflow does not answer may still come back to it
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.position = 0  # bytes; the operations that begin before it are done
        self.address: dict[str, Any] = {}
        for record, _ in self._records():
            self.position = record.get("done", self.position)
            self.address = record if "uri" in record else self.address

    def write(self, record: dict[str, Any]) -> None:
        """Append a record.

        Raises:
            OSError: If the system does not take it, as on a full disk.
        """
        # a newline before it, too: it stays readable after one that a full disk has cut off
        line = f"\n{json.dumps(record, default=str)}\n".encode()
        try:
            whole = os.write(self.file, line) == len(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if not whole:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def waiting(self) -> list[tuple[dict[str, Any], int]]:
        """Return the operations that are not done, in the order of their writing, each with its end in bytes."""
        return [found for found in self._records() if "name" in found[0]]

    def done(self, position: int) -> None:
        """Note that all operations up to that end are done; an OSError as in `write`."""
        self.write({"done": position})
        self.position = position

    def remove(self) -> None:
        """Remove the file, when nothing waits in it."""
        self.path.unlink(missing_ok=True)

    def _records(self) -> Iterator[tuple[dict[str, Any], int]]:
        end = self.position
        size = os.fstat(self.file).st_size
        for line in os.pread(self.file, size - end, end).splitlines(keepends=True):
            end += len(line)
            with contextlib.suppress(ValueError):  # an empty line, or what is left of one
                if line.endswith(b"\n"):
                    yield json.loads(line), end
