"""Checks of what loss methods and updates return: an error says what would be right."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex

from torch import Tensor

from pa_core.control import UpdateResult
from pa_core.errors import shown

if TYPE_CHECKING:
    from pa_core.plugins.manager import PluginManager
    from pa_core.trainer import Trainer

_REQUIRED = ("loss", "batch_size")
_KEYS = frozenset(_REQUIRED)
_NUMBERS = (int, float, Tensor)


def check_batch_output(output: Any, method: str, *, is_evaluation: bool = False) -> Any:
    """Check that `method` returned what the loop needs.

    Args:
        output: what the method returned.
        method: its name.
        is_evaluation: whether the loss may have one value for each sample, or several; there is no
            gradient to calculate then, and their mean is the batch's.

    Returns:
        The output, with a loss of shape ``()`` even if it had a single element in another shape, or
        a value for each sample.

    Raises:
        ValueError: naming the missing keys.
        TypeError: if it isn't a mapping, its loss isn't a scalar tensor, or its numbers of samples
            or items aren't numbers.
    """
    if (
        type(output) is dict
        and output.keys() >= _KEYS
        and isinstance(loss := output["loss"], Tensor)
        and loss.ndim == 0
        and type(size := output["batch_size"]) is int
        and size >= 0
        and type(output.get("num_items_in_batch", 0)) in _NUMBERS
    ):
        return output
    if not isinstance(output, Mapping):
        raise TypeError(
            f"{method} returned {shown(output)}, not a dict with the keys {', '.join(_REQUIRED)}"
        )
    missing = [key for key in _REQUIRED if key not in output]
    if missing:
        raise ValueError(
            f"{method} returned a dict without {', '.join(missing)}; it has "
            f"{', '.join(map(str, output)) or 'no keys'} and needs {', '.join(_REQUIRED)}"
        )
    _check_size(output["batch_size"], f"{method} returned")
    items = output.get("num_items_in_batch", 0)
    if isinstance(items, str) or not isinstance(items, SupportsFloat):
        raise TypeError(
            f"{method} returned {shown(items)} as num_items_in_batch; it must be the number of "
            "items, such as labelled tokens, that the loss is the mean of"
        )
    loss = output["loss"]
    if is_evaluation and _is_of_samples(loss, output):
        loss = loss.mean()
    loss = check_loss(loss, f"{method} returned")
    if loss is not output["loss"]:
        output = output if isinstance(output, MutableMapping) else dict(output)
        output["loss"] = loss
    return output


def _check_size(size: Any, origin: str) -> None:
    is_whole = isinstance(size, SupportsIndex) and not isinstance(size, bool)
    if not is_whole or (not isinstance(size, Tensor) and size.__index__() < 0):
        raise TypeError(
            f"{origin} {shown(size)} as batch_size; it must be the number of samples of the batch"
        )


def _is_of_samples(loss: Any, output: Mapping[str, Any]) -> bool:
    """Whether a loss has values for each sample, so that its mean is that over the samples."""
    return (
        isinstance(loss, Tensor)
        and loss.ndim > 0
        and "num_items_in_batch" not in output
        and len(loss) == int(output["batch_size"])
    )


def check_loss(loss: Any, origin: str) -> Tensor:
    """Check that a loss is a scalar; one of shape ``(1,)`` becomes one of shape ``()``.

    Args:
        loss: the loss.
        origin: the start of the error's sentence, such as ``"My.method returned"``.

    Raises:
        TypeError: if it isn't a tensor with one element.
    """
    if isinstance(loss, Tensor) and loss.ndim == 0:
        return loss
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(())
    shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else None
    raise TypeError(
        f"{origin} {shape or type(loss).__name__} as the loss; it must be a scalar tensor "
        "(shape ()), such as the mean over the batch"
    )


def check_update(result: Any, plugins: PluginManager, *, is_applied: bool) -> None:
    """Check what the hook `run_update` did and returned.

    Raises:
        TypeError: if it isn't an `UpdateResult`.
        RuntimeError: if the update was neither made nor skipped by `Trainer.apply_update`.
    """
    if is_applied and isinstance(result, UpdateResult):
        return
    found = [one.name for one in plugins.implementations("run_update") if not one.is_default]
    hook = f"The hook run_update of {' or '.join(found)} returned"
    if not isinstance(result, UpdateResult):
        raise TypeError(
            f"{hook} {result!r}; a replacement or wrapper must return the UpdateResult of "
            "trainer.apply_update()"
        )
    raise RuntimeError(f"{hook} without calling trainer.apply_update()")


def check_differentiable(loss: Tensor, trainer: Trainer, origin: str) -> None:
    """Check that a loss can be differentiated, unless a subclass makes the backward pass itself.

    Args:
        loss: of a micro-batch.
        trainer: the trainer.
        origin: the start of the error's sentence, such as ``"on_backward_start left"``.

    Raises:
        ValueError: with what may have cut the graph.
    """
    if loss.requires_grad:
        return
    if len([kind for kind in type(trainer).__mro__ if "backward_step" in vars(kind)]) > 1:
        return
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise ValueError(
            "No parameter of the model requires a gradient, so there is nothing to train: unfreeze "
            "some with requires_grad_(True)"
        )
    raise ValueError(
        f"{origin} a loss without a gradient graph, so nothing can be learned from it: calculate "
        "it from the model's outputs with differentiable operations. detach(), item(), argmax(), "
        "torch.tensor(), NumPy and torch.no_grad() cut the graph"
    )
