"""The learning rate of each step, a function of the config and of how much of the training lies behind."""

import math

from richkd.config import Train

FALL = 0.1  # of the learning rate after each milestone


def learning_rate(train: Train, progress: float) -> float:
    """Return the learning rate of a step.

    `cosine` falls to `lr_min` from step to step, `epochs` along the same curve from epoch to epoch (transformers); both
    first climb from `warmup_lr` for `warmup` epochs, after which the curve is where it would be without, as in timm. `steps`
    falls to FALL after each epoch in `milestones`, counted from 1 (the CNNs of the distillation papers).

    Args:
        train: The recipe.
        progress: How much of the training lies behind, 0 to 1.
    """
    epochs = progress * train.epochs
    # a rounded product must not put the first step of an epoch into the one before
    begun = math.floor(epochs + 1e-9)
    if train.schedule == "steps":
        return train.lr * FALL ** sum(begun >= epoch for epoch in train.milestones)
    if train.schedule == "epochs":
        epochs, progress = begun, begun / train.epochs
    if epochs < train.warmup:
        return train.warmup_lr + (train.lr - train.warmup_lr) * epochs / train.warmup
    return train.lr_min + (train.lr - train.lr_min) * (0.5 + 0.5 * math.cos(math.pi * progress))
