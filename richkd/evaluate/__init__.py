"""What a network or a table of logits gets right: one file a question."""

from richkd.evaluate.accuracy import accuracy, evaluate

__all__ = ["accuracy", "evaluate"]
