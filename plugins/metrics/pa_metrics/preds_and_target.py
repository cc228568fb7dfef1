"""Extract the inputs of a metric from a batch and the model's outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

Inputs = tuple[Any, ...] | Mapping[str, Any] | Tensor
"""The arguments of a metric's ``update``: positional as a tuple, keywords as a mapping, or one."""

ToPredsAndTarget = Callable[[Any, Mapping[str, Any]], Inputs]

IGNORED = -100
"""The label that losses ignore, in torch and in transformers."""

_TARGET_KEYS = ("labels", "label", "targets", "target")
_INDEX_KEYS = ("indexes", "indices", "query_id", "query_ids", "group", "groups")
_LANGUAGE_MODELS = ("LMHeadModel", "DoubleHeadsModel", "WithLMHead")
_UNSHIFTED = re.compile(
    "(XLNet|XLM|Flaubert)(LMHead|WithLMHead)Model|ProphetNet"
    "|(Bart|BigBirdPegasus|Blenderbot|BlenderbotSmall|MBart|Marian|Mvp|Pegasus|PLBart|TrOCR"
    "|Speech2Text2|Whisper)ForCausalLM"
)
"""Language models of transformers that expect labels which are shifted already."""
_TEXT_KEYS = ("references", "reference", "texts", "text", *_TARGET_KEYS)


