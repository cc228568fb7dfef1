"""Freezing and unfreezing parts of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from pa_models.batch_norm import (
    hold_in_eval,
    is_batch_norm,
    is_frozen_batch_norm,
    release_from_eval,
)
from pa_models.selection import select
from pa_models.wrappers import unwrap_model

if TYPE_CHECKING:
    from torch import nn


class Layer(NamedTuple):
    """A module that owns parameters or has no children.

    Attributes:
        layer_group_idx: the index of its layer group, from the start and from the end (negative).
        module: the module.
        is_frozen: whether all parameters that it owns are frozen; if it owns none, whether it is in
            evaluation mode.
    """

    layer_group_idx: tuple[int, int]
    module: nn.Module
    is_frozen: bool


class LayerGroup(NamedTuple):
    """A child of the model with all its submodules.

    Attributes:
        layer_group_idx: its index, from the start and from the end (negative).
        module: the child.
        is_frozen: whether any of its parameters is frozen.
    """

    layer_group_idx: tuple[int, int]
    module: nn.Module
    is_frozen: bool


class ModelFreezer:
    """Freezes and unfreezes parts of a model: layer groups by index, or anything by name.

    A layer group is a child of the model: for a ResNet, the groups are ``conv1``, ``bn1``, …,
    ``layer4``, ``avgpool``, ``fc``. Parameters that the model itself owns, such as the class token
    of a vision transformer, belong to the first group, where they are used.

    Frozen parameters have ``requires_grad=False``. Parameters that are frozen when the freezer is
    created stay frozen. On several processes, each must freeze and unfreeze the same parts after
    the same update; FSDP and DeepSpeed can't follow changes within a run.

    Args:
        model: the model; wrappers of distributed training and `torch.compile` are removed.
        freeze_batch_norms: whether to freeze batch norms as well, with their running statistics.
            Otherwise they are trained in frozen groups, too, as is usual in fine-tuning.

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
                f"{type(self.model).__name__} has no child modules, which would be the layer groups"
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
            to_index: the last group, inclusive. Negative indices count from the end.
            set_modules_as_eval: whether to put the groups' modules in evaluation mode as well (no
                dropout). ``model.train()`` doesn't change it until they are unfrozen.

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
            to_index: the last group, inclusive; the two may be in either order.
            set_modules_as_training: whether to put the groups' modules in training mode now.
                Otherwise the next ``model.train()`` does.

        Returns:
            For the index of each group that has changed, a dict with the unfrozen parameters as
            ``"params"``, as an optimizer's ``add_param_group`` expects.

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
        """Freeze modules, with all their submodules, or parameters, by name.

        Args:
            *patterns: dotted names, in which ``*`` matches anything, such as
                ``"encoder.layer.[0-3]"`` or ``"*.bias"``.
            set_modules_as_eval: whether to put modules in evaluation mode as well.

        Raises:
            ValueError: for a pattern that matches nothing, with the closest name, or only batch
                norms that this freezer doesn't freeze.
        """
        selection = select(self.model, patterns)
        modules = list(selection.modules.values())
        norms = [module for module in self.model.modules() if self._is_excluded(module)]
        excluded = {id(p) for norm in norms for p in norm.parameters()}
        single = [p for p in selection.parameters.values() if id(p) not in excluded]
        if not single and all(self._is_excluded(module) for module in modules):
            raise ValueError(
                f"{', '.join(map(repr, patterns))} selects batch norms only, which this freezer "
                "doesn't freeze: create it with freeze_batch_norms=True"
            )
        self._freeze(modules, set_modules_as_eval)
        for parameter in single:
            parameter.requires_grad_(False)

    def unfreeze_named(
        self, *patterns: str, set_modules_as_training: bool = True
    ) -> list[nn.Parameter]:
        """Unfreeze modules, with all their submodules, or parameters, by name.

        Args:
            *patterns: dotted names, as for `freeze_named`.
            set_modules_as_training: whether to put modules in training mode now.

        Returns:
            The parameters that were frozen.

        Raises:
            ValueError: for a pattern that matches nothing, with the closest name.
        """
        selection = select(self.model, patterns)
        changed = self._unfreeze(selection.modules.values(), set_modules_as_training)
        reached = {id(p) for m in selection.modules.values() for p in m.parameters()}
        single = [p for p in selection.parameters.values() if id(p) not in reached]
        return changed + _unfreeze(single)

    def _freeze(self, modules: Iterable[nn.Module], set_as_eval: bool) -> None:
        for module in modules:
            if self._is_excluded(module):
                continue
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            # Evaluation mode freezes the running statistics of a batch norm.
            if module is not self.model and (set_as_eval or is_batch_norm(module)):
                hold_in_eval(module)

    def _is_excluded(self, module: nn.Module) -> bool:
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
        """The modules of a group; the first includes the model if it owns parameters."""
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
