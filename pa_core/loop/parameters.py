"""Notice parameters that were unfrozen or replaced within a run, and that nothing would train."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from pa_core.engine.wrappers import named_parameters
from pa_core.errors import listed

if TYPE_CHECKING:
    from torch import nn

    from pa_core.trainer import Trainer


class ParameterWatch:
    """Compares a model's parameters with the optimizer's whenever they have changed.

    Args:
        model: the model at the start of a run, without wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known = dict(named_parameters(model))
        self._trainable = {name for name, p in self._known.items() if p.requires_grad}

    def check(self, trainer: Trainer) -> None:
        """Warn of parameters that need gradients since the last check, but have no optimizer.

        Raises:
            RuntimeError: if the optimizer holds parameters that are no longer in the model.
        """
        now = dict(named_parameters(trainer.get_model(keep_torch_compile=False)))
        trainable = {name for name, p in now.items() if p.requires_grad}
        known, was_trainable, self._known, self._trainable = (
            *(self._known, self._trainable),
            *(now, trainable),
        )
        replaced = [name for name, p in known.items() if now.get(name) is not p]
        if (trainable == was_trainable and not replaced) or not hasattr(
            trainer.optimizer, "param_groups"
        ):
            return
        groups = trainer._engine.parameter_groups(trainer.optimizer)
        held = {id(parameter) for group in groups for parameter in group}
        present = {id(parameter) for parameter in now.values()}
        lost = [name for name in replaced if id(known[name]) in held - present]
        if lost:
            raise RuntimeError(
                f"{listed(lost)} of {type(trainer.get_model(False)).__name__} were replaced "
                "within the run, but the optimizer still updates the old parameters, so nothing "
                "trains the new ones: replace them in optimizer.param_groups as well, or replace "
                "modules before the Trainer is built"
            )
        new = [
            name
            for name, parameter in now.items()
            if name in trainable
            and id(parameter) not in held
            and (name not in was_trainable or name in replaced)
        ]
        if new and trainer.is_main_process:
            warnings.warn(
                f"{listed(new)} need gradients now, but the optimizer doesn't hold them, so "
                "nothing trains them: create it from all parameters, frozen ones included, or use "
                "optimizer.add_param_group",
                stacklevel=2,
            )
