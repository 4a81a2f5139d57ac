"""In which digits a GPU or a CPU computes."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def computed(device: torch.device, precision: str) -> Iterator[None]:
    """Compute layers in `bf16`, or in `fp32` as fp32: a GPU's convolutions round to TF32 unless they are told."""
    exact = contextlib.nullcontext()
    if device.type == "cuda":
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with exact, torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


def in_use(wanted: str, device: torch.device) -> str:
    """Return what `train.precision` comes to: `auto` is bf16 on a GPU that computes in it, else fp32."""
    if wanted != "auto":
        return wanted
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"
