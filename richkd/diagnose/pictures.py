"""Pictures of a diagnosis, each with the table behind it."""

from collections.abc import Mapping
from typing import Any

from richkd.draw import Picture


def pictures(found: Mapping[str, Any]) -> list[Picture]:
    """Return the pictures of a diagnosis, as `diagnose` returns it."""
    return []
