"""Batch norms in fine-tuning: permanently frozen, or synchronised over processes."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pa_core import TrainerCallback
from pa_core.plugin import named_modules, wrapped_module
from pa_models.selection import select

if TYPE_CHECKING:
    from pa_core import Trainer

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is one of torch's batch norms, or a subclass of one."""
    return isinstance(module, _BatchNorm)


# -- Persistent modes -----------------------------------------------------------------------------
#
# `model.train()` calls `train` of each module. A module that overrides it in its `__dict__` can
# stay in evaluation mode. The override is a `partial`, which is copied and pickled with the module
# (as in the copy of a moving average), whereas a closure would keep referring to the first module.


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    module.training = False
    for child in module.children():
        child.train(mode)
    return module


def _stay_frozen(module: nn.Module, mode: bool = True) -> nn.Module:
    module.training = False
    return module


def hold_in_eval(module: nn.Module) -> None:
    """Put this module, not its children, in evaluation mode, and keep it there in `train()`."""
    module.__dict__["train"] = partial(_stay_in_eval, module)
    module.training = False


def release_from_eval(module: nn.Module) -> None:
    """Undo `hold_in_eval`, so that `train()` changes the mode again."""
    if _train_of(module) is _stay_in_eval:
        del module.__dict__["train"]


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether `freeze_batch_norm` has frozen this module."""
    return _train_of(module) is _stay_frozen


def _train_of(module: nn.Module) -> Any:
    return getattr(module.__dict__.get("train"), "func", None)


# -- Frozen batch norms ---------------------------------------------------------------------------


def freeze_batch_norm(model: nn.Module, *patterns: str) -> list[str]:
    """Freeze batch norms: weight, bias and running statistics keep their values.

    They stay frozen in ``model.train()``, and despite a `ModelFreezer` or gradual unfreezing, until
    `unfreeze_batch_norm`. The modules aren't replaced, so optimizers and checkpoints still fit.

    Args:
        model: the model; changed in place.
        *patterns: names of modules, such as ``"backbone"`` or ``"layer[12].*"``; default all.

    Returns:
        The names of the batch norms.

    Raises:
        ValueError: for a pattern that matches nothing, with the closest name.

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
    """Undo `freeze_batch_norm`; the batch norms get the mode of the model.

    Args:
        model: the model; changed in place.
        *patterns: names of modules; default all.

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
    modules = select(model, patterns).modules if patterns else dict(named_modules(model))
    return {name: module for name, module in modules.items() if is_batch_norm(module)}


# -- Batch norms over all processes ---------------------------------------------------------------


def convert_sync_batch_norm(model: nn.Module) -> nn.Module:
    """Replace batch norms by `torch.nn.SyncBatchNorm`, with statistics over all processes.

    Parameters remain the same objects, so an optimizer still fits. Frozen batch norms aren't
    converted, since they compute no statistics. timm's batch norms with an activation are converted
    by timm, because torch's function would drop the activation.

    Args:
        model: the model; changed in place, unless it is itself a batch norm.

    Returns:
        The model.

    Raises:
        ValueError: for a batch norm that is itself compiled, as its code can't be replaced.
    """
    if is_batch_norm(model):
        return _synchronised(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if is_batch_norm(child) and not is_frozen_batch_norm(child):
                if wrapped_module(parent) is child:
                    raise ValueError(
                        f"A compiled {type(child).__name__} can't be replaced by a SyncBatchNorm: "
                        "convert the model first, and compile it then"
                    )
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
            f"{type(norm).__name__} isn't converted to a SyncBatchNorm, since that would drop its "
            "other behaviour: its statistics stay separate on each process",
            stacklevel=2,
        )
        return norm
    if "train" in norm.__dict__:  # a freezer keeps it in evaluation mode
        hold_in_eval(converted)
    return converted


class ConvertSyncBatchNormCallback(TrainerCallback):
    """Converts the model's batch norms to `torch.nn.SyncBatchNorm` if there are several processes.

    It does so when the trainer is built, before the model is wrapped. torch supports these on
    accelerators only: on CPUs the model stays unchanged, with a warning.
    """

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Convert the model."""
        if trainer.num_processes == 1:
            return
        if trainer.device.type == "cpu":
            warnings.warn(
                "torch synchronises batch norms on accelerators only: on CPUs each process uses "
                "the statistics of the batches it gets",
                stacklevel=2,
            )
            return
        trainer.model = convert_sync_batch_norm(trainer.model)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that the model was converted."""
        if trainer.num_processes == 1 or trainer.device.type == "cpu":
            return
        model = trainer.get_model(keep_torch_compile=False)
        if any(type(m) in _PLAIN and not is_frozen_batch_norm(m) for m in model.modules()):
            raise RuntimeError(
                "The batch norms aren't synchronised: ConvertSyncBatchNormCallback converts the "
                "model when the trainer is built. Pass it to Trainer(callbacks=…) or enable the "
                "plugin sync_batch_norm; don't add it, or replace the model, later"
            )
