"""What a network or a table of logits gets right: one file a question."""

from richkd.evaluate.accuracy import accuracy, accuracy_of, agreement, evaluate
from richkd.evaluate.calibration import Calibration, calibration
from richkd.evaluate.categories import by_frequency, by_teacher

__all__ = [
    "Calibration",
    "accuracy",
    "accuracy_of",
    "agreement",
    "by_frequency",
    "by_teacher",
    "calibration",
    "evaluate",
]
