"""Batch norms in fine-tuning: frozen for good, or synchronised over processes."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pa_core import TrainerCallback
from pa_models.selection import select

if TYPE_CHECKING:
    from pa_core import Trainer

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm, of torch's or derived from one."""
    return isinstance(module, _BatchNorm)


# -- Modes that stay ------------------------------------------------------------------------------
#
# `model.train()` calls each module's `train`. A module with one of its own in its `__dict__` can
# stay in evaluation mode. It is a `partial`, which is copied with the module (a moving average's
# copy, say) and pickled with it, where a closure would go on meaning the first module.


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    module.training = False
    for child in module.children():
        child.train(mode)
    return module


def _stay_frozen(module: nn.Module, mode: bool = True) -> nn.Module:
    module.training = False
    return module


def hold_in_eval(module: nn.Module) -> None:
    """Put this module, not its children, in evaluation mode, where `train()` leaves it."""
    module.__dict__["train"] = partial(_stay_in_eval, module)
    module.training = False


def release_from_eval(module: nn.Module) -> None:
    """Let `train()` reach a module again that `hold_in_eval` has held."""
    if _train_of(module) is _stay_in_eval:
        del module.__dict__["train"]


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether `freeze_batch_norm` has frozen this module."""
    return _train_of(module) is _stay_frozen


def _train_of(module: nn.Module) -> Any:
    return getattr(module.__dict__.get("train"), "func", None)


# -- Frozen batch norms ---------------------------------------------------------------------------


def freeze_batch_norm(model: nn.Module, *patterns: str) -> list[str]:
    """Freeze batch norms: weight, bias and running statistics stay as they are.

    They stay so through ``model.train()``, and through a `ModelFreezer` and gradual unfreezing,
    until `unfreeze_batch_norm`. The modules remain the same, so an optimizer and checkpoints fit as
    before.

    Args:
        model: the model; changed in place.
        *patterns: names of modules, such as ``"backbone"`` or ``"layer[12].*"``; all by default.

    Returns:
        The names of the batch norms.

    Raises:
        ValueError: for a pattern that matches nothing, with the nearest name.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> freeze_batch_norm(model)
    ['1']
    >>> _ = model.train()(model[0].weight)
    >>> model[1].running_mean
    tensor([0., 0.])
    """
    norms = _batch_norms(model, patterns)
    for module in norms.values():
        module.__dict__["train"] = partial(_stay_frozen, module)
        module.training = False
        module.requires_grad_(False)
    return list(norms)


def unfreeze_batch_norm(model: nn.Module, *patterns: str) -> list[str]:
    """Undo `freeze_batch_norm`; the batch norms take the mode of the whole model.

    Args:
        model: the model; changed in place.
        *patterns: names of modules; all by default.

    Returns:
        The names of the batch norms that were frozen.
    """
    frozen = {
        name: module
        for name, module in _batch_norms(model, patterns).items()
        if is_frozen_batch_norm(module)
    }
    for module in frozen.values():
        del module.__dict__["train"]
        module.requires_grad_(True)
        module.train(model.training)
    return list(frozen)


def _batch_norms(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    modules = select(model, patterns).modules if patterns else dict(model.named_modules())
    return {name: module for name, module in modules.items() if is_batch_norm(module)}


# -- Batch norms over all processes ---------------------------------------------------------------


def convert_sync_batch_norm(model: nn.Module) -> nn.Module:
    """Replace batch norms by ones that take their statistics over all processes' batches.

    Parameters stay the same objects, so an optimizer fits as before. Frozen batch norms are left
    alone, as they take no statistics. timm's, which end in an activation, are converted by timm:
    torch's own function would drop the activation.

    Args:
        model: the model; changed in place, but for a model that is itself a batch norm.

    Returns:
        The model.
    """
    if is_batch_norm(model):
        return _synchronised(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if is_batch_norm(child) and not is_frozen_batch_norm(child):
                setattr(parent, name, _synchronised(child))
    return model


def _synchronised(norm: nn.Module) -> nn.Module:
    if isinstance(norm, nn.SyncBatchNorm):
        return norm
    if type(norm) in _PLAIN:
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    elif type(norm).__module__.startswith("timm."):
        from timm.layers.norm_act import convert_sync_batchnorm

        converted = convert_sync_batchnorm(norm)
    else:
        warnings.warn(
            f"{type(norm).__name__} isn't converted to a SyncBatchNorm: what else it does would "
            "be lost. Its statistics remain those of each process",
            stacklevel=2,
        )
        return norm
    if "train" in norm.__dict__:  # held in evaluation mode by a freezer
        hold_in_eval(converted)
    return converted


class ConvertSyncBatchNormCallback(TrainerCallback):
    """Converts the model's batch norms to `torch.nn.SyncBatchNorm` where there are many processes.

    This happens as the trainer is built, before the model is wrapped. torch has them for
    accelerators only: on CPUs the model stays as it is, with a warning.
    """

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Convert the model."""
        if trainer._engine.num_processes == 1:
            return
        if trainer.device.type == "cpu":
            warnings.warn(
                "torch synchronises batch norms on accelerators only: on CPUs each process goes on "
                "with the statistics of its own batches",
                stacklevel=2,
            )
            return
        trainer.model = convert_sync_batch_norm(trainer.model)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """See that it was converted."""
        if trainer._engine.num_processes == 1 or trainer.device.type == "cpu":
            return
        model = trainer.get_model(keep_torch_compile=False)
        if any(type(m) in _PLAIN and not is_frozen_batch_norm(m) for m in model.modules()):
            raise RuntimeError(
                "ConvertSyncBatchNormCallback converts the model as the trainer is built: pass it "
                "to Trainer(callbacks=…) or enable the plugin sync_batch_norm, rather than adding "
                "it or replacing the model later"
            )
