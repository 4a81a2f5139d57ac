"""Named sets of caption templates, and files of the user's own.

A template has one `{}`, where the class name goes; other braces and percent signs are plain text. Adding a
set is one entry here.
"""

import unicodedata
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from richkd.errors import ConfigError, DataError

RICH = (  # the released code's twelve, in its order
    "a photo of a {}",
    "a blurry photo of a {}",
    "a cropped photo of a {}",
    "a close-up photo of a {}",
    "a low resolution photo of a {}",
    "a bright photo of a {}",
    "a picture of a {}",
    "a detailed image of a {}",
    "a sketch of a {}",
    "a natural photo of a {} in the wild",
    "a realistic image of a {}",
    "a high quality photo of a {}",
)
SETS: dict[str, tuple[str, ...]] = {
    "single": RICH[:1],
    **{f"rich{count}": RICH[:count] for count in (1, 2, 4, 8, 12)},
    # of the embedded digits, in the words that the miniature knows
    "digits": ("the digit {}", "a photo of the digit {}", "an image of the number {}"),
    "digits-photo": ("a photo of the digit {}",),
    "digits-written": ("a handwritten {}", "a scan of a written {}", "a drawing of a {}"),
    # half of its captions name a class beside the right one
    "digits-bad": ("a {} the number one", "a {} the digit seven"),
}
OPEN_CLIP = {"openai80": "OPENAI_IMAGENET_TEMPLATES", "openai7": "SIMPLE_IMAGENET_TEMPLATES"}
MAX_BYTES = 1_000_000


def templates(name: str, field: str = "clip.prompts") -> tuple[str, ...]:
    """Return the templates of a named set, of open_clip's own, or of a UTF-8 file with one a line.

    In a file blank lines and lines that begin with `#` are passed over. Templates that differ in case or
    spaces alone count once, with a warning, so that none weighs double.
    `field` is the key that `name` is of.

    Raises:
        ConfigError: If there is neither such a set nor such a file.
        DataError: If a template has no `{}`, or more than one.
    """
    if name in SETS:
        return SETS[name]
    if name in OPEN_CLIP:
        import open_clip

        # functions of a class name: what they put around it is the template
        return tuple(f("{}") for f in getattr(open_clip, OPEN_CLIP[name]))
    path = Path(name)
    if not path.is_file():
        near = get_close_matches(name, [*SETS, *OPEN_CLIP], 1)
        hint = f"did you mean {near[0]}?" if near else f"sets: {', '.join([*SETS, *OPEN_CLIP])}."
        raise ConfigError(f"{field} must be a named set or a text file but got {name!r}; {hint}")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{field}: {name} is larger than {MAX_BYTES} bytes; is it a prompt file?")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{field}: {name} must be UTF-8 text: {error}.") from error
    found = {}
    for number, line in enumerate(lines, 1):
        text = unicodedata.normalize("NFC", line.strip())
        if not text or text.startswith("#"):
            continue
        if text.count("{}") != 1:
            raise DataError(
                f"{field}: a template has one {{}} for the class name but line {number} of {name} has "
                f"{text.count('{}')}: {text!r}."
            )
        key = " ".join(text.casefold().split())
        if key in found:
            warnings.warn(
                f"{field}: line {number} of {name} repeats {found[key]!r}; it counts once.",
                stacklevel=2,
            )
        found.setdefault(key, text)
    if not found:
        raise DataError(f"{field}: {name} has no template; write one a line.")
    return tuple(found.values())


def captions(templates: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Return `P` lists of `K` captions; names are put in literally, whatever braces they hold.

    Underscores become spaces: to a tokenizer they are a sign of their own (`maple _ tree`), which the
    released code leaves in.
    """
    spoken = [name.replace("_", " ") for name in names]
    return [[template.replace("{}", name) for name in spoken] for template in templates]
