"""Freezing parts of a model, and learning rates that differ between its parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from pa_models.batch_norm import (
    hold_in_eval,
    is_batch_norm,
    is_frozen_batch_norm,
    release_from_eval,
)
from pa_models.selection import unwrap_model, select

if TYPE_CHECKING:
    from torch import nn


class Layer(NamedTuple):
    """A module with parameters of its own, or without children.

    Attributes:
        layer_group_idx: the index of its layer group, counted from the start and from the end.
        module: the module.
        is_frozen: whether none of its own parameters is trained; without any, whether it is in
            evaluation mode.
    """

    layer_group_idx: tuple[int, int]
    module: nn.Module
    is_frozen: bool


class LayerGroup(NamedTuple):
    """A child of the model, with all that is in it.

    Attributes:
        layer_group_idx: its index, counted from the start and from the end.
        module: the child.
        is_frozen: whether any of its parameters is frozen.
    """

    layer_group_idx: tuple[int, int]
    module: nn.Module
    is_frozen: bool


class ModelFreezer:
    """Freezes and unfreezes parts of a model: layer groups by index, or anything by name.

    A layer group is a child of the model: for a ResNet the groups are ``conv1``, ``bn1``, …,
    ``layer4``, ``avgpool``, ``fc``. Parameters that belong to the model itself, such as the class
    token of a vision transformer, go with the first group, since they come into play there.

    Frozen parameters have ``requires_grad=False``. What is frozen already when the freezer is made
    stays so. In distributed training call ``trainer.rewrap_model()`` after freezing within a run.

    Args:
        model: the model; wrappers of distributed training and `torch.compile` are seen through.
        freeze_batch_norms: whether freezing reaches batch norms. Then their running statistics are
            frozen, too; otherwise they train on in frozen groups, as is usual for fine-tuning.

    Attributes:
        model: the model without wrappers.
        num_groups: the number of layer groups.
        group_names: their names.

    Raises:
        ValueError: for a model without children.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> freezer = ModelFreezer(model)
    >>> freezer.freeze()
    >>> [group.is_frozen for group in freezer.get_layer_groups()]
    [True, False, False]
    >>> list(freezer.unfreeze(0, 0))
    [0]
    """

    def __init__(self, model: nn.Module, freeze_batch_norms: bool = False) -> None:
        self.model = unwrap_model(model)
        self.freeze_bn = freeze_batch_norms
        children = dict(self.model.named_children())
        if not children:
            raise ValueError(
                f"{type(self.model).__name__} has no modules in it, so there are no layer groups"
            )
        self.group_names = list(children)
        self.num_groups = len(children)
        self._groups = list(children.values())

    def get_layer_groups(self) -> list[LayerGroup]:
        """All layer groups, in the model's order."""
        return [
            LayerGroup(
                self._both_indices(index), group, any(not p.requires_grad for p in parameters)
            )
            for index, group in enumerate(self._groups)
            for parameters in [self.group_parameters(index)]
        ]

    def get_layers(self) -> list[Layer]:
        """All layers, in the model's order."""
        layers = []
        for index in range(self.num_groups):
            for module in self._modules_of(index):
                own = list(module.parameters(recurse=False))
                if own or not list(module.children()):
                    frozen = not any(p.requires_grad for p in own) if own else not module.training
                    layers.append(Layer(self._both_indices(index), module, frozen))
        return layers

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """All parameters that aren't frozen."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def group_parameters(self, index: int) -> list[nn.Parameter]:
        """The parameters of a layer group.

        Raises:
            IndexError: for an index that no group has.
        """
        index = self._check_index(index)
        return [p for m in self._modules_of(index) for p in m.parameters(recurse=False)]

    def freeze(
        self, from_index: int = 0, to_index: int = -2, set_modules_as_eval: bool = False
    ) -> None:
        """Freeze layer groups; by default all but the last.

        Args:
            from_index: the first group.
            to_index: the last group, included. Negative indices count from the end.
            set_modules_as_eval: whether the groups' modules are put in evaluation mode as well
                (no dropout), where they stay through ``model.train()`` until unfrozen.

        Raises:
            IndexError: for an index that no group has.
        """
        for index in self._range(from_index, to_index):
            self._freeze(self._modules_of(index), set_modules_as_eval)

    def unfreeze(
        self, from_index: int = -1, to_index: int = 0, set_modules_as_training: bool = True
    ) -> dict[int, dict[str, list[nn.Parameter]]]:
        """Unfreeze layer groups; by default all.

        Args:
            from_index: the first group.
            to_index: the last group, included; the two may be in either order.
            set_modules_as_training: whether the groups' modules are put in training mode at once.
                Otherwise the next ``model.train()`` does it.

        Returns:
            For the index of each group that has changed, a dict with the parameters that were
            frozen as ``"params"``, as an optimizer's ``add_param_group`` takes it.

        Raises:
            IndexError: for an index that no group has.
        """
        unfrozen = {}
        for index in self._range(from_index, to_index):
            changed = self._unfreeze(self._modules_of(index), set_modules_as_training)
            if changed:
                unfrozen[index] = {"params": changed}
        return unfrozen

    def freeze_named(self, *patterns: str, set_modules_as_eval: bool = False) -> None:
        """Freeze modules, with all that is in them, or parameters, by name.

        Args:
            *patterns: dotted names, in which ``*`` stands for anything, as in
                ``"encoder.layer.[0-3]"`` or ``"*.bias"``.
            set_modules_as_eval: whether modules are put in evaluation mode as well.

        Raises:
            ValueError: for a pattern that matches nothing, with the nearest name.
        """
        selection = select(self.model, patterns)
        modules = list(selection.modules.values())
        norms = [module for module in self.model.modules() if self._is_left_alone(module)]
        left_alone = {id(p) for norm in norms for p in norm.parameters()}
        single = [p for p in selection.parameters.values() if id(p) not in left_alone]
        if not single and not any(not self._is_left_alone(module) for module in modules):
            raise ValueError(
                f"{', '.join(map(repr, patterns))} selects batch norms only, which this freezer "
                "leaves alone: make it with freeze_batch_norms=True"
            )
        self._freeze(modules, set_modules_as_eval)
        for parameter in single:
            parameter.requires_grad_(False)

    def unfreeze_named(
        self, *patterns: str, set_modules_as_training: bool = True
    ) -> list[nn.Parameter]:
        """Unfreeze modules, with all that is in them, or parameters, by name.

        Args:
            *patterns: dotted names, as for `freeze_named`.
            set_modules_as_training: whether modules are put in training mode at once.

        Returns:
            The parameters that were frozen.

        Raises:
            ValueError: for a pattern that matches nothing, with the nearest name.
        """
        selection = select(self.model, patterns)
        changed = self._unfreeze(selection.modules.values(), set_modules_as_training)
        reached = {id(p) for m in selection.modules.values() for p in m.parameters()}
        single = [p for p in selection.parameters.values() if id(p) not in reached]
        return changed + _unfreeze(single)

    # -- Parts of the above ---------------------------------------------------------------------

    def _freeze(self, modules: Iterable[nn.Module], set_as_eval: bool) -> None:
        for module in modules:
            if self._is_left_alone(module):
                continue
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            # Statistics are as much a part of a batch norm as its weights.
            if module is not self.model and (set_as_eval or is_batch_norm(module)):
                hold_in_eval(module)

    def _is_left_alone(self, module: nn.Module) -> bool:
        return is_frozen_batch_norm(module) or (is_batch_norm(module) and not self.freeze_bn)

    def _unfreeze(self, modules: Iterable[nn.Module], set_as_training: bool) -> list[nn.Parameter]:
        changed: list[nn.Parameter] = []
        for module in modules:
            if is_frozen_batch_norm(module):
                continue
            changed += _unfreeze(module.parameters(recurse=False))
            release_from_eval(module)
            if set_as_training and module is not self.model:
                module.training = True
        return changed

    def _modules_of(self, index: int) -> list[nn.Module]:
        """The modules of a group, the model itself with the first, for its own parameters."""
        own = [self.model] if index == 0 and list(self.model.parameters(recurse=False)) else []
        return [*own, *self._groups[index].modules()]

    def _both_indices(self, index: int) -> tuple[int, int]:
        return index, index - self.num_groups

    def _range(self, from_index: int, to_index: int) -> range:
        first, last = sorted((self._check_index(from_index), self._check_index(to_index)))
        return range(first, last + 1)

    def _check_index(self, index: int) -> int:
        if not -self.num_groups <= index < self.num_groups:
            raise IndexError(
                f"There is no layer group {index}: {type(self.model).__name__} has "
                f"{self.num_groups}, {-self.num_groups} to {self.num_groups - 1}: "
                + ", ".join(self.group_names)
            )
        return index % self.num_groups


def _unfreeze(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Unfreeze parameters; returns those that were frozen."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    return frozen


def discriminative_param_groups(
    model: nn.Module, lr: float | slice | tuple[float, float]
) -> list[dict[str, Any]]:
    """A parameter group for each layer group, for an optimizer whose learning rates differ.

    Frozen parameters are included: the optimizer leaves them alone until they are unfrozen.

    Args:
        model: the model.
        lr: ``(low, high)`` or ``slice(low, high)``, spread geometrically from the first group to
            the last; ``slice(high)`` for ``high`` in the last group and a tenth of it elsewhere;
            or one rate for all.

    Returns:
        Dicts with ``params``, ``lr`` and ``name``, for groups with parameters.

    Raises:
        ValueError: for rates that aren't positive.

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
    """The parameters of each layer group that has any, by the group's name; a tied one once."""
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
    """Learning rates of `count` groups, as fastai reads a ``slice``.

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
        raise ValueError(
            f"A learning rate must be a positive number, (low, high) or slice(low, high), not {lr}"
        )
    if low is None:
        return [high / 10] * (count - 1) + [high]
    if count == 1:
        return [high]
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]
