"""Losses and predictions of models that compute their own loss, like those of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from pa_core import Trainer

IGNORED = -100
"""The label of tokens that the loss ignores, in transformers as in ``cross_entropy``."""


def calculate_batch_loss(
    trainer: Trainer, batch: Mapping[str, Any], label_smoothing: float = 0.0
) -> dict[str, Any]:
    """Call the model with the batch's entries as arguments, and use the loss that it returns.

    Args:
        trainer: the trainer with the model.
        batch: its entries are the model's arguments.
        label_smoothing: the fraction of the target that is spread over all classes.

    Returns:
        ``loss`` (shape ``()``), ``model_outputs`` (what the model returns), ``batch_size``, and, if
        the loss is a mean over tokens, ``num_items_in_batch`` (shape ``()``, on the device).
        ``log`` has the losses that the model returns besides, such as the ``aux_loss`` of a mixture
        of experts, and with label smoothing the parts of the loss: ``unsmoothed_loss``, and
        ``uniform_loss`` for a uniform target.

    Raises:
        ValueError: if the model returns no loss, or if the batch isn't made of tensors.
    """
    _check_batch(batch)
    outputs = trainer.model(**batch)
    loss = _get(outputs, "loss")
    if loss is None:
        raise ValueError(
            f"{type(trainer.get_model()).__name__} returned no loss for a batch with "
            f"{', '.join(map(repr, batch))}. Models compute it from 'labels': add them in the "
            "dataset or the collate function, or override the trainer's "
            "calculate_train_batch_loss"
        )
    log = _other_losses(outputs)
    if label_smoothing:
        excess = _uniform_excess(trainer, outputs, batch)
        log |= {"unsmoothed_loss": loss, "uniform_loss": (loss + excess).detach()}
        loss = loss + label_smoothing * excess
    result = {"loss": loss, "model_outputs": outputs, "batch_size": get_batch_size(batch)}
    if log:
        result["log"] = log
    num_items = count_labelled_tokens(batch, trainer.get_model(keep_torch_compile=False))
    if num_items is not None:
        result["num_items_in_batch"] = num_items
    return result


def get_batch_size(batch: Mapping[str, Any]) -> int:
    """The length of the batch's tensors.

    Raises:
        ValueError: if the batch has no tensor with at least one dimension.
    """
    for value in batch.values():
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise ValueError(f"A batch with {', '.join(map(repr, batch)) or 'nothing'} has no tensors")


def count_labelled_tokens(batch: Mapping[str, Any], model: nn.Module) -> Tensor | None:
    """The number of tokens that the loss is a mean over; None for a mean over samples.

    Integer labels of shape ``(batch, tokens)`` are labels of tokens. A causal language model
    predicts each token from those before it, so there is no prediction for the first.

    Returns:
        Shape ``()``, on the labels' device, which avoids a host-device synchronisation.
    """
    shifted = batch.get("shift_labels")
    if isinstance(shifted, Tensor):  # the collate function has shifted them
        return (shifted != IGNORED).sum()
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    if _shifts_labels(model):
        labels = labels[:, 1:]
    return (labels != IGNORED).sum()


def _other_losses(outputs: Any) -> dict[str, Tensor]:
    """The losses that a model returns in addition to ``loss``, by name.

    They are entries such as ``aux_loss``, ``router_loss`` or ``contrastive_loss``, and those of
    ``loss_dict``, as object detectors return.
    """
    if not isinstance(outputs, Mapping):
        return {}
    named = {name: value for name, value in outputs.items() if str(name).endswith("_loss")}
    several = outputs.get("loss_dict")
    found = {**named, **(several if isinstance(several, Mapping) else {})}
    return {
        str(name): value.detach()
        for name, value in found.items()
        if isinstance(value, Tensor) and value.numel() == 1 and name != "loss"
    }


def _get(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _has_decoder_inputs(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss ignores the first label of each sequence.

    The ``loss_type`` of a transformers model names its loss; None means that of causal language
    models. Encoder-decoder models shift the decoder's inputs instead of the labels.
    """
    if not hasattr(model, "loss_type") or _has_decoder_inputs(model):
        return False
    return model.loss_type in (None, "ForCausalLM", "ForConditionalGeneration")


def _check_batch(batch: Mapping[str, Any]) -> None:
    wrong = [name for name, value in batch.items() if isinstance(value, list)]
    if "input_ids" in wrong:
        raise ValueError(
            f"{', '.join(map(repr, wrong))} of the batch are lists, but the model expects tensors: "
            "the samples need a collator, as in collate_fn=DataCollatorWithPadding(tokenizer) or "
            "with the setting collator of [tool.pa-core.transformers]"
        )


def _uniform_excess(trainer: Trainer, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """The loss for a uniform target minus the loss for the labels.

    Adding the fraction `label_smoothing` of it to the model's loss gives the smoothed loss of
    `Rethinking the Inception Architecture <https://arxiv.org/abs/1512.00567>`_, and keeps other
    terms of the model's loss, such as the router loss of a mixture of experts.

    Returns:
        Shape ``()``, a mean over the labels that aren't ignored.
    """
    logits, labels = _get(outputs, "logits"), batch.get("shift_labels", batch.get("labels"))
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise ValueError("Label smoothing needs logits in the model's output, and labels")
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Labels of {labels.dtype} and shape {tuple(labels.shape)} for logits of shape "
            f"{tuple(logits.shape)} can't be smoothed: they aren't classes"
        )
    model = trainer.get_model(keep_torch_compile=False)
    if labels.ndim == 2 and "shift_labels" not in batch and _shifts_labels(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != IGNORED
    log_probs = logits.float().log_softmax(-1)
    of_label = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    excess = of_label - log_probs.mean(-1)
    return (excess * mask).sum() / mask.sum().clamp(min=1)
