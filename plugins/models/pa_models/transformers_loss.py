"""Losses and predictions of models that calculate their own loss, as transformers' models do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pa_core import Trainer

IGNORED = -100
"""The label of tokens that count for nothing, in transformers as in ``cross_entropy``."""


def calculate_batch_loss(
    trainer: Trainer, batch: Mapping[str, Any], label_smoothing: float = 0.0
) -> dict[str, Any]:
    """Call the model with the batch's entries as arguments, and take the loss that it returns.

    Args:
        trainer: has the model.
        batch: its entries are the model's arguments.
        label_smoothing: the share of the target that is spread over all classes.

    Returns:
        ``loss`` (shape ``()``), ``model_outputs`` (what the model returns), ``batch_size``, and
        ``num_items_in_batch`` (shape ``()``, on the device) where the loss is a mean over tokens.

    Raises:
        ValueError: if the model returned no loss, or the batch is no batch of tensors.
    """
    _check_batch(batch)
    outputs = trainer.model(**batch)
    loss = _get(outputs, "loss")
    if loss is None:
        raise ValueError(
            f"{type(trainer.get_model()).__name__} returned no loss for a batch with "
            f"{', '.join(map(repr, batch))}. Models are expected to calculate it from 'labels': "
            "add them in the dataset or the collate function, or override the trainer's "
            "calculate_train_batch_loss"
        )
    if label_smoothing:
        loss = loss + label_smoothing * _uniform_excess(trainer, outputs, batch)
    result = {"loss": loss, "model_outputs": outputs, "batch_size": get_batch_size(batch)}
    num_items = count_labelled_tokens(batch, trainer.get_model(keep_torch_compile=False))
    if num_items is not None:
        result["num_items_in_batch"] = num_items
    return result


def calculate_predictions(trainer: Trainer, batch: Mapping[str, Any]) -> Any:
    """The model's logits, or all that it returns where there are none.

    Labels are left out, since those of data to be predicted may be anything. A model with encoder
    and decoder gets them: it may build the decoder's inputs from them.
    """
    if not _has_decoder_inputs(trainer.get_model(keep_torch_compile=False)):
        batch = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        outputs = trainer.model(**batch)
    logits = _get(outputs, "logits")
    return outputs if logits is None else logits


def get_batch_size(batch: Mapping[str, Any]) -> int:
    """The length of the batch's tensors.

    Raises:
        ValueError: if there is no tensor with a dimension in the batch.
    """
    for value in batch.values():
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise ValueError(f"A batch with {', '.join(map(repr, batch)) or 'nothing'} has no tensors")


def count_labelled_tokens(batch: Mapping[str, Any], model: nn.Module) -> Tensor | None:
    """How many tokens a mean over tokens is the mean of; None for a mean over samples.

    Labels of whole numbers with shape ``(batch, tokens)`` are taken as tokens' labels. A causal
    language model predicts each token from those before it, so the first has no prediction.

    Returns:
        Shape ``()``, on the labels' device, so that counting doesn't wait for it.
    """
    shifted = batch.get("shift_labels")
    if isinstance(shifted, Tensor):  # by the collate function already
        return (shifted != IGNORED).sum()
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    if _shifts_labels(model):
        labels = labels[:, 1:]
    return (labels != IGNORED).sum()


def _get(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _has_decoder_inputs(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss leaves out each sequence's first label.

    A transformers model says by its ``loss_type`` which loss it has; without one, it has the causal
    language model's. Encoder-decoder models shift the decoder's inputs, and not the labels.
    """
    if not hasattr(model, "loss_type") or _has_decoder_inputs(model):
        return False
    return model.loss_type in (None, "ForCausalLM", "ForConditionalGeneration")


def _check_batch(batch: Mapping[str, Any]) -> None:
    wrong = [name for name, value in batch.items() if isinstance(value, list)]
    if "input_ids" in wrong:
        raise ValueError(
            f"{', '.join(map(repr, wrong))} of the batch are lists, and the model takes tensors: "
            "the samples need a collator, by collate_fn=DataCollatorWithPadding(tokenizer) or by "
            "the setting collator of [tool.pa-core.transformers]"
        )


def _uniform_excess(trainer: Trainer, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """What the loss against a uniform target has over the one against the labels.

    Added in proportion it gives the smoothed loss, as in `Rethinking the Inception Architecture
    <https://arxiv.org/abs/1512.00567>`_, and keeps what else the model's loss is made of, such as
    that of a mixture's router.

    Returns:
        Shape ``()``, a mean over the labels that count.
    """
    logits, labels = _get(outputs, "logits"), batch.get("shift_labels", batch.get("labels"))
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise ValueError("Labels are smoothed by logits and labels, which this model doesn't give")
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Labels of {labels.dtype} and shape {tuple(labels.shape)} for logits of shape "
            f"{tuple(logits.shape)} can't be smoothed: they are no classes"
        )
    model = trainer.get_model(keep_torch_compile=False)
    if labels.ndim == 2 and "shift_labels" not in batch and _shifts_labels(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    counts = labels != IGNORED
    shares = logits.float().log_softmax(-1)
    of_label = shares.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    excess = of_label - shares.mean(-1)
    return (excess * counts).sum() / counts.sum().clamp(min=1)
