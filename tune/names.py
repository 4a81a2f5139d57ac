"""Names that MLflow takes: the usual ones stay as they are, others are cleaned and get a digest, so that no two become one."""

import hashlib
import json
import posixpath
import re

LENGTH = 250  # MLflow's own limit


def key(text: str) -> str:
    """Return the key of a metric, a parameter or a tag; one such as `val/top1` stays."""
    clean = posixpath.normpath("/" + re.sub(r"[^\w./ :-]", "_", text)).lstrip("/")
    return text if text and clean == text and len(text) <= LENGTH else _marked(clean, text)


def run(text: str) -> str:
    """Return the name of a run: one line of what can be printed."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if text and clean == text and len(text) <= LENGTH else _marked(clean, text)


def model(student: str, data: str) -> str:
    """Return what a student's versions are registered under: `richkd-STUDENT-DATA`.

    A name with a dash in `data` gets a digest, too: it could be another student's on other data.
    """
    name = f"richkd-{student}-{data}"
    if re.fullmatch(r"[\w.-]+", student) and re.fullmatch(r"[\w.]+", data) and len(name) <= LENGTH:
        return name
    return _marked(re.sub(r"[^\w.-]", "_", name), json.dumps([student, data]))


def originals(names: dict[str, str]) -> dict[str, str]:
    """Return, of names that were changed, the tags that keep them: `richkd.name.DIGEST` -> the name as JSON.

    Args:
        names: What MLflow was given -> what it stands for.
    """
    return {
        f"richkd.name.{_digest(text)}": json.dumps(text)
        for given, text in names.items()
        if given != text
    }


def _marked(clean: str, text: str) -> str:
    return f"{clean[: LENGTH - 9]}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
