"""Small models and data for the tests of the loop."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pa_core.tracking import RunHistory


def tiny_data(samples: int = 44, features: int = 6, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, features, generator=generator)
    return TensorDataset(x, (x @ torch.randn(features, classes, generator=generator)).argmax(1))


def tiny_model(features: int = 6, classes: int = 3) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, classes))


class NoisyData(Dataset):
    """Adds random numbers of Python, NumPy and torch to each sample."""

    def __init__(self, samples: int = 22) -> None:
        self.data = tiny_data(samples)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        x, y = self.data[index]
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return x + 0.1 * noise, y


class NoisyModel(nn.Module):
    """Makes exact resuming hard: it has dropout, and buffers that change with each batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.layers(x)


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.get_model().state_dict().items()}


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"not bit-identical: {different}"


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


class MinimalHistory(RunHistory):
    """Overrides only what pytorch-accelerated requires."""

    def __init__(self):
        self.prefix = ""
        self.reset()

    def get_metric_names(self):
        return self.values.keys()

    def get_metric_values(self, metric_name):
        return self.values[metric_name]

    def get_latest_metric(self, metric_name):
        return self.values[metric_name][-1]

    def set_metric_name_prefix(self, prefix=""):
        self.prefix = prefix

    @property
    def metric_name_prefix(self):
        return self.prefix

    def update_metric(self, metric_name, metric_value):
        self.values.setdefault(self.prefix + metric_name, []).append(metric_value)

    def delete_metric(self, metric_name):
        del self.values[metric_name]

    @property
    def current_epoch(self):
        return self.epoch

    def _increment_epoch(self):
        self.epoch += 1

    def _set_epoch(self, epoch):
        self.epoch = epoch

    def reset(self):
        self.values, self.epoch = {}, 1
