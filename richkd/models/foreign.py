"""Weights of other projects: RepDistiller, mdistiller and plain `state_dict` files, never unpickled.

A file may be a `.safetensors`, or whatever `torch.save` wrote as long as it holds plain tensors and numbers.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from richkd.errors import ConfigError
from richkd.models.library import own_names

NESTED = ("state_dict", "model", "net")  # keys under which other projects keep the weights
SHOWN = 5  # keys that a message names
# what some projects save beside their weights, an accuracy or their options; carries values and runs nothing
BESIDE = [
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 called it
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
    argparse.Namespace,
]


def read_weights(path: Path, *, field: str) -> dict[str, Tensor]:
    """Return the weights in a file by name, on the CPU, without the `module.` that data parallelism puts in front.

    Raises:
        ConfigError: If it cannot be read without running code, or holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            with torch.serialization.safe_globals(BESIDE):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own exceptions for a torn or foreign file
        raise ConfigError(
            f"{field}={path} must be a file of weights that can be read without running code but cannot "
            f"({_reason(error)}); save its state_dict alone: torch.save(model.state_dict(), FILE)."
        ) from error
    for _ in NESTED:  # one in another, at most so often; a file can hold itself
        inner = [k for k in NESTED if isinstance(found, dict) and isinstance(found.get(k), dict)]
        found = found[inner[0]] if inner else found
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in found.items())
    ):
        has = (
            ", ".join(map(str, list(found)[:SHOWN]))
            if isinstance(found, dict)
            else type(found).__name__
        )
        raise ConfigError(
            f"{field}={path} must hold a state_dict, by itself or under {', '.join(NESTED)}, but holds {has or 'nothing'}."
        )
    return {name.removeprefix("module."): value for name, value in found.items()}


def _reason(error: Exception) -> str:
    """Return in one line why a file was refused; of PyTorch's advice only what was found."""
    text = re.sub(r"\x1b\[\d*m", "", str(error)).strip()  # it is printed in bold
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it holds {found[1]}"
    if found := re.search(r"WeightsUnpickler error: ([^\n]*)", text):
        text = found[1]
    return " ".join(f"torn, or of another format: {type(error).__name__}: {text}".split())[:200]


def load(network: nn.Module, path: Path, *, field: str, name: str) -> None:
    """Load foreign weights into `network`; none may be missing, none may be left.

    Args:
        network: As `models.build` made it.
        path: File of weights.
        field: Config key, for the messages.
        name: Of the network, for the messages.

    Raises:
        ConfigError: If keys or shapes are not the network's; names the first of each.
    """
    weights, own = own_names(network, read_weights(path, field=field)), network.state_dict()
    for key, value in own.items():
        if key.endswith(
            "num_batches_tracked"
        ):  # files of old versions have none, and nobody reads it
            weights.setdefault(key, value)
    problems = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": [
            f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
            for key, value in own.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    if any(problems.values()):
        said = "; ".join(
            f"{len(keys)} {kind} ({', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''})"
            for kind, keys in problems.items()
            if keys
        )
        # parameter-free shortcuts, as in He et al.'s own networks for small images
        only_shortcuts = all(".downsample." in key for key in problems["missing"])
        others = problems["unexpected"] or problems["of another shape"]
        hint = "teacher.shortcut=A" if only_shortcuts and not others else "another teacher.name"
        if problems["of another shape"] and not problems["missing"]:
            hint = "a teacher of this task's classes and channels"
        raise ConfigError(
            f"{field}={path} does not hold the weights of {name} for this task: {said}; give {hint}."
        )
    network.load_state_dict(weights)
