"""Parameters of the loss function that the optimizer trains beside those of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from pa_core.engine.wrappers import wrapped_module

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pa_core.trainer import Trainer


def trained_loss(trainer: Trainer) -> nn.Module | None:
    """The loss function, if the optimizer holds parameters that only the loss function has.

    It is returned without `torch.compile`'s wrapper.
    """
    return wrapped_module(trainer.loss_func) if _trained(trainer) else None


def _trained(trainer: Trainer) -> tuple[nn.Parameter, ...]:
    loss, model = trainer.loss_func, trainer.get_model()
    if not isinstance(loss, nn.Module) or model is None:
        return ()
    others = {id(parameter) for parameter in model.parameters()}
    held = {
        id(parameter)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return tuple(p for p in loss.parameters() if id(p) in held - others)


def check_loss_parameters(trainer: Trainer) -> tuple[nn.Parameter, ...]:
    """The parameters of the loss function that a run trains; on one process only.

    Raises:
        ValueError: if there are any, and several processes or an engine that shards train them.
    """
    found = _trained(trainer)
    if found and (trainer.num_processes > 1 or trainer.sharded_by is not None):
        name = type(trainer.loss_func).__name__
        raise ValueError(
            f"The optimizer holds parameters of the loss function {name}, which nothing reduces "
            "over several processes: put it into one module with the model, and call it there"
        )
    return found


def find_loss(trainer: Trainer, saved: Mapping[str, Any]) -> nn.Module | None:
    """The loss function into which a state can be loaded; None if it was saved from another one."""
    if not isinstance(trainer.loss_func, nn.Module):
        return None
    loss = wrapped_module(trainer.loss_func)
    shapes = [
        {name: getattr(value, "shape", None) for name, value in state.items()}
        for state in (saved, loss.state_dict())
    ]
    return loss if shapes[0] == shapes[1] else None
