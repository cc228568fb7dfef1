"""Fine-tuning in one call: first the head, then the whole model, as in fastai."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

from pa_core import TrainerPlaceholderValues
from pa_core.plugin import named_parameters
from pa_models.discriminative_lr import layer_group_parameters, spread_lr
from pa_models.gradual_unfreezing import GradualUnfreezingCallback, Parts
from pa_models.layer_groups import groups_as_text
from pa_models.wrappers import unwrap_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer

    from pa_core import Trainer

_NAME = "fine_tune"  # the plugin's name in training states
_LENGTHS: dict[str, Any] = {
    "updates_per_epoch": TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
    "num_updates": TrainerPlaceholderValues.NUM_UPDATES,
}


def fine_tune(
    trainer: Trainer,
    train_dataset: Any,
    epochs: int,
    freeze_epochs: int = 1,
    *,
    base_lr: float | None = None,
    lr_mult: float = 100.0,
    head: Parts | None = None,
    freeze_batch_norms: bool = False,
    **train_arguments: Any,
) -> None:
    """Train the head for `freeze_epochs`, then the whole model for `epochs`, in one run.

    The recipe is that of fastai's ``fine_tune``: a one-cycle schedule up to `base_lr` with the rest
    frozen; then one up to ``base_lr / 2`` in the last layer group, decreasing geometrically to
    ``base_lr / 2 / lr_mult`` in the first. Momentum isn't cycled. Since it is one run, callbacks,
    metrics and schedulers see ``freeze_epochs + epochs`` epochs; it is resumed like any other, by
    the same call with ``resume_from``. Afterwards the optimizer's learning rates are restored. The
    layer groups, those of `discriminative_param_groups`, are printed with their learning rates.

    Args:
        trainer: its optimizer has all parameters of the model. The optimizer's groups are split by
            layer group and keep all other options.
        train_dataset: as for ``trainer.train``.
        epochs: epochs of training the whole model.
        freeze_epochs: epochs of training the head before that.
        base_lr: the highest learning rate; by default the optimizer's.
        lr_mult: the ratio of the last layer group's learning rate to the first's.
        head: what is trained first, as in a plan of `GradualUnfreezingCallback`; by default the
            last layer group with parameters.
        freeze_batch_norms: whether batch norms are frozen with the rest. By default they are
            trained from the start, at a tenth of `base_lr`.
        **train_arguments: more arguments of ``trainer.train``, such as ``eval_dataset``. A
            ``create_scheduler_fn`` replaces the two cycles; its optimizer has the learning rates of
            the second phase.

    Raises:
        ValueError: for an argument out of range, if the optimizer lacks parameters of the model, if
            gradual unfreezing is enabled, or if there is only one layer group to freeze.
    """
    for name, number, least in (("epochs", epochs, 1), ("freeze_epochs", freeze_epochs, 0)):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
    if not lr_mult > 0 or (base_lr is not None and not base_lr > 0):
        raise ValueError(
            f"base_lr and lr_mult must be positive numbers, got {base_lr!r} and {lr_mult!r}"
        )
    for name, plugin in trainer.plugins.by_name.items():
        if isinstance(plugin, GradualUnfreezingCallback):
            raise ValueError(
                f"fine_tune does its own unfreezing and conflicts with the plugin {name!r}: "
                "disable the plugin, or call trainer.train()"
            )
    model = unwrap_model(trainer.model)
    layer_groups = layer_group_parameters(model)
    num_groups = len(layer_groups)
    if head is None and freeze_epochs and num_groups == 1:
        raise ValueError(
            f"{type(model).__name__} has a single layer group with parameters, "
            f"{next(iter(layer_groups))}, so no head is left to train first: name it with "
            "head=…, or use freeze_epochs=0"
        )
    optimizer = trainer.optimizer
    indices = split_param_groups(optimizer, model)
    # The scheduler of an earlier run has changed "lr", and stored the original as "initial_lr".
    given = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if base_lr is None:
        base_lr = max(map(float, given))
    late = [rate / 2 for rate in spread_lr((base_lr / lr_mult, base_lr), num_groups)]
    _set_rates(optimizer, [late[index] for index in indices])

    plan: dict[str, Parts] = {"0 epochs": list(layer_groups)[-1] if head is None else head}
    if freeze_epochs:
        plan[f"{freeze_epochs} epochs"] = "*"
    else:
        plan = {"0 epochs": "*"}
    first = spread_lr(slice(base_lr), num_groups)
    early = [rate / late[index] for index, rate in enumerate(first)]  # relative to those of groups
    rates = [f"lr {rate:.3g}" for rate in late]
    if train_arguments.get("create_scheduler_fn") is None:
        if freeze_epochs:
            rates = [f"lr {a:.3g}, then {b:.3g}" for a, b in zip(first, late, strict=True)]
        train_arguments["create_scheduler_fn"] = partial(
            _create_schedule,
            early=[early[index] for index in indices],
            freeze_epochs=freeze_epochs,
            **_LENGTHS,
        )
    shown = zip(layer_groups.items(), rates, strict=True)
    lines = groups_as_text(model, [(group, own, rate) for (group, own), rate in shown])
    trainer.print("\n".join([f"Layer groups of {type(model).__name__}:", *lines]))
    name = trainer.plugins.register(GradualUnfreezingCallback(plan, freeze_batch_norms), _NAME)
    try:
        trainer.train(train_dataset, freeze_epochs + epochs, **train_arguments)
    finally:
        trainer.plugins.unregister(name)
        _set_rates(trainer.optimizer, given)


def _set_rates(optimizer: Any, rates: list[Any]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        group.pop("initial_lr", None)


def split_param_groups(optimizer: Any, model: nn.Module) -> list[int]:
    """Split an optimizer's groups by layer group, in place; the parameters' state is kept.

    Returns:
        For each group of the optimizer, the index of its layer group among those with parameters.

    Raises:
        ValueError: if the optimizer lacks parameters of the model.
    """
    layer_groups = list(layer_group_parameters(model).values())
    index_of = {id(p): index for index, own in enumerate(layer_groups) for p in own}
    if not isinstance(optimizer.param_groups, list):
        raise ValueError(
            "fine_tune() splits the groups of a single optimizer: give the Trainer one"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in named_parameters(model) if id(p) not in held]
    if missing:
        raise ValueError(
            f"The optimizer lacks {len(missing)} of the model's parameters, such as "
            f"{missing[0]}: create it from all of them, model.parameters()"
        )
    groups, indices = [], []
    for group in optimizer.param_groups:
        for index in sorted({index_of[id(p)] for p in group["params"]}):
            own = [p for p in group["params"] if index_of[id(p)] == index]
            groups.append({**group, "params": own})
            indices.append(index)
    optimizer.param_groups[:] = groups
    return indices


def _create_schedule(
    optimizer: Optimizer,
    *,
    early: list[float],
    freeze_epochs: int,
    updates_per_epoch: int,
    num_updates: int,
) -> LambdaLR:
    """Two successive cycles; `early` has the peaks of the first, relative to the groups' lr."""
    first = freeze_epochs * updates_per_epoch
    second = max(num_updates - first, 1)

    def factor(peak: float) -> Callable[[int], float]:
        def at(update: int) -> float:
            if update < first:
                return peak * one_cycle(update / first, pct_start=0.99, div=25.0)
            return one_cycle((update - first) / second, pct_start=0.3, div=5.0)

        return at

    return LambdaLR(optimizer, [factor(peak) for peak in early])


def one_cycle(progress: float, *, pct_start: float, div: float, div_final: float = 1e5) -> float:
    """The learning rate of a one-cycle schedule as a fraction of its peak: a cosine up and down.

    Leslie Smith's 1cycle policy ("Super-Convergence", 2018) in the form of fastai's
    ``fit_one_cycle``.

    Args:
        progress: the position in the cycle, from 0 to 1.
        pct_start: the position of the peak.
        div: the ratio of the peak to the start.
        div_final: the ratio of the peak to the end.

    >>> [round(one_cycle(x, pct_start=0.5, div=4.0), 3) for x in (0, 0.25, 0.5, 0.75, 1)]
    [0.25, 0.625, 1.0, 0.5, 0.0]
    """
    progress = min(progress, 1.0)
    if progress < pct_start:
        start, end, fraction = 1 / div, 1.0, progress / pct_start
    else:
        start, end, fraction = 1.0, 1 / div_final, (progress - pct_start) / (1 - pct_start)
    return start + (end - start) * (1 - math.cos(math.pi * fraction)) / 2
