"""Deterministic runs that take a few hundredths of a second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pa_core import Trainer
from pa_core.settings.table import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pa_core.durations import Duration

BATCH = 4
"""Samples per micro-batch, summed over all processes, so that any world size gives the same run."""


def tiny_model(
    *, features: int = 6, classes: int = 3, dropout: float = 0.0, seed: int = 3
) -> nn.Module:
    """A classifier of vectors with one hidden layer, with the same weights each time.

    Args:
        features: length of the vectors.
        classes: number of classes.
        dropout: probability of dropout, which makes training random.
        seed: seed of the weights. The global generator isn't changed.

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
    """Normally distributed vectors and their classes, which a linear model can learn.

    Args:
        samples: number of samples. With 44, the last batch of 4 is full, but the last accumulation
            window of two batches isn't.
        features: length of the vectors.
        classes: number of classes.
        seed: seed of the vectors. The classes depend on the vectors in the same way for all seeds.

    Returns:
        Pairs of a float32 vector ``(features,)`` and an int64 class ``()``.
    """
    directions = torch.randn(features, classes, generator=torch.Generator().manual_seed(0))
    vectors = torch.randn(samples, features, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(vectors, (vectors @ directions).argmax(1))


def tiny_trainer(*plugins: Any, model: nn.Module | None = None, **arguments: Any) -> Trainer:
    """A trainer with a tiny model and only these plugins; settings files are ignored.

    Args:
        *plugins: classes, instances, modules, or names of installed plugins.
        model: the model; by default `tiny_model`.
        **arguments: arguments of `Trainer`; by default cross-entropy and SGD with momentum.
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
    loss_func: Callable[..., Tensor] | None = None,
    optimizer: Any = None,
    **arguments: Any,
) -> Trainer:
    """Train a tiny model with only these plugins, and evaluate it after each epoch.

    An epoch has 11 micro-batches and 6 updates; its evaluation has 4 batches.

    Args:
        *plugins: classes, instances, modules, or names of installed plugins.
        epochs: length of the run.
        evaluate: whether to evaluate after each epoch.
        model: the model; by default `tiny_model`.
        data: data for training and evaluation; by default `tiny_data`.
        loss_func: the loss, as in `Trainer`; by default cross-entropy.
        optimizer: the optimizer, or a function that creates it from the parameters, as in
            `Trainer`; by default SGD with momentum.
        **arguments: arguments of `Trainer.train`.

    Returns:
        The trainer after the run.

    >>> trainer = run_tiny(epochs=1)  # doctest: +ELLIPSIS
    >>> trainer.updates
    6
    >>> trainer = run_tiny(epochs=1, optimizer=torch.optim.AdamW, loss_func=nn.NLLLoss())
    >>> type(trainer.optimizers[0]).__name__
    'AdamW'
    """
    parts = {"loss_func": loss_func, "optimizer": optimizer}
    chosen = {name: part for name, part in parts.items() if part is not None}
    trainer = tiny_trainer(*plugins, model=model, **chosen)
    given: dict[str, Any] = {
        "eval_dataset": (tiny_data(14, seed=8) if data is None else data) if evaluate else None,
        "per_device_batch_size": max(1, BATCH // trainer.num_processes),
        "gradient_accumulation_steps": 2,
    }
    trainer.train(tiny_data() if data is None else data, epochs, **(given | arguments))
    return trainer
