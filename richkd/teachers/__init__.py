"""The teachers that a student learns from: the user's own, zero-shot ones, and what they say together.

Whether a teacher's logits are computed online, looked up in a table or read from a file is decided here and nowhere
else.
"""

from richkd.teachers.checks import check_normalisation, check_sense, is_guess
from richkd.teachers.clip import (
    ClipTeacher,
    model_of,
    open_clip_teacher,
    open_clip_teachers,
    shares,
)
from richkd.teachers.fused import FusedTeacher
from richkd.teachers.recipe import teacher_recipe, with_both
from richkd.teachers.task import (
    DTYPES,
    MOST,
    Beside,
    Outputs,
    Resized,
    TaskTeacher,
    open_task,
    views_in_use,
)
from richkd.teachers.whole import looked_up

__all__ = [
    "DTYPES",
    "MOST",
    "Beside",
    "ClipTeacher",
    "FusedTeacher",
    "Outputs",
    "Resized",
    "TaskTeacher",
    "check_normalisation",
    "check_sense",
    "is_guess",
    "looked_up",
    "model_of",
    "open_clip_teacher",
    "open_clip_teachers",
    "open_task",
    "shares",
    "teacher_recipe",
    "views_in_use",
    "with_both",
]
