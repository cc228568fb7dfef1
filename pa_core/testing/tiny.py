"""Runs that take a few hundredths of a second, the same each time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pa_core import Trainer
from pa_core.settings.table import Settings

if TYPE_CHECKING:
    from pa_core.durations import Duration

BATCH = 4
"""Samples of a micro-batch, on all processes together, so that any number of them does the same."""


def tiny_model(
    *, features: int = 6, classes: int = 3, dropout: float = 0.0, seed: int = 3
) -> nn.Module:
    """A classifier of vectors with one hidden layer, with the same weights each time.

    Args:
        features: length of a vector.
        classes: how many scores it gives.
        dropout: what makes it draw random numbers as it trains.
        seed: of its weights. The global generator stays as it is.

    >>> tiny_model()(torch.zeros(4, 6)).shape
    torch.Size([4, 3])
    """
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = [nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, classes)]
    if dropout:
        layers.insert(2, nn.Dropout(dropout))
    return nn.Sequential(*layers)


def tiny_data(
    samples: int = 44, *, features: int = 6, classes: int = 3, seed: int = 7
) -> TensorDataset:
    """Vectors of normal numbers and their classes, which a linear model can learn.

    Args:
        samples: how many; by default the last batch of 4 is full, and the last window of two
            batches isn't.
        features: length of a vector.
        classes: how many classes there are.
        seed: of the vectors; what their classes depend on is the same for all seeds.

    Returns:
        Pairs of a float32 vector ``(features,)`` and an int64 class ``()``.
    """
    directions = torch.randn(features, classes, generator=torch.Generator().manual_seed(0))
    vectors = torch.randn(samples, features, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(vectors, (vectors @ directions).argmax(1))


def tiny_trainer(*plugins: Any, model: nn.Module | None = None, **arguments: Any) -> Trainer:
    """A trainer of a tiny model with these plugins alone, whatever settings there are.

    Args:
        *plugins: classes, instances, modules, or names of installed plugins.
        model: in place of `tiny_model`.
        **arguments: of `Trainer`, in place of cross-entropy and SGD with momentum.
    """
    given: dict[str, Any] = {
        "loss_func": nn.CrossEntropyLoss(),
        "optimizer": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
        "callbacks": (),
        "plugins": plugins,
        "settings": Settings(),
    }
    return Trainer(tiny_model() if model is None else model, **(given | arguments))


def run_tiny(
    *plugins: Any,
    epochs: int | str | Duration = 2,
    evaluate: bool = True,
    model: nn.Module | None = None,
    data: Dataset[Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """Train a tiny model with these plugins alone, and evaluate it after each epoch.

    An epoch has 11 micro-batches and 6 updates, and its evaluation 4 batches.

    Args:
        *plugins: classes, instances, modules, or names of installed plugins.
        epochs: the run's length.
        evaluate: whether there is an evaluation dataset.
        model: in place of `tiny_model`.
        data: in place of `tiny_data`, for training and evaluation.
        **arguments: of `Trainer.train`.

    Returns:
        The trainer, as the run has left it.

    >>> trainer = run_tiny(epochs=1)  # doctest: +ELLIPSIS
    >>> trainer.updates
    6
    """
    trainer = tiny_trainer(*plugins, model=model)
    given: dict[str, Any] = {
        "eval_dataset": (tiny_data(14, seed=8) if data is None else data) if evaluate else None,
        "per_device_batch_size": max(1, BATCH // trainer.num_processes),
        "gradient_accumulation_steps": 2,
    }
    trainer.train(tiny_data() if data is None else data, epochs, **(given | arguments))
    return trainer
