"""The default loss, of a batch that is a pair of inputs and targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from pa_core.errors import listed, shown
from pa_core.loop.loss_items import items_of_mean
from pa_core.loop.outputs import check_differentiable, check_loss
from pa_core.plugins.discovery import find_claims
from pa_core.plugins.distributions import how_to_install

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

Part = Literal["train", "eval"]


def loss_of_pair(trainer: Trainer, batch: Any, part: Part) -> dict[str, Any]:
    """Calculate ``loss_func(model(inputs), targets)`` of a batch, as the loop needs it.

    Raises:
        TypeError: if the batch isn't a pair, there is no loss function, or what it returns isn't a
            loss; it says what to do.
        ValueError: if the loss can't be differentiated in training.
    """
    loss_func = trainer.loss_func
    if loss_func is None or not _is_pair(batch):
        raise TypeError(f"{_why_unknown(batch, part)}. {_what_to_do(batch, part)}")
    inputs, targets = batch[0], batch[1]
    try:
        outputs = trainer.model(inputs)
        loss = loss_func(outputs, targets)
        size = targets.size(0)
    except (TypeError, AttributeError) as error:
        error.add_note(
            f"The default loss is loss_func(model(inputs), targets), here with {_shown(inputs)} as "
            f"inputs and {_shown(targets)} as targets, whose first dimension is the batch size. "
            f"{_override(part)}"
        )
        raise
    if part == "train":
        loss = check_loss(loss, "loss_func returned")
        check_differentiable(loss, trainer, "loss_func returned")
    output = {"loss": loss, "model_outputs": outputs, "batch_size": size}
    items = items_of_mean(loss_func, targets)
    if items is not None:
        output["num_items_in_batch"] = items
    return output


def _is_pair(batch: Any) -> bool:
    if isinstance(batch, list | tuple):
        return len(batch) == 2
    # A custom class may have more entries, and is asked for these two only.
    return hasattr(batch, "__getitem__") and not isinstance(batch, Mapping | Tensor | str | bytes)


def _why_unknown(batch: Any, part: Part) -> str:
    if _is_pair(batch):
        return "No loss function (loss_func=None), and no plugin calculates the loss"
    batches = "A training batch" if part == "train" else "An evaluation batch"
    if isinstance(batch, Mapping):
        found = f"is a dict with the keys {listed([str(key) for key in batch])}"
    elif isinstance(batch, list | tuple):
        found = f"has {len(batch)} {'entry' if len(batch) == 1 else 'entries'}"
    else:
        found = f"is {_shown(batch)}"
    return f"{batches} {found}, and the default loss is that of a pair (inputs, targets)"


def _what_to_do(batch: Any, part: Part) -> str:
    advice = []
    if isinstance(batch, Mapping):
        advice.append('For a model of transformers, enable its plugin: plugins = ["transformers"].')
        if "transformers" not in find_claims():
            advice[0] += how_to_install("transformers") + "."
    elif _is_pair(batch):
        advice.append("Give the Trainer a loss_func.")
    else:
        advice.append("Let the dataset or collate_fn return pairs.")
    return " ".join([*advice, _override(part)])


def _override(part: Part) -> str:
    also = "" if part == "eval" else ", and calculate_eval_batch_loss for evaluation"
    return (
        f"For any other loss, override calculate_{part}_batch_loss in a subclass of Trainer or in "
        f"a plugin{also}"
    )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({str(value.dtype).removeprefix('torch.')})"
    if isinstance(value, list | tuple):
        return f"{shown(value)} of {len(value)}"
    return shown(value)
