"""Checks of what plugins provide: each right after the plugin's own call.

So an error is raised within the hook of one plugin, and its note names both. The checks run for
plugins only; what the Trainer's own defaults or the methods of a subclass return is checked where
it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from pa_core.control import UpdateResult
from pa_core.data.ready import check_loader
from pa_core.engine.optimizers import as_one
from pa_core.errors import shown
from pa_core.loop.arguments import check_model_and_optimizer, check_optimizer, check_scheduler
from pa_core.loop.outputs import check_batch_output, check_differentiable, check_loss

if TYPE_CHECKING:
    from pa_core.plugins.implementations import Check


def _check_accelerator(value: Any, arguments: Mapping[str, Any]) -> None:
    if not isinstance(value, Accelerator):
        raise TypeError(
            f"create_accelerator returned {shown(value)}; it must return an accelerate.Accelerator"
        )


def _check_optimizer(value: Any, arguments: Mapping[str, Any]) -> None:
    optimizer = as_one(value)
    check_optimizer(optimizer, "create_optimizer returned")
    check_model_and_optimizer(arguments["trainer"].model, optimizer)


def _check_train_loader(value: Any, arguments: Mapping[str, Any]) -> None:
    check_loader(value, "create_train_dataloader returned")


def _check_eval_loader(value: Any, arguments: Mapping[str, Any]) -> None:
    check_loader(value, "create_eval_dataloader returned")


def _check_scheduler(value: Any, arguments: Mapping[str, Any]) -> None:
    optimizers = arguments["trainer"].optimizers
    check_scheduler(value, optimizers, "create_scheduler returned", is_adapted=True)


def _check_train_output(value: Any, arguments: Mapping[str, Any]) -> None:
    output = check_batch_output(value, "calculate_train_batch_loss")
    loss, trainer = output["loss"], arguments["trainer"]
    check_differentiable(loss, trainer, "calculate_train_batch_loss returned")


def _check_eval_output(value: Any, arguments: Mapping[str, Any]) -> None:
    check_batch_output(value, "calculate_eval_batch_loss", is_evaluation=True)


def _check_predictions(value: Any, arguments: Mapping[str, Any]) -> None:
    is_scalar = isinstance(value, Tensor) and not value.ndim
    if is_scalar or not isinstance(value, Tensor | np.ndarray | Mapping | list | tuple):
        raise TypeError(
            f"calculate_predictions returned {shown(value)}; it must return tensors whose first "
            "dimension is the samples, in tuples, lists or dicts if there are several"
        )


def _check_replaced_loss(value: Any, arguments: Mapping[str, Any]) -> None:
    origin = "on_backward_start left"
    loss = check_loss(arguments["batch_output"].get("loss"), origin)
    check_differentiable(loss, arguments["trainer"], origin)


def _check_update_result(value: Any, arguments: Mapping[str, Any]) -> None:
    if not isinstance(value, UpdateResult):
        raise TypeError(
            f"run_update returned {shown(value)}; a replacement or wrapper must return the "
            "UpdateResult of trainer.apply_update()"
        )


def _check_eval_models(value: Any, arguments: Mapping[str, Any]) -> None:
    for name, model in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"register_eval_models returned {shown(model)} as {name!r}; each must be an "
                "nn.Module"
            )


CHECKS: Mapping[str, Check] = {
    "create_accelerator": _check_accelerator,
    "create_optimizer": _check_optimizer,
    "create_train_dataloader": _check_train_loader,
    "create_eval_dataloader": _check_eval_loader,
    "create_scheduler": _check_scheduler,
    "calculate_train_batch_loss": _check_train_output,
    "calculate_eval_batch_loss": _check_eval_output,
    "calculate_predictions": _check_predictions,
    "on_backward_start": _check_replaced_loss,
    "run_update": _check_update_result,
    "register_eval_models": _check_eval_models,
}
"""By hook: raises an error for a wrong value, given what was returned and the hook's arguments.

A provider that returns None leaves the value to the next one, and isn't checked.
"""
