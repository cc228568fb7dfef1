"""Checkpoint files: the model, and optionally optimizer and scheduler, in one portable file."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pa_core.checkpoint.atomic_io import save_file
from pa_core.checkpoint.lock import check_held
from pa_core.checkpoint.storage import MANIFEST
from pa_core.engine.loss_parameters import find_loss, trained_loss
from pa_core.engine.optimizer_types import restore_types
from pa_core.engine.subclasses import find_class
from pa_core.errors import CheckpointError
from pa_core.settings.paths import local_path

if TYPE_CHECKING:
    from torch import nn

    from pa_core.trainer import Trainer


def save_checkpoint(
    trainer: Trainer,
    save_path: str | Path,
    checkpoint_kwargs: Mapping[str, Any] | None,
    save_optimizer: bool,
    save_scheduler: bool,
    save_per_node: bool,
    model: nn.Module,
) -> None:
    """Write a checkpoint file; see `Trainer.save_checkpoint`."""
    trainer._engine.wait()
    content = {"model_state_dict": trainer._engine.weights(model)}
    sharding = trainer._engine.sharding
    if save_optimizer and sharding is not None:
        warnings.warn(
            f"The optimizer is {sharding}, so {save_path} is saved without it, as with "
            "save_optimizer=False; save_training_state saves all of its shards",
            stacklevel=3,
        )
    elif save_optimizer and trainer.optimizer is not None:
        content["optimizer_state_dict"] = trainer.optimizer.state_dict()
    loss = trained_loss(trainer)
    if loss is not None:
        content["loss_func_state_dict"] = loss.state_dict()
    if save_scheduler and trainer.scheduler is not None:
        content["scheduler_state_dict"] = trainer.scheduler.state_dict()
    content.update(_plain(checkpoint_kwargs or {}))

    def write() -> None:
        accelerator = trainer._accelerator
        if accelerator.is_local_main_process if save_per_node else accelerator.is_main_process:
            check_held(Path(save_path))
            save_file(save_path, lambda path: torch.save(content, path))

    trainer._engine.run_on_all(write)


def load_checkpoint(
    trainer: Trainer, checkpoint_path: str | Path, load_optimizer: bool, load_scheduler: bool
) -> dict[str, Any]:
    """Load a checkpoint file without executing anything in it; see `Trainer.load_checkpoint`."""
    engine = trainer._engine
    engine.wait()
    content = engine.run_on_all(lambda: read_checkpoint(checkpoint_path))
    wanted = (
        ("optimizer", trainer.optimizer, load_optimizer),
        ("scheduler", trainer.scheduler, load_scheduler),
    )
    present = [
        (name, target) for name, target, load in wanted if load and f"{name}_state_dict" in content
    ]
    for name, target in present:
        if target is None:
            raise ValueError(
                f"{checkpoint_path} contains the state of the {name}, but the trainer has none. "
                f"Give it one, or pass load_{name}=False"
            )
    saved_loss = content.get("loss_func_state_dict")
    loss = None if saved_loss is None else find_loss(trainer, saved_loss)
    if saved_loss is not None and loss is None:
        warnings.warn(
            f"{checkpoint_path} contains parameters of another loss function, which are not loaded",
            stacklevel=3,
        )
    states = [(target, content[f"{name}_state_dict"]) for name, target in present]
    keeps_types = not engine.changed_types(trainer.model, content["model_state_dict"])
    _rehearse(trainer, states)
    _load_weights(trainer, content["model_state_dict"])
    if loss is not None and saved_loss is not None:
        loss.load_state_dict(saved_loss)
    for target, state in states:
        target.load_state_dict(state)
        if target is trainer.optimizer and keeps_types:
            restore_types(target, state)
    return content


def _rehearse(trainer: Trainer, states: Sequence[tuple[Any, Any]]) -> None:
    """Load the states of optimizer and scheduler, which may refuse them, and undo it.

    So the weights, which are loaded before them, are loaded only if all the rest will be.
    """
    optimizers = [one for one in trainer.optimizers if not getattr(one, "is_flat", False)]
    if len(optimizers) < len(trainer.optimizers):
        return  # DeepSpeed's changes its tensors in place
    kept = [
        (one, dict(vars(one)), one.param_groups, [dict(group) for group in one.param_groups])
        for one in optimizers
    ]
    scheduler = next((one for one, _ in states if one is trainer.scheduler), None)
    before = None if scheduler is None else scheduler.state_dict()
    try:
        for target, state in states:
            target.load_state_dict(state)
    finally:
        if scheduler is not None:
            scheduler.load_state_dict(before)
        for one, attributes, groups, values in kept:
            vars(one).clear()
            vars(one).update(attributes)
            for group, value in zip(groups, values, strict=True):
                group.clear()
                group.update(value)


def _load_weights(trainer: Trainer, weights: Mapping[str, Any]) -> None:
    """Load the weights, or none of them: PyTorch raises after it has loaded those that fit."""
    engine, model = trainer._engine, trainer.model
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    present = {name: shape or () for name, shape in engine.shapes(model).items()}
    kept = None if shapes == present else deepcopy(engine.weights(model))
    try:
        engine.load_weights(model, weights)
    except Exception:
        if kept is not None:
            engine.load_weights(model, kept)
        raise


def read_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """Read a checkpoint file without executing anything in it.

    Args:
        path: the file.
        **options: of `torch.load`; by default, tensors are read into host memory.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is something else.
    """
    path = local_path(path)
    if (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} is a training state, not a checkpoint file: use load_training_state, or "
            "resume_from to continue its run"
        )
    try:
        content = _load(path, {"map_location": "cpu", **options})
    except (FileNotFoundError, PermissionError, CheckpointError):
        raise
    except Exception as error:  # PyTorch raises many kinds, with advice to disable its safeguards
        raise CheckpointError(
            f"{path} isn't a checkpoint file, as save_checkpoint writes them, or it is damaged"
        ) from error
    if not isinstance(content, dict) or "model_state_dict" not in content:
        found = ", ".join(map(str, list(content)[:4])) if isinstance(content, dict) else ""
        raise CheckpointError(
            f"{path} isn't a checkpoint file, as save_checkpoint writes them: it has no "
            f"'model_state_dict', but {found or type(content).__name__}"
        )
    return content


def _load(path: Path, options: Mapping[str, Any]) -> Any:
    """Load a file, in which tensors of subclasses that are loaded may be rebuilt."""
    try:
        return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        found = {name: cls for name in names if (cls := find_class(name)) is not None}
        if not found:
            raise
        if missing := [name for name in names if name not in found]:
            raise CheckpointError(
                f"{path} holds objects of {', '.join(missing)}, which isn't the class of a tensor "
                "or isn't loaded: import the module that defines it first"
            ) from None
        with torch.serialization.safe_globals([*found.values()]):
            return torch.load(path, weights_only=True, **options)


def _plain(value: Any) -> Any:
    """Turn NumPy scalars and arrays into numbers and tensors, which `weights_only` can load."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if type(value).__module__ == "numpy":
        return value.item() if value.ndim == 0 else torch.from_numpy(value)
    return value