def to_preds_and_target(batch: Any, batch_output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Extract predictions and targets from the usual forms of batches and outputs.

    Batches are ``(inputs, targets)`` or mappings with ``labels``. Outputs are a tensor or have
    ``logits``, as those of transformers' models. If the batch is a mapping, the class dimension of
    token logits ``(batch, tokens, classes)`` is moved to where torchmetrics expects it,
    ``(batch, classes, tokens)``. Outputs of shape ``(batch, 1)`` become ``(batch,)`` if the targets
    have that shape. If ``batch_output["shifts_labels"]`` is true, as for a model that predicts the
    next token, predictions and targets are those of the next tokens. Targets of tokens for which
    ``batch_output["counts_label"]`` is false become -100, or ``batch_output["ignored_label"]``.

    Args:
        batch: a batch of the loader.
        batch_output: the return value of the trainer's ``calculate_…_batch_loss``.

    Raises:
        TypeError: if it finds no tensors.

    >>> import torch
    >>> logits, labels = torch.zeros(4, 1), torch.ones(4)
    >>> preds, target = to_preds_and_target((None, labels), {"model_outputs": logits})
    >>> preds.shape == target.shape == (4,)
    True
    """
    preds, target = _logits(batch_output), _counted(batch, batch_output)
    if not isinstance(preds, Tensor) or not isinstance(target, Tensor):
        raise _nothing_found(
            batch,
            batch_output,
            "expected a batch (inputs, targets) or with 'labels', and an output that is a tensor "
            "or has 'logits'",
        )
    if preds.shape == (*target.shape, 1):
        preds = preds.squeeze(-1)
    if batch_output.get("shifts_labels") and are_of_tokens(batch, target):
        preds, target = _next_tokens(batch, preds, target)
    if isinstance(batch, Mapping) and preds.ndim > 2 and preds.shape[:-1] == target.shape:
        preds = preds.movedim(-1, 1)
    return preds, target


def classification(batch: Any, batch_output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """As `to_preds_and_target`; float targets, which some losses need, become integers."""
    preds, target = to_preds_and_target(batch, batch_output)
    return preds, target.long() if target.is_floating_point() else target


def segmentation(batch: Any, batch_output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """As `classification`; logits ``(batch, classes, …)`` become class indices ``(batch, …)``."""
    preds, target = classification(batch, batch_output)
    return preds.argmax(1) if preds.ndim == target.ndim + 1 else preds, target


def detection(batch: Any, batch_output: Mapping[str, Any]) -> tuple[Any, Any]:
    """Lists with a dict for each image, as torchvision's detection models use them.

    Predictions have ``boxes``, ``scores`` and ``labels``, targets ``boxes`` and ``labels``.
    """
    preds, target = _outputs(batch_output), _target(batch)
    if not _are_dicts(preds) or not _are_dicts(target):
        raise _nothing_found(
            batch, batch_output, "expected predictions and targets as lists of dicts, one per image"
        )
    return preds, target


def retrieval(batch: Any, batch_output: Mapping[str, Any]) -> dict[str, Tensor]:
    """Scores, relevances, and the index of each sample's query.

    The index is the batch's third entry or, in a mapping, has a name such as ``indexes``.
    """
    preds, target = to_preds_and_target(batch, batch_output)
    if isinstance(batch, Mapping):
        indexes = next((batch[key] for key in _INDEX_KEYS if key in batch), None)
    else:
        indexes = batch[2] if len(batch) > 2 else None
    if not isinstance(indexes, Tensor):
        raise _nothing_found(
            batch,
            batch_output,
            f"expected a batch (inputs, targets, indexes) or with one of {', '.join(_INDEX_KEYS)}",
        )
    return {"preds": preds, "target": target, "indexes": indexes.long()}


def language_model(batch: Any, batch_output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits ``(batch, tokens, words)`` and labels ``(batch, tokens)``, as for perplexity."""
    preds, target = _logits(batch_output), _counted(batch, batch_output)
    if not isinstance(preds, Tensor) or not isinstance(target, Tensor):
        raise _nothing_found(batch, batch_output, "expected logits and 'labels' of tokens")
    if batch_output.get("shifts_labels"):
        return _next_tokens(batch, preds, target)
    return preds, target


def causal_language_model(batch: Any, batch_output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """As `language_model`, shifted: each token is predicted from those before it."""
    return language_model(batch, {**batch_output, "shifts_labels": True})


def text(batch: Any, batch_output: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    """Generated texts, ``batch_output["texts"]``, and reference texts.

    The references are the batch's second entry or have a name such as ``references``.
    """
    preds = batch_output.get("texts")
    if "references" in batch_output:
        target = batch_output["references"]
    elif isinstance(batch, Mapping):
        target = next((batch[key] for key in _TEXT_KEYS if key in batch), None)
    else:
        target = _target(batch)
    if not _are_texts(preds) or not isinstance(target, list | tuple):
        raise _nothing_found(
            batch,
            batch_output,
            "expected a batch output with 'texts', a list of strings, and a batch with lists of "
            "strings. With generate and tokenizer in [tool.pa-core.transformers], a model "
            "generates texts",
        )
    texts: list[str] = list(preds or ())
    return texts, list(target)


NAMED: dict[str, Callable[..., Inputs]] = {
    "default": to_preds_and_target,
    "classification": classification,
    "segmentation": segmentation,
    "detection": detection,
    "retrieval": retrieval,
    "language_model": language_model,
    "causal_language_model": causal_language_model,
    "text": text,
}
"""The names that ``to_preds_and_target`` accepts in the settings."""


def inputs_for(
    metric: Any, model: nn.Module, chosen: ToPredsAndTarget | None = None
) -> ToPredsAndTarget:
    """The function that extracts a metric's inputs, chosen by its torchmetrics subpackage.

    Args:
        metric: the metric, or a wrapper around it.
        model: the model. Of one that predicts the next token, predictions and targets are shifted,
            unless the batch output says what the loss does.
        chosen: the function that the settings name, instead. Of language models, it is adapted to
            the shapes that the metric expects.
    """
    library, _, module = type(_unwrapped(metric)).__module__.partition(".")
    field, _, name = module.partition(".") if library == "torchmetrics" else ("", "", "")
    is_of_words = field == "text" and name.startswith("perplexity")
    if chosen in (language_model, causal_language_model):
        if is_of_words:
            return _shifting(language_model, chosen is causal_language_model, True)
        if field != "text":
            return _shifting(classification, chosen is causal_language_model, True)
        return text
    function = chosen or _usual(field, name)
    if function in (to_preds_and_target, classification, language_model):
        is_shifted, part = _predicts_next_token(model), None
        if not is_shifted and not hasattr(model, "loss_type"):
            parts = (one for one in model.modules() if _predicts_next_token(one))
            part = next((type(one).__name__ for one in parts), None)
        return _shifting(function, is_shifted, False, part)
    return function


def aggregates(metric: Any) -> bool:
    """Whether a metric, or one inside a wrapper, aggregates single values, such as a mean."""
    return type(_unwrapped(metric)).__module__.startswith("torchmetrics.aggregation")


def _usual(field: str, name: str) -> ToPredsAndTarget:
    """The function for a metric of a subpackage of torchmetrics, and of a module in it."""
    if field == "text":
        return language_model if name.startswith("perplexity") else text
    if field in NAMED and not name.startswith("panoptic"):
        return NAMED[field]
    return to_preds_and_target


@cache  # metrics with the same function share their inputs
def _shifting(
    function: ToPredsAndTarget, shifts_labels: bool, is_asked_for: bool, part: str | None = None
) -> Any:
    """The function with a value of ``shifts_labels`` that is certain, or one that may be wrong.

    Args:
        function: takes it from the batch output.
        shifts_labels: the value.
        is_asked_for: whether it overrides the value of the batch output.
        part: the part of the model that predicts the next token, if it depends on the model's
            own code whether labels are shifted. Without a value in the batch output, it is asked
            for.
    """

    def inputs(batch: Any, batch_output: Mapping[str, Any]) -> Inputs:
        if is_asked_for:
            return function(batch, {**batch_output, "shifts_labels": shifts_labels})
        # Targets in a tuple are what the loss function compares the outputs with, one by one.
        if part and "shifts_labels" not in batch_output and are_of_tokens(batch, _target(batch)):
            raise TypeError(
                f"It isn't known whether the loss compares the labels with the outputs before them:"
                f" the model has a {part}, which predicts the next token. Set to_preds_and_target "
                'in [tool.pa-core.metrics] to "causal_language_model", which shifts the labels, or '
                'to "language_model", which doesn\'t; or return "shifts_labels" with the loss'
            )
        by_model = shifts_labels and isinstance(batch, Mapping)
        return function(batch, {"shifts_labels": by_model, **batch_output})

    return inputs


def are_of_tokens(batch: Any, target: Any) -> bool:
    """Whether targets are labels of tokens or pixels in a mapping, of which -100 is ignored."""
    return (
        isinstance(batch, Mapping)
        and isinstance(target, Tensor)
        and target.ndim > 1
        and not target.is_floating_point()
    )


def _unwrapped(metric: Any) -> Any:
    """The metric inside wrappers, which take the same inputs."""
    seen: Any = None
    while metric is not seen and type(metric).__module__.startswith("torchmetrics.wrappers"):
        seen = metric
        for name in ("metric", "_base_metric", "base_metric", "metrics"):
            inner = getattr(metric, name, None)
            if inner is not None:
                metric = next(iter(inner)) if name == "metrics" and len(inner) else inner
                break
    return metric


def _predicts_next_token(model: nn.Module) -> bool:
    """Whether the loss of a transformers model compares each label with the output before it.

    By its `loss_type` and its class. Encoder-decoder models shift the decoder's inputs instead.
    """
    if callable(find := getattr(model, "get_base_model", None)):  # within adapters
        model = find()
    name, config = type(model).__name__, getattr(model, "config", None)
    if not hasattr(model, "loss_type") or getattr(config, "is_encoder_decoder", False):
        return False
    if _UNSHIFTED.match(name):
        return False
    kind: Any = model.loss_type
    if kind is None:
        return name.endswith(_LANGUAGE_MODELS)
    return kind in ("ForCausalLM", "ForConditionalGeneration")


def _next_tokens(batch: Any, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets of the next tokens; labels may have been shifted by the collator."""
    if isinstance(batch, Mapping) and isinstance(batch.get("shift_labels"), Tensor):
        return preds, batch["shift_labels"]
    return preds[:, :-1], target[:, 1:]


def _outputs(batch_output: Mapping[str, Any]) -> Any:
    if "model_outputs" not in batch_output:
        raise TypeError(
            "Metrics need the model's outputs, and the loss method returned a dict without "
            f"'model_outputs'; it has {', '.join(map(str, batch_output))}. Add them, or set "
            "`to_preds_and_target` to a function of the batch and the batch output"
        )
    return batch_output["model_outputs"]


def _logits(batch_output: Mapping[str, Any]) -> Any:
    outputs = _outputs(batch_output)
    if isinstance(outputs, Mapping):
        return outputs.get("logits")
    return getattr(outputs, "logits", outputs)


def _target(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((batch[key] for key in _TARGET_KEYS if key in batch), None)
    return batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None


def _counted(batch: Any, batch_output: Mapping[str, Any]) -> Any:
    """The batch's targets, with the ignored label for tokens that the model's loss leaves out."""
    target, counts = _target(batch), batch_output.get("counts_label")
    if isinstance(counts, Tensor) and are_of_tokens(batch, target) and counts.shape == target.shape:
        return target.masked_fill(~counts.bool(), batch_output.get("ignored_label", IGNORED))
    return target


def _are_dicts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _nothing_found(batch: Any, batch_output: Mapping[str, Any], expected: str) -> TypeError:
    output = batch_output.get("model_outputs")
    return TypeError(
        f"Metrics can't find predictions and targets in a {type(batch).__name__} batch and a "
        f"{type(output).__name__} output: {expected}. For other data, set "
        "`to_preds_and_target` to a function of the batch and the batch output"
    )
