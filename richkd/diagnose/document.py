"""A diagnosis as a document: of its plain JSON alone, so that a sweep can show one that was made before it."""

from collections.abc import Mapping
from typing import Any

from richkd.diagnose.pictures import pictures
from richkd.page import Block, Pictures, Text


def document(found: Mapping[str, Any]) -> list[Block]:
    """Return a diagnosis, as `diagnose` returns it, as blocks."""
    return [Text(found["verdict"], "lead"), Pictures(pictures(found))]
