"""Calls of models whose outputs have names, whatever the configurations of transformers say."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import nn

_configs: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""The distinct configurations of each model and its parts."""


def call_model(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Call a model with the batch's entries as arguments.

    A model of transformers whose configuration says ``return_dict=False`` is asked for an output
    with names all the same, and so are its parts, which may read each other's outputs by name. The
    parts of other models aren't: their forward method may expect the tuples.
    """
    if "return_dict" in batch:
        return model(**batch)
    from pa_core.plugin import unwrap

    inner = unwrap(model)
    if _is_of_transformers(inner):
        with _named_outputs(inner):
            return model(**batch)
    says = getattr(getattr(inner, "config", None), "return_dict", None)
    if says is False and "return_dict" in inspect.signature(inner.forward).parameters:
        return model(**batch, return_dict=True)
    return model(**batch)


def makes_decoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a model makes its decoder's inputs of the labels of a batch.

    Encoder-decoder models that generate do so, alone or as a part of a custom model, if the batch
    has no such inputs.

    Args:
        model: without wrappers.
        batch: its entries are the model's arguments.
    """
    if "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
        return False
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return ("labels" in parameters or takes_any) and is_encoder_decoder(model)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model, or a part of a custom model, is an encoder-decoder that generates."""

    def generates(part: nn.Module) -> bool:
        if not getattr(getattr(part, "config", None), "is_encoder_decoder", False):
            return False
        can_generate = getattr(part, "can_generate", None)
        return bool(can_generate()) if callable(can_generate) else part is model

    if hasattr(getattr(model, "config", None), "is_encoder_decoder"):
        return generates(model)
    return any(generates(part) for part in model.modules())


def is_required(model: nn.Module, name: str) -> bool:
    """Whether a model can't be called without an argument."""
    parameter = inspect.signature(model.forward).parameters.get(name)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _is_of_transformers(model: nn.Module) -> bool:
    """Whether the forward method is one of transformers, and not of a custom class."""
    if callable(find := getattr(model, "get_base_model", None)):  # within adapters
        model = find()
    forward = inspect.unwrap(type(model).forward)
    return forward.__module__.startswith("transformers.")


@contextmanager
def _named_outputs(model: nn.Module) -> Iterator[None]:
    """Have all configurations of a model say ``return_dict=True`` within the block."""
    if model not in _configs:
        found = [getattr(module, "config", None) for module in model.modules()]
        _configs[model] = list({id(one): one for one in found if one is not None}.values())
    silent = [one for one in _configs[model] if getattr(one, "return_dict", None) is False]
    for config in silent:
        config.return_dict = True
    try:
        yield
    finally:
        for config in silent:
            config.return_dict = False
