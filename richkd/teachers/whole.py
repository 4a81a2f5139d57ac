"""Logits of whole images as one table: where it lies, and rows of it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from richkd import fusion
from richkd.data.views import sent

# bytes of a table of logits on a GPU; a larger one stays in the host's memory, and its rows are sent as they are asked for
HELD = 2**30
WHOLE = slice(None)  # all rows


def placed(table: Tensor, device: torch.device) -> Tensor:
    """Return a table of logits on the device, a large one where it is: on the CPU, or in the cache's file."""
    return table.to(device) if table.nbytes <= HELD else table


def blocks(table: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """Yield those rows of a table of logits by blocks, since all of a large one would be a large copy."""
    for some in rows.split(fusion.together(table.shape[1])):
        yield table[some]


def looked_up(table: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Return rows of a table on the device, wherever the table is."""
    return sent(table[sent(rows, table.device)], device)
