"""Fine-tuning in one line: the head first, then everything, as fastai does it."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

from pa_core import TrainerPlaceholderValues
from pa_models.freezing import layer_group_parameters, spread_lr
from pa_models.selection import bare_model
from pa_models.unfreezing import GradualUnfreezingCallback, Parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer

    from pa_core import Trainer

_NAME = "fine_tune"  # of the plugin, in training states
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

    The recipe is that of fastai's ``fine_tune``: one cycle of the learning rate up to `base_lr`
    with the rest frozen; then one up to ``base_lr / 2`` in the last layer group and, spread
    geometrically, ``base_lr / 2 / lr_mult`` in the first. (Momentum isn't cycled.) Since it is one
    run, callbacks, metrics and schedules see ``freeze_epochs + epochs`` epochs, and it is resumed
    like any other, by the same call with ``resume_from``. Afterwards the optimizer's learning rates
    are what they were.

    Args:
        trainer: its optimizer holds all parameters of the model. The optimizer's groups are
            divided by layer group, with all other options kept.
        train_dataset: as for ``trainer.train``.
        epochs: how long all is trained.
        freeze_epochs: how long the head alone is trained before.
        base_lr: the highest learning rate; by default the optimizer's.
        lr_mult: the ratio of the last layer group's rate to the first's.
        head: what is trained first, as in a plan of `GradualUnfreezingCallback`; by default the
            last layer group that has parameters.
        freeze_batch_norms: whether batch norms are frozen with the rest. By default they are
            trained from the start, at a tenth of `base_lr`.
        **train_arguments: more arguments of ``trainer.train``, such as ``eval_dataset``. A
            ``create_scheduler_fn`` takes the place of the two cycles; then the learning rates that
            it is given are the second phase's.

    Raises:
        ValueError: for numbers that make no sense, if the optimizer doesn't hold all parameters,
            and if gradual unfreezing is enabled as well.
    """
    for name, number, least in (("epochs", epochs, 1), ("freeze_epochs", freeze_epochs, 0)):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be a whole number from {least} on, not {number!r}")
    if not lr_mult > 0 or (base_lr is not None and not base_lr > 0):
        raise ValueError(
            f"base_lr and lr_mult must be positive numbers, not {base_lr!r} and {lr_mult!r}"
        )
    for name, plugin in trainer.plugins.by_name.items():
        if isinstance(plugin, GradualUnfreezingCallback):
            raise ValueError(
                f"fine_tune unfreezes by itself, but the plugin {name!r} does so, too: disable it, "
                "or call trainer.train()"
            )
    model = bare_model(trainer.model)
    groups = list(layer_group_parameters(model).values())
    optimizer = trainer.optimizer
    places = split_param_groups(optimizer, model)
    # (an earlier run's schedule has left the rate at its end, and noted where it began)
    given = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if base_lr is None:
        base_lr = max(map(float, given))
    late = [rate / 2 for rate in spread_lr((base_lr / lr_mult, base_lr), len(groups))]
    _set_rates(optimizer, [late[place] for place in places])

    plan: dict[str, Parts] = {"0 epochs": _last_group(model) if head is None else head}
    if freeze_epochs:
        plan[f"{freeze_epochs} epochs"] = "*"
    else:
        plan = {"0 epochs": "*"}
    # Relative to `late`, which the groups have.
    early = [rate / late[i] for i, rate in enumerate(spread_lr(slice(base_lr), len(groups)))]
    if train_arguments.get("create_scheduler_fn") is None:
        train_arguments["create_scheduler_fn"] = partial(
            _create_schedule,
            early=[early[place] for place in places],
            freeze_epochs=freeze_epochs,
            **_LENGTHS,
        )
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
    """Divide an optimizer's groups by layer group, in place; the parameters' state is kept.

    Returns:
        For each group of the optimizer, its layer group's place among those with parameters.

    Raises:
        ValueError: for parameters of the model that the optimizer doesn't hold.
    """
    layer_groups = list(layer_group_parameters(model).values())
    place_of = {id(p): place for place, own in enumerate(layer_groups) for p in own}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in model.named_parameters() if id(p) not in held]
    if missing:
        raise ValueError(
            f"The optimizer doesn't hold {len(missing)} of the model's parameters, such as "
            f"{missing[0]}: create it from all of them, model.parameters()"
        )
    divided, places = [], []
    for group in optimizer.param_groups:
        for place in sorted({place_of[id(p)] for p in group["params"]}):
            own = [p for p in group["params"] if place_of[id(p)] == place]
            divided.append({**group, "params": own})
            places.append(place)
    optimizer.param_groups[:] = divided
    return places


def _last_group(model: nn.Module) -> int:
    """The index of the last layer group with parameters of its own."""
    names = [name for name, _ in model.named_children()]
    return names.index(list(layer_group_parameters(model))[-1])


def _create_schedule(
    optimizer: Optimizer,
    *,
    early: list[float],
    freeze_epochs: int,
    updates_per_epoch: int,
    num_updates: int,
) -> LambdaLR:
    """Two cycles, one after the other; `early` are the first one's peaks, as shares of lr."""
    first = freeze_epochs * updates_per_epoch
    second = max(num_updates - first, 1)

    def factor(peak: float) -> Callable[[int], float]:
        def at(update: int) -> float:
            if update < first:
                return peak * one_cycle(update / first, pct_start=0.99, div=25.0)
            return one_cycle((update - first) / second, pct_start=0.3, div=5.0)

        return at

    return LambdaLR(optimizer, [factor(peak) for peak in early])


def one_cycle(part: float, *, pct_start: float, div: float, div_final: float = 1e5) -> float:
    """The learning rate of one cycle, as a share of its peak: a cosine up, and one down.

    Leslie Smith's 1cycle policy ("Super-Convergence", 2018) in the form of fastai's
    ``fit_one_cycle``.

    Args:
        part: how much of the cycle is done, from 0 to 1.
        pct_start: where the peak is.
        div: the peak's ratio to the beginning.
        div_final: the peak's ratio to the end.

    >>> [round(one_cycle(part, pct_start=0.5, div=4.0), 3) for part in (0, 0.25, 0.5, 0.75, 1)]
    [0.25, 0.625, 1.0, 0.5, 0.0]
    """
    part = min(part, 1.0)
    if part < pct_start:
        start, end, done = 1 / div, 1.0, part / pct_start
    else:
        start, end, done = 1.0, 1 / div_final, (part - pct_start) / (1 - pct_start)
    return start + (end - start) * (1 - math.cos(math.pi * done)) / 2
