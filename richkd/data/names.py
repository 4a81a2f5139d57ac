"""Class names from a text file."""

from pathlib import Path

from richkd.errors import ConfigError, DataError


def read_names(path: Path, count: int) -> tuple[str, ...]:
    """Return the `count` class names in `path`, one a line, in the order of the labels; blank lines do not count.

    Raises:
        ConfigError: If there is no such file.
        DataError: If it is no UTF-8 text or has another number of names.
    """
    if not path.is_file():
        raise ConfigError(f"data.names must be a text file but {path} is missing.")
    try:
        names = tuple(
            line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()
        )
    except UnicodeDecodeError as error:
        raise DataError(f"data.names: {path} must be UTF-8 text: {error}.") from error
    if len(names) != count:
        raise DataError(
            f"data.names must have a line for each of the {count} classes but {path} has {len(names)}."
        )
    return names
