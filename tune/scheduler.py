"""Early stopping by name: Optuna's own pruners, whose state lies in the study and survives a restart."""

from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner

from tune.settings import Sweep


def pruner(config: Sweep) -> BasePruner:
    """Return the rule that `sweep.scheduler` names.

    `asha` is asynchronous successive halving: after `min_epochs`, and after each further factor of
    `reduction`, only the best one in `reduction` of the trials that came as far goes on.
    """
    if config.scheduler == "none":
        return NopPruner()
    return SuccessiveHalvingPruner(
        min_resource=config.min_epochs, reduction_factor=config.reduction
    )
