"""Any grid in minutes on two cores: what `--scale tiny` lays over a layer, and the images that it is run on."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from richkd import cache
from richkd.config import Data, one_of
from richkd.data import load
from richkd.files import make_folder, write_atomic
from richkd.layers import Entry, Layers, build, find_layer, read, read_layer

SCALES = ("full", "tiny")
TINY = "Tiny scale: the numbers mean nothing beyond “it runs”."
IMAGES = 600
SIDE = 32  # pixels: the least that each network takes


def scaled(words: Sequence[str], scale: str | None) -> Layers:
    """Return the layers of a command line; at scale `tiny` what conf/paper/tiny.yaml says holds in all cells of a grid."""
    if scale in (None, "full"):
        return read([*words])
    one_of("--scale", scale, SCALES)
    layer = f"paper/{scale}"
    keys = {entry.key for entry in read_layer(find_layer(layer)).entries}
    layers = read([*(w for w in words if "=" not in w), layer, *(w for w in words if "=" in w)])
    layers = Layers(entries=tuple(_without(entry, keys) for entry in layers.entries))
    config = build(layers)
    settings: dict[str, Any] = {"data.path": str(images(cache.root(config.cache)))}
    if config.data.imbalance == "table14":  # a list of 100 classes, where the digits have ten
        settings["data.imbalance"] = 0.01
    return layers.over(layer, settings)


def _without(entry: Entry, keys: set[str]) -> Entry:
    """Return the settings of a row or a method of a grid without these keys, and any other entry as it is."""
    if not entry.key.startswith("sweep.grid.") or not isinstance(entry.value, dict):
        return entry
    return entry._replace(value={k: v for k, v in entry.value.items() if k not in keys})


def images(root: Path) -> Path:
    """Return a file of some of the embedded digits, enlarged to SIDE pixels and in three channels; made if missing."""
    path = root / "tiny" / f"digits-{IMAGES}-{SIDE}.npz"
    if path.exists():
        return path
    digits = load(Data(), root)
    pixels, labels = digits.train.pixels[:IMAGES], digits.train.labels[:IMAGES]
    times = SIDE // pixels.shape[1]
    large = pixels.repeat(times, 1).repeat(times, 2).repeat(3, 3)
    file = io.BytesIO()
    np.savez(file, images=large, labels=labels, names=np.array(digits.names))
    make_folder(path.parent, "cache")
    write_atomic(path, file.getvalue())
    return path
