"""Distil a small image classifier from a task teacher fused with a frozen CLIP.

The best checkpoint of a sweep, verified:

    from richkd import load_student
    student = load_student("runs/digits-cnn8-261123-120000")
    logits = student(student.read("photo.jpg"))  # or any uint8 (N, C, H, W)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from richkd.student import Student, load_student

__all__ = ["Student", "load_student"]


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import, and most command lines that are wrong can be refused without it
    if name in __all__:
        from richkd import student

        return getattr(student, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
