"""Calculate the statistics of batch norms from the training data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

if TYPE_CHECKING:
    from pa_core import Trainer


def refresh_batch_norms(model: nn.Module, trainer: Trainer) -> None:
    """Set running means and variances to their means over the batches of the current epoch.

    Each process takes its own batches, then the statistics are averaged over all of them. Batches
    have the form ``(inputs, …)``.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return
    # Their forward pass needs all processes, so they see padding batches, too.
    sees_padding = any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    count = torch.zeros((), device=trainer.device)

    def batches() -> Iterator[Any]:
        for batch in trainer.train_batches():
            if sees_padding or not trainer.is_padding_batch:
                count.add_(1)
                yield batch

    with generators_kept(trainer.device):
        torch.manual_seed(trainer.seed)  # for layers such as dropout
        update_bn(batches(), model)
    total = trainer.sum(count.clone())
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None:
                statistic.copy_(trainer.sum(statistic * count) / total)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Restore the state of the global random generators at the end of the block."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
