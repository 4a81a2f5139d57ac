"""What a sweep ran on: code, packages, machine."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent


def packages() -> dict[str, str]:
    """Return the installed version of each package in `requirements.txt`."""
    found = {}
    for line in (PROJECT / "requirements.txt").read_text().splitlines():
        if name := re.match(r"[\w-]+", line):
            try:
                found[name[0]] = version(name[0])
            except PackageNotFoundError:
                found[name[0]] = "missing"
    return found


def commit() -> str | None:
    """Return the commit of the code, with `-dirty` if files differ from it; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def environment() -> dict[str, Any]:
    """Return code, package versions and machine, as plain JSON."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "packages": packages(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }
