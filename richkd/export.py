"""A student for other programs: one folder that says what it is and needs no richkd.

    student.pt2  student.onnx     the student as `torch.export` and ONNX: images in, logits out, normalisation inside
    model.safetensors             the weights of its network
    config.json                   architecture, classes, and how a picture becomes an image; each of the above holds it, too
    README.md                     the model card

Both programs take uint8 `(N, C, H, W)` of any N. They are read back from the disk and compared with the student itself,
and the folder appears only if they agree. All of it is written always: together it takes three times the weights.
"""

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as encode
from torch import Tensor

from richkd import checkpoint
from richkd.card import card
from richkd.errors import ConfigError, Interrupted, RichkdError
from richkd.files import make_folder, sync, to_json, write_synced
from richkd.student import Student

PT2, ONNX, WEIGHTS, CONFIG, CARD = (
    "student.pt2",
    "student.onnx",
    "model.safetensors",
    "config.json",
    "README.md",
)
BATCHES = (1, 7)  # of images on which programs are compared; neither is the one that was traced
TOLERANCE = 1e-4  # of the largest logit; sums in another order differ by some 1e-6 of it

Run = Callable[[Tensor], Tensor]


def export(
    source: Path, target: Path, name: str, stop: Callable[[], int | None] = lambda: None
) -> dict[str, Any]:
    """Write a student and its card for other programs.

    Args:
        source: Checkpoint.
        target: New folder; it appears when it is whole, and only if both programs compute what the student does.
        name: Of the student, for its card.
        stop: Says whether a signal came.

    Returns:
        `checkpoint`, `folder`, `parameters`, `files` (bytes by name) and `difference`: by program, the largest absolute
        difference of a logit from the student's for each number of images.

    Raises:
        ConfigError: If `target` exists, or `source` is no checkpoint of a student.
        CorruptError: If a checksum is not the recorded one.
        RichkdError: If the network cannot be exported, or computes something else then.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new folder with --to.")
    saved = checkpoint.load(source)
    student = Student(saved).eval().requires_grad_(False)
    config = config_of(student, saved.meta)
    partial = target.absolute().with_name(f".{target.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial.parent, "--to")
    try:
        partial.mkdir()
        write_synced(partial / CONFIG, to_json(config))
        said = json.dumps(config)
        write_synced(partial / WEIGHTS, encode(saved.weights, {"format": "pt", CONFIG: said}))
        difference = {}
        with _foreseen(PT2, config["student"]["name"]), quiet():
            program = _traced(student)
        for file, write in ((PT2, _write_pt2), (ONNX, _write_onnx)):
            with _foreseen(file, config["student"]["name"]), quiet():
                run = write(program, partial / file, said)
            sync(partial / file)
            difference[file] = compare(student, run, file)
            if (signum := stop()) is not None:
                raise Interrupted(signum, f"stopped; {target} was not written")
        write_synced(partial / CARD, card(name, saved, config, difference).encode())
        sync(partial)
        partial.rename(target)
        sync(target.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "checkpoint": str(source),
        "folder": str(target),
        "parameters": config["parameters"],
        "files": {path.name: path.stat().st_size for path in sorted(target.iterdir())},
        "difference": difference,
    }


def config_of(student: Student, meta: dict[str, Any]) -> dict[str, Any]:
    """Return what a program must know of a student to use it alone, as plain JSON; `meta` is that of its checkpoint."""
    return {
        "student": meta["config"]["student"],
        "parameters": sum(each.numel() for each in student.network.parameters()),
        "names": list(student.names),
        "input": {
            "name": "images",
            "type": "uint8",
            "shape": ["batch", student.channels, *student.size],
            "channels": "grey" if student.channels == 1 else "RGB",
        },
        "output": {"name": "logits", "type": "float32", "shape": ["batch", len(student.names)]},
        "outside": {  # as Student.read does it
            "upright": "as EXIF says",
            "transparent": "over white",
            "border": student.border,  # share that is cut off at each side first
            "crop": "centre, of the shape of the input",
            "resample": f"{student.resample}, antialiased",
            "grey": "after scaling, as Pillow's mode L" if student.channels == 1 else None,
        },
        "inside": {"mean": meta["mean"], "std": meta["std"]},  # of pixels in 0 to 1
    }


def compare(student: Student, run: Run, file: str) -> dict[str, float]:
    """Return the largest absolute difference of a program's logits from the student's, by number of images.

    Raises:
        RichkdError: If it exceeds TOLERANCE, or one of them is not finite.
    """
    generator, found = torch.Generator().manual_seed(0), {}
    for count in BATCHES:
        shape = (count, student.channels, *student.size)
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        wanted, got = student(images), run(images)
        gap, largest = (wanted - got).abs().max().item(), wanted.abs().max().item()
        if not gap <= TOLERANCE * largest:
            raise RichkdError(
                f"{file} must compute what the student does but its logits differ by {gap:.3g} at {count} images, where "
                f"they are at most {largest:.3g}; nothing was written."
            )
        found[str(count)] = gap
    return found


def _write_pt2(program: torch.export.ExportedProgram, path: Path, config: str) -> Run:
    torch.export.save(program, path, extra_files={CONFIG: config})
    return torch.export.load(path).module()


def _write_onnx(program: torch.export.ExportedProgram, path: Path, config: str) -> Run:
    import onnxruntime

    converted = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    converted.rename_axes({converted.model.graph.inputs[0].shape[0]: "batch"})
    converted.model.metadata_props[CONFIG] = config
    converted.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # more are pinned to cores, which not every machine allows
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(np.asarray(logits))

    return run


def _traced(student: Student) -> torch.export.ExportedProgram:
    """Return the student as a graph that takes any number of images."""
    example = torch.zeros(2, student.channels, *student.size, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(student, (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop(
            "stack_trace", None
        )  # would name folders of this machine in what is published
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep from the terminal what exporters tell their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _foreseen(file: str, network: str) -> Iterator[None]:
    """Say in a line that a network cannot be exported; exporters have many exceptions for that."""
    try:
        yield
    except (RichkdError, OSError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RichkdError(
            f"{network} cannot be written as {file} ({reason}); nothing was written. Take another student.name."
        ) from error
