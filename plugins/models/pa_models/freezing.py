"""Freezing and unfreezing parts of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from pa_core.plugin import named_parameters
from pa_models.batch_norm import (
    hold_in_eval,
    is_batch_norm,
    is_frozen_batch_norm,
    release_from_eval,
)
from pa_models.layer_groups import LayerGroups, print_on_main, size_of, tied_as_text
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
        is_frozen: whether any of its parameters is frozen; a tied one is the last group's.
    """

    layer_group_idx: tuple[int, int]
    module: nn.Module
    is_frozen: bool


class ModelFreezer:
    """Freezes and unfreezes parts of a model: layer groups by index, or anything by name.

    A layer group is a child of the model: for a ResNet, the groups are ``conv1``, ``bn1``, …,
    ``layer4``, ``avgpool``, ``fc``. Parameters that the model itself owns, such as the class token
    of a vision transformer, belong to the first group, where they are used. A tied parameter
    belongs to the last group that holds it: of a language model, the embeddings that are also the
    weight of the head are trained with the head.

    Frozen parameters have ``requires_grad=False``. Creating a freezer first unfreezes everything,
    except what `freeze_batch_norm` has frozen. On several processes, each must freeze and unfreeze
    the same parts after the same update; FSDP and DeepSpeed can't follow changes within a run.

    Args:
        model: the model; wrappers of distributed training and `torch.compile` are removed.
        freeze_batch_norms: whether to freeze batch norms as well, with their running statistics.
            Otherwise they are trained in frozen groups, too, as is usual in fine-tuning.
        keep_frozen: whether parameters that are frozen now stay so until they are unfrozen.
        verbose: whether to print what was frozen and unfrozen, on the main process.

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
    Froze 0, 1 of Sequential. 10 of 30 parameters are trained, in 2
    >>> [group.is_frozen for group in freezer.get_layer_groups()]
    [True, False, False]
    >>> list(freezer.unfreeze(0, 0))
    Unfroze 0 of Sequential. 30 of 30 parameters are trained, in 0, 2
    [0]
    """

    def __init__(
        self,
        model: nn.Module,
        freeze_batch_norms: bool = False,
        *,
        keep_frozen: bool = False,
        verbose: bool = True,
    ) -> None:
        self.model = unwrap_model(model)
        self.freeze_bn = freeze_batch_norms
        self._layer_groups = LayerGroups(self.model)
        self._is_verbose = verbose
        self.group_names = self._layer_groups.names
        self.num_groups = len(self.group_names)
        self._groups = list(self.model.children())
        if not keep_frozen:
            changed = self._unfreeze(self.model.modules(), set_as_training=False)
            if changed:
                self._print(f"Unfroze {size_of(changed):,} frozen parameters")

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
        for index, modules in enumerate(self._layer_groups.modules):
            for module in modules:
                own = list(module.parameters(recurse=False))
                if own or not list(module.children()):
                    frozen = not any(p.requires_grad for p in own) if own else not module.training
                    layers.append(Layer(self._both_indices(index), module, frozen))
        return layers

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """All parameters that aren't frozen."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def group_parameters(self, index: int) -> list[nn.Parameter]:
        """The parameters of a layer group; a tied one is only in the last group that holds it.

        Raises:
            IndexError: for an index that no group has.
        """
        return self._layer_groups.parameters[self._check_index(index)]

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
        chosen = self._range(from_index, to_index)
        modules, parameters = self._layer_groups.modules, self._layer_groups.parameters
        for index in chosen:
            self._freeze(modules[index], set_modules_as_eval, parameters[index])
        self._print(f"Froze {self._names(chosen)}")
        self._warn_of_tied(chosen)
        others = [index for index in range(self.num_groups) if index not in chosen]
        if others and not any(parameters[index] for index in others):
            self._warn_of_nothing_left(f"{self._names(others)} has no parameters")

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
        chosen = self._range(from_index, to_index)
        modules, parameters = self._layer_groups.modules, self._layer_groups.parameters
        for index in chosen:
            changed = self._unfreeze(modules[index], set_modules_as_training, parameters[index])
            if changed:
                unfrozen[index] = {"params": changed}
        self._print(f"Unfroze {self._names(chosen)}")
        self._warn_of_tied(chosen)
        return unfrozen

    def freeze_named(self, *patterns: str, set_modules_as_eval: bool = False) -> None:
        """Freeze modules, with all their submodules, or parameters, by name.

        A tied parameter has several names and is frozen by each of them.

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
        self._print(f"Froze {', '.join(patterns)}")
        every = {name for name, _ in named_parameters(self.model, remove_duplicate=False)}
        if every - selection.parameters.keys() and not self.get_trainable_parameters():
            tied = tied_as_text(self.model, selection.parameters.values())
            self._warn_of_nothing_left(f"{', '.join(map(repr, patterns))} holds them all{tied}")

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
        changed += _unfreeze(single)
        self._print(f"Unfroze {', '.join(patterns)}")
        return changed

    def _freeze(
        self,
        modules: Iterable[nn.Module],
        set_as_eval: bool,
        among: Iterable[nn.Parameter] | None = None,
    ) -> None:
        """Freeze modules, not their submodules; of their parameters only those in `among`."""
        own = None if among is None else set(map(id, among))
        for module in modules:
            if self._is_excluded(module):
                continue
            for parameter in module.parameters(recurse=False):
                if own is None or id(parameter) in own:
                    parameter.requires_grad_(False)
            # Evaluation mode freezes the running statistics of a batch norm.
            if module is not self.model and (set_as_eval or is_batch_norm(module)):
                hold_in_eval(module)

    def _is_excluded(self, module: nn.Module) -> bool:
        return is_frozen_batch_norm(module) or (is_batch_norm(module) and not self.freeze_bn)

    def _unfreeze(
        self,
        modules: Iterable[nn.Module],
        set_as_training: bool,
        among: Iterable[nn.Parameter] | None = None,
    ) -> list[nn.Parameter]:
        own = None if among is None else set(map(id, among))
        changed: list[nn.Parameter] = []
        for module in modules:
            if is_frozen_batch_norm(module):
                continue
            parameters = module.parameters(recurse=False)
            changed += _unfreeze(p for p in parameters if own is None or id(p) in own)
            release_from_eval(module)
            if set_as_training and module is not self.model:
                module.training = True
        return changed

    def _names(self, chosen: Iterable[int]) -> str:
        return ", ".join(self.group_names[index] for index in chosen)

    def _print(self, what_was_done: str) -> None:
        """Print what was done, and what is trained now."""
        if not self._is_verbose:
            return
        parameters = self._layer_groups.parameters
        trained = [p for group in parameters for p in group if p.requires_grad]
        groups = [i for i, group in enumerate(parameters) if any(p.requires_grad for p in group)]
        where = f", in {self._names(groups)}" if groups else ""
        print_on_main(
            f"{what_was_done} of {type(self.model).__name__}. {size_of(trained):,} of "
            f"{size_of(p for group in parameters for p in group):,} parameters are trained"
            f"{where}{tied_as_text(self.model, trained)}"
        )

    def _warn_of_nothing_left(self, reason: str) -> None:
        warnings.warn(
            f"All parameters of {type(self.model).__name__} are frozen, so nothing is left to "
            f"train: {reason}",
            stacklevel=3,
        )

    def _warn_of_tied(self, chosen: Iterable[int]) -> None:
        """Warn of groups whose parameters are all tied to those of later groups."""
        owned = self._layer_groups.parameters
        modules = [module for index in chosen for module in self._layer_groups.modules[index]]
        held = [p for module in modules for p in module.parameters(recurse=False)]
        if held and not any(owned[index] for index in chosen):
            owners = [i for i, group in enumerate(owned) if {*map(id, group)} & {*map(id, held)}]
            warnings.warn(
                f"No parameter has changed: those of {self._names(chosen)} are tied and belong "
                f"to {self._names(owners)}{tied_as_text(self.model, held)}. By name, they are "
                "frozen and unfrozen in each group",
                stacklevel=3,
            )

    def _both_indices(self, index: int) -> tuple[int, int]:
        return index, index - self.num_groups

    def _range(self, from_index: int, to_index: int) -> range:
        first, last = sorted((self._check_index(from_index), self._check_index(to_index)))
        return range(first, last + 1)

    def _check_index(self, index: int) -> int:
        if not -self.num_groups <= index < self.num_groups:
            raise IndexError(
                f"Layer group {index} doesn't exist: {type(self.model).__name__} has "
                f"{self.num_groups}, {-self.num_groups} to {self.num_groups - 1}: "
                + ", ".join(self.group_names)
            )
        return index % self.num_groups


def _unfreeze(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Unfreeze parameters; returns those that were frozen.

    Integers, such as quantised weights, have no gradients and stay as they are.
    """
    frozen = [
        p for p in parameters if not p.requires_grad and (p.is_floating_point() or p.is_complex())
    ]
    for parameter in frozen:
        parameter.requires_grad_(True)
    return frozen
