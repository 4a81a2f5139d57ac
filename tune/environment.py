"""What a sweep ran on: code, packages, machine."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from richkd.files import sha256_of

PROJECT = Path(__file__).resolve().parent.parent
DECISIVE = ("torch", "numpy", "optuna")  # packages whose version can change a number


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


def fingerprint() -> dict[str, str]:
    """Return what a result depends on beside its settings: a digest of each file of code, and versions of packages."""
    code = {
        str(path.relative_to(PROJECT)): sha256_of(path)[:12]
        for folder in ("richkd", "tune")
        for path in sorted((PROJECT / folder).rglob("*.py"))
    }
    return code | {name: version(name) for name in DECISIVE}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two mappings, a line each."""
    keys = [*before, *(key for key in now if key not in before)]
    gone = "(none)"
    return [
        f"{key}: {before.get(key, gone)} -> {now.get(key, gone)}"
        for key in keys
        if before.get(key, gone) != now.get(key, gone)
    ]


def environment() -> dict[str, Any]:
    """Return code, package versions and machine, as plain JSON."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "packages": packages(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }
