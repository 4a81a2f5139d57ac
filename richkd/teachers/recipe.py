"""Configs made of a config: of the run that trains its task teacher, and of a look at both its teachers."""

from dataclasses import replace

from richkd.config import (
    Clip,
    Config,
    Contrast,
    Diagnose,
    Evaluate,
    Fusion,
    Loss,
    Teacher,
    Train,
)
from richkd.errors import ConfigError


def teacher_recipe(config: Config) -> Config:
    """Return the run that trains the task teacher of `config`: cross-entropy, at the size that it sees.

    It learns from the rows of `config` that have a label or, as `teacher.trained_on` says, from all but the held-out ones. Its
    learning rate falls by the student's steps if it has as many epochs, as the published teachers' did; else along a cosine.
    """
    if config.teacher.size is not None and config.data.augment == "crop":
        raise ConfigError(
            "teacher.size is a matter of teacher.checkpoint or teacher.pretrained, or of data.augment=resized or strong, but "
            "none of them is given; leave it out, or say teacher.size=null."
        )
    # a share of labels is of no effect, so of none on the cache either
    data = replace(config.data, labelled_share=None, size=config.teacher.size or config.data.size)
    if config.teacher.trained_on == "full":
        # a long tail decides which rows are held out; else this is the teacher that any other regime's full one is
        tail = data.imbalance if config.selection == "validation" else None
        whole = tail is not None
        data = replace(data, imbalance=tail, fraction=1.0, labelled_per_class=None, whole=whole)
    train, own = config.train, config.teacher
    steps = train.schedule == "steps" and own.epochs == train.epochs
    return replace(
        config,
        data=data,
        student=replace(config.student, name=config.teacher.name, shortcut=config.teacher.shortcut),
        teacher=Teacher(),
        clip=Clip(),
        fusion=Fusion(alpha=1.0),
        method=replace(config.method, name="ce"),
        loss=Loss(ce=1.0, logit=0.0),
        contrast=Contrast(),
        evaluate=Evaluate(),
        diagnose=Diagnose(),
        train=Train(
            precision="fp32",  # one teacher, whatever the student's layers and machine
            graphs=train.graphs,
            epochs=own.epochs,
            batch_size=own.batch_size,
            lr=own.lr,
            weight_decay=own.weight_decay,
            schedule="steps" if steps else "cosine",
            milestones=train.milestones if steps else None,
        ),
    )


def with_both(config: Config) -> Config:
    """Return a config in which both teachers have a say by their logits, whatever its method learns from them."""
    alpha = config.fusion.alpha
    return replace(
        config,
        loss=Loss(temperature=config.loss.temperature),
        fusion=replace(
            config.fusion,
            alpha=alpha if 0 < alpha < 1 else 0.5,  # one without weight would not be opened
            space="logits",
            weighting="one",
        ),
        clip=replace(config.clip, control="none"),
    )
