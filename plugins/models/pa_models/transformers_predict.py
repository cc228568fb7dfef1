"""What a model predicts for each sample, out of all that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pa_models.transformers_call import (
    call_model,
    is_required,
    makes_decoder_inputs,
)

if TYPE_CHECKING:
    from torch import nn

    from pa_core import Trainer

_CACHES = ("past_key_values", "cache", "mems", "past_buckets_states", "cache_params", "state")
"""Outputs that only speed up later calls. Their tensors may have as many rows as the batch."""

_BESIDE_LOGITS = ("pred_boxes", "pred_masks", "mc_logits")
"""Outputs of other heads that belong to the logits."""

_OF_THE_LOSS = ("start_positions", "end_positions", "cls_index", "is_impossible", "return_loss")
"""Arguments that are for the loss only, besides those with ``label`` in their names."""

_PER_SAMPLE = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")
"""Arguments whose first dimension is the samples. In other entries it may be pictures or tokens."""


def calculate_predictions(trainer: Trainer, batch: Mapping[str, Any]) -> Any:
    """The model's outputs for each sample.

    Labels and other arguments of the loss aren't passed to the model, since they may be invalid in
    data for prediction. A model that builds its decoder's inputs from the labels gets them if the
    batch has no such inputs.

    Returns:
        The logits, if the model returns any (with boxes or the logits of a second head, a dict).
        Otherwise a dict of its outputs; or, if it returns a tuple, a tuple, or the only tensor
        left of it. What isn't per sample is left out: caches, scalars, None, tensors of any other
        first dimension, lists but those with a text or a dict for each sample, and
        ``logits_per_…``, which compare the samples of a batch.

    Raises:
        TypeError: if nothing is left.
    """
    model = trainer.get_model(keep_torch_compile=False)
    inputs = without_labels(model, batch)
    needs_labels = makes_decoder_inputs(model, batch)
    if "labels" in batch and needs_labels:
        inputs["labels"] = batch["labels"]
    try:
        with torch.no_grad():
            outputs = call_model(trainer.model, inputs)
    except Exception as error:
        if needs_labels and "labels" not in batch:
            error.add_note(
                f"{type(model).__name__} is an encoder-decoder, and the batch has neither labels "
                "nor decoder_input_ids for its decoder: add one of them, or set generate in "
                "[tool.pa-core.transformers] to predict the text that it generates"
            )
        raise
    if isinstance(outputs, Tensor):
        return outputs
    kind, outputs = type(outputs).__name__, _named(outputs)
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        beside = {key: outputs.get(key) for key in _BESIDE_LOGITS}
        heads = {key: value for key, value in beside.items() if isinstance(value, Tensor)}
        return {"logits": outputs["logits"], **heads} if heads else outputs["logits"]
    found = _per_sample(outputs, num_samples(inputs))
    if found is None:
        names = f" ({', '.join(map(str, outputs))})" if isinstance(outputs, Mapping) else ""
        raise TypeError(
            f"{type(model).__name__} returned no tensor with a row for each sample, but a "
            f"{kind}{names}: return one, or override calculate_predictions"
        )
    return found[0] if isinstance(found, tuple) and len(found) == 1 else found


def without_labels(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without what only the loss needs; an argument that the model requires stays."""
    return {
        name: value
        for name, value in batch.items()
        if is_required(model, name) or not ("label" in name or name in _OF_THE_LOSS)
    }


def num_samples(batch: Mapping[str, Any]) -> int | None:
    """The number of samples in a batch; None if no tensor shows it."""
    names = (*(name for name in _PER_SAMPLE if name in batch), *batch)
    values = (batch[name] for name in names)
    return next((len(one) for one in values if isinstance(one, Tensor) and one.ndim), None)


def _named(outputs: Any) -> Any:
    """The entries of an object by their names, such as those of a dataclass."""
    if "logits" in getattr(outputs, "_fields", ()):  # of a named tuple
        return outputs._asdict()
    if isinstance(outputs, Mapping | list | tuple):
        return outputs
    return vars(outputs) if hasattr(outputs, "__dict__") else outputs


def _per_sample(outputs: Any, size: int | None) -> Any:
    """The part of some outputs that has `size` rows, with their structure; None for nothing."""
    if isinstance(outputs, Tensor):
        return outputs if outputs.ndim and size in (None, len(outputs)) else None
    if isinstance(outputs, Mapping):
        kept = {
            key: found
            for key, value in outputs.items()
            if not _is_left_out(key) and (found := _per_sample(value, size)) is not None
        }
        return kept or None
    if isinstance(outputs, list) and len(outputs) == size and all(map(_is_of_sample, outputs)):
        return outputs
    if isinstance(outputs, list | tuple):
        found = [_per_sample(value, size) for value in outputs]
        entries = [one for one in found if one is not None]
        # A tuple within a tuple is a cache of keys and values.
        entries = [one for one in entries if not isinstance(one, tuple)]
        return tuple(entries) or None
    return None


def _is_of_sample(value: Any) -> bool:
    """Whether an entry of a list is a text or a dict, such as one of an image's boxes."""
    return isinstance(value, str | Mapping)


def _is_left_out(name: str) -> bool:
    if name in ("loss", *_CACHES) or name.endswith("_cache"):
        return True
    # `logits_per_image` has a column for each text of the batch, so it depends on the batch.
    return name.startswith("logits_per_")
