"""Discriminative learning rates: a different one for each layer group."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from pa_models.layer_groups import LayerGroups, groups_as_text, print_on_main
from pa_models.wrappers import unwrap_model

if TYPE_CHECKING:
    from torch import nn


def discriminative_param_groups(
    model: nn.Module, lr: float | slice | tuple[float, float], *, verbose: bool = True
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one per layer group, with different learning rates.

    The layer groups are the children of the model, or those of its only child with parameters. A
    tied parameter is in the last group that holds it, such as the embeddings of a language model in
    that of the head. Frozen parameters are included: the optimizer doesn't change them until they
    are unfrozen.

    Args:
        model: the model.
        lr: ``(low, high)`` or ``slice(low, high)``, spaced geometrically from the first group to
            the last; ``slice(high)`` for ``high`` in the last group and a tenth of it elsewhere;
            or one learning rate for all.
        verbose: whether to print the groups, on the main process.

    Returns:
        Dicts with ``params``, ``lr`` and ``name``, for each layer group with parameters.

    Raises:
        ValueError: for learning rates that aren't positive.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    >>> groups = discriminative_param_groups(model, lr=slice(1e-5, 1e-3))
    Layer groups of Sequential:
      0  20 parameters  lr 1e-05
      1  20 parameters  lr 0.0001
      2  10 parameters  lr 0.001
    >>> [round(group["lr"], 6) for group in groups]
    [1e-05, 0.0001, 0.001]
    """
    model = unwrap_model(model)
    groups = layer_group_parameters(model)
    rates = spread_lr(lr, len(groups))
    if verbose:
        shown = zip(groups.items(), rates, strict=True)
        lines = groups_as_text(
            model, [(name, own, f"lr {rate:.3g}") for (name, own), rate in shown]
        )
        print_on_main(f"Layer groups of {type(model).__name__}:", *lines)
    if len(groups) == 1 and not isinstance(lr, int | float):
        warnings.warn(
            f"{type(model).__name__} has a single layer group with parameters, "
            f"{next(iter(groups))}, so all of them have the learning rate {rates[0]:.3g}",
            stacklevel=2,
        )
    return [
        {"params": parameters, "lr": rate, "name": name}
        for (name, parameters), rate in zip(groups.items(), rates, strict=True)
    ]


def layer_group_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each layer group with any, by the group's name; each parameter once."""
    groups = LayerGroups(unwrap_model(model), look_inside=True)
    named = zip(groups.names, groups.parameters, strict=True)
    return {name: parameters for name, parameters in named if parameters}


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
