import math
import os
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pa_core import Trainer
from pa_core.utils import (
    LIMIT_BATCHES_ENV_VAR,
    DataLoaderSlice,
    LimitBatches,
    local_process_zero_first,
    local_process_zero_only,
    remove_padding,
    worker_init_fn,
    world_process_zero_only,
)
from tests.helpers import tiny_data, tiny_model


def make_trainer():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())


def test_trainers_created_inside_limit_batches_run_only_a_few_batches():
    with LimitBatches(2):
        trainer = make_trainer()
    trainer.train(tiny_data(44), 3, eval_dataset=tiny_data(44))
    assert trainer.updates == trainer.num_updates == 6
    unlimited = make_trainer()
    unlimited.train(tiny_data(44), 1)
    assert unlimited.updates == 6


def test_limit_batches_restores_the_environment(monkeypatch):
    monkeypatch.setenv(LIMIT_BATCHES_ENV_VAR, "7")
    with LimitBatches(2):
        assert os.environ[LIMIT_BATCHES_ENV_VAR] == "2"
        with LimitBatches(1):
            assert os.environ[LIMIT_BATCHES_ENV_VAR] == "1"
        assert os.environ[LIMIT_BATCHES_ENV_VAR] == "2"
    assert os.environ[LIMIT_BATCHES_ENV_VAR] == "7"
    monkeypatch.delenv(LIMIT_BATCHES_ENV_VAR)
    with pytest.raises(RuntimeError), LimitBatches(2):
        raise RuntimeError
    assert LIMIT_BATCHES_ENV_VAR not in os.environ


@pytest.mark.parametrize("number", [0, -1, 1.5, "2"])
def test_limit_batches_raises_on_an_invalid_number_of_batches(number):
    with pytest.raises(ValueError, match="num_batches"):
        LimitBatches(number)


def test_a27_a_slice_is_not_longer_than_its_dataloader():
    loader = DataLoader(tiny_data(20), batch_size=8)
    assert len(DataLoaderSlice(loader, 5)) == len(list(DataLoaderSlice(loader, 5))) == 3
    assert len(DataLoaderSlice(loader, 2)) == len(list(DataLoaderSlice(loader, 2))) == 2


def test_a_slice_of_a_stream_has_no_length():
    with pytest.raises(TypeError):
        len(DataLoaderSlice((number for number in range(3)), 2))


@pytest.mark.parametrize(
    "decorate", [local_process_zero_only, local_process_zero_first, world_process_zero_only]
)
def test_a_single_process_is_the_first_process(decorate):
    @decorate
    def add(first: int, second: int) -> int:
        """Add."""
        return first + second

    assert add(1, second=2) == 3
    assert add.__name__ == "add"
    assert add.__doc__ == "Add."


class Draws(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])


def test_a19_workers_draw_different_numbers_and_the_same_in_every_run():
    def draw():
        loader = DataLoader(
            Draws(),
            batch_size=2,
            num_workers=2,
            worker_init_fn=worker_init_fn,
            generator=torch.Generator().manual_seed(5),
        )
        return torch.cat(list(loader))

    first = draw()
    assert torch.equal(first, draw())
    assert len(first.unique()) == first.numel()


def test_only_rows_of_padding_are_removed():
    padded = torch.tensor([[1, -1], [-1, -1], [0, 3], [-1, -1]])
    assert remove_padding(padded, -1).tolist() == [[1, -1], [0, 3]]
    assert remove_padding(torch.tensor([1.0, -1.0, 2.0]), -1).tolist() == [1.0, 2.0]
    deep = torch.zeros(3, 2, 2)
    deep[1, 0, 1] = 5
    assert remove_padding(deep, 0).shape == (1, 2, 2)


def test_padding_of_nan_is_removed():
    padded = torch.tensor([[1.0, math.nan], [math.nan, math.nan]])
    assert remove_padding(padded, math.nan).shape == (1, 2)
