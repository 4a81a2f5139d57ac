"""Early stopping by name: Optuna's own pruners, whose state lies in the study and survives a restart."""

from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner

from tune.settings import Sweep


def pruner(config: Sweep) -> BasePruner:
    """Return the rule that `sweep.scheduler` names.

    `asha` is asynchronous successive halving: after `min_epochs`, and after each further factor of
    `reduction`, only the best one in `reduction` of the trials that came as far goes on. `median` ends a trial, from
    `min_epochs` on, whose best epoch is worse than the median of the complete trials at that epoch; `startup` of them must
    be there. With several objectives nothing is stopped early: a cheap student would be, for being less accurate.
    """
    if config.scheduler == "none" or len(config.objectives) > 1:
        return NopPruner()
    if config.scheduler == "median":
        return MedianPruner(n_startup_trials=config.startup, n_warmup_steps=config.min_epochs)
    return SuccessiveHalvingPruner(
        min_resource=config.min_epochs, reduction_factor=config.reduction
    )
