"""timm's models by name; timm is imported when one is looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

PREFIX = "timm/"


class TimmModels(Mapping[str, Callable[..., nn.Module]]):
    """Maps ``"timm/<model>"`` to a function that builds the model with ``timm.create_model``.

    The function takes the arguments of ``create_model``, such as ``num_classes`` and
    ``pretrained``.

    Args:
        options: arguments for every model.

    >>> "resnet18" in TimmModels()  # doesn't import timm
    False
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self._options = dict(options or {})

    def __getitem__(self, name: str) -> Callable[..., nn.Module]:
        if name not in self:
            raise KeyError(name)
        from timm import create_model

        return partial(create_model, name.removeprefix(PREFIX), **self._options)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or not name.startswith(PREFIX):
            return False
        from timm import is_model

        return is_model(name.removeprefix(PREFIX))

    def __iter__(self) -> Iterator[str]:
        from timm import list_models

        return (PREFIX + name for name in list_models())

    def __len__(self) -> int:
        from timm import list_models

        return len(list_models())
