"""Discriminative learning rates: a different one for each layer group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pa_models.freezing import ModelFreezer

if TYPE_CHECKING:
    from torch import nn


def discriminative_param_groups(
    model: nn.Module, lr: float | slice | tuple[float, float]
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one per layer group, with different learning rates.

    Frozen parameters are included: the optimizer doesn't change them until they are unfrozen.

    Args:
        model: the model.
        lr: ``(low, high)`` or ``slice(low, high)``, spaced geometrically from the first group to
            the last; ``slice(high)`` for ``high`` in the last group and a tenth of it elsewhere;
            or one learning rate for all.

    Returns:
        Dicts with ``params``, ``lr`` and ``name``, for each layer group with parameters.

    Raises:
        ValueError: for learning rates that aren't positive.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    >>> [round(g["lr"], 6) for g in discriminative_param_groups(model, lr=slice(1e-5, 1e-3))]
    [1e-05, 0.0001, 0.001]
    """
    groups = layer_group_parameters(model)
    rates = spread_lr(lr, len(groups))
    return [
        {"params": parameters, "lr": rate, "name": name}
        for (name, parameters), rate in zip(groups.items(), rates, strict=True)
    ]


def layer_group_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each layer group with any, by the group's name; tied parameters once."""
    freezer = ModelFreezer(model)
    seen: set[int] = set()
    groups = {}
    for index, name in enumerate(freezer.group_names):
        own = {id(p): p for p in freezer.group_parameters(index) if id(p) not in seen}
        seen |= own.keys()
        if own:
            groups[name] = list(own.values())
    return groups


def spread_lr(lr: float | slice | tuple[float, float], count: int) -> list[float]:
    """Learning rates of `count` groups, with fastai's meaning of a ``slice``.

    >>> spread_lr(slice(1.0), 3)
    [0.1, 0.1, 1.0]
    """
    if isinstance(lr, slice):
        low, high = lr.start, lr.stop
    else:
        low, high = lr if isinstance(lr, tuple) else (lr, lr)
    if not all(
        isinstance(rate, int | float) and rate > 0 for rate in (high if low is None else low, high)
    ):
        raise ValueError(f"lr must be a positive number, (low, high) or slice(low, high), got {lr}")
    if low is None:
        return [high / 10] * (count - 1) + [high]
    if count == 1:
        return [high]
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]
