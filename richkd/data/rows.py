"""What each image of a source is, one a line: the order in which logits computed elsewhere must come."""

from richkd.config import Data
from richkd.data.dataset import Dataset
from richkd.data.folder import listing
from richkd.errors import DataError


def rows(config: Data, dataset: Dataset) -> list[str]:
    """Return a line for each image, training and test: its file, else its number, a tab, its class if known.

    Files that cannot be read have their line, too, so that the order does not depend on what is read.

    Raises:
        DataError: If the name of a file has no place in a line.
    """
    if config.source == "folder":
        listed = listing(config)
        for file in listed.files:
            if "\t" in file or len(file.splitlines()) != 1:
                raise DataError(
                    f"data.path: names of files must be one line without tabs but got {file!r}; rename it."
                )
        places, labels = listed.files, listed.labels
    else:
        parts = (dataset.train, dataset.test)
        found = dict(pair for part in parts for pair in zip(part.ids, part.labels, strict=True))
        ids = sorted(found)
        labels = [found[k] for k in ids]
        places = ids
        if config.source == "imagenet":
            places = [part.files.relative(k) for part in parts for k in range(len(part))]
    return [
        f"{place}\t{dataset.names[label] if label >= 0 else ''}"
        for place, label in zip(places, labels, strict=True)
    ]
