"""The default loss, of a batch that is a pair of inputs and targets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

from torch import Tensor

from pa_core.errors import listed, shown
from pa_core.loop.loss_items import is_sum, items_of_mean
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
    except IndexError as error:
        if isinstance(targets, Tensor) and targets.ndim == 0:
            error.add_note(
                "The targets are a scalar: this is a sample rather than a batch, as from a "
                "DataLoader with batch_size=None. Give it a batch_size"
            )
        raise
    if part == "train":
        loss = check_loss(loss, "loss_func returned")
        check_differentiable(loss, trainer, "loss_func returned")
    if is_sum(loss_func):
        _report_sum(trainer, part)
    output = {"loss": loss, "model_outputs": outputs, "batch_size": size}
    items = items_of_mean(loss_func, targets)
    if isinstance(items, int):
        items = _single_labels(trainer, items, size, part)
    if items is not None:
        output["num_items_in_batch"] = items
    return output


_reported_sums: WeakSet[Trainer] = WeakSet()


def _report_sum(trainer: Trainer, part: Part) -> None:
    """Report a loss that is a sum over the batch, where the loop takes it for a mean.

    Raises:
        ValueError: if a sum is trained on in several micro-batches or processes, whose gradients
            are averaged.
    """
    kind = type(trainer.loss_func).__name__
    text = f"The loss_func ({kind}) is a sum over the batch (reduction='sum'), not a mean: "
    advice = 'use reduction="mean", with a learning rate that fits it'
    if part == "train" and (_accumulates(trainer) or trainer.num_processes > 1):
        raise ValueError(
            f"{text}averaged over micro-batches and processes, its gradient would depend on their "
            f"number. {advice.capitalize()}"
        )
    if trainer not in _reported_sums and trainer.is_main_process:
        _reported_sums.add(trainer)
        warnings.warn(f"{text}recorded losses depend on the batch size; {advice}", stacklevel=2)


def _single_labels(trainer: Trainer, items: int, size: int, part: Part) -> int | None:
    """How many samples of a batch have a label, if the loop has to know it.

    It need not where all have one. Micro-batches of one update all say how many they have, or none
    does.

    Raises:
        ValueError: in training on several processes, which count labels only where they are known
            to be ignored.
    """
    if items == size and (part == "eval" or not _accumulates(trainer)):
        return None
    if part == "eval" or (trainer.num_processes == 1 and trainer.sharded_by is None):
        return items
    if items == size:
        return None
    raise ValueError(
        f"{size - items} of {size} samples of a batch have the label -100, which the loss ignores. "
        "Over several processes, they are counted only for another ignore_index: give them "
        "another label, such as -1, and pass nn.CrossEntropyLoss(ignore_index=-1)"
    )


def _accumulates(trainer: Trainer) -> bool:
    config = trainer.run_config
    return config is not None and config.gradient_accumulation_steps > 1


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
