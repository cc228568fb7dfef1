"""Augmentation is a function of seed, epoch and position, even though seeding is lazy."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pa_core import Trainer
from pa_core.data import rng
from pa_core.data.loader import batches, create_dataloader, evaluation_batches
from pa_core.data.rng import derive_key, key_at
from tests.helpers import NoisyData, assert_identical, tiny_data, tiny_model, weights_of


class Rarely:
    """Draws for some samples only, with the function that it is given."""

    def __init__(self, draw, every: int) -> None:
        self.draw, self.every, self.fetched = draw, every, []

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int):
        self.fetched.append(index)
        return torch.tensor([index, self.draw() if index % self.every == 0 else 0.0])


def epoch_of(data, *, start: int = 0, epoch: int = 1, always: bool = False) -> list[torch.Tensor]:
    loader = create_dataloader(
        data, None, {"batch_size": 4, "shuffle": True},
        seed=5, rank=0, num_processes=1, purpose="train",
    )  # fmt: skip
    loader.seeds_always = always
    return list(batches(loader, seed=5, epoch=epoch, start=start))


DRAWS = [random.random, np.random.rand, lambda: torch.rand(()).item()]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("every", [1, 13, 39])
def test_a_batch_is_the_same_wherever_the_epoch_starts(draw, every):
    whole = epoch_of(Rarely(draw, every), always=True)
    for start in (0, 1, 3, 9):
        random.seed(start)
        np.random.seed(start)
        for got, expected in zip(
            epoch_of(Rarely(draw, every), start=start), whole[start:], strict=True
        ):
            assert torch.equal(got, expected)


def test_epochs_draw_different_numbers():
    first, second = (epoch_of(Rarely(random.random, 1), epoch=epoch) for epoch in (1, 2))
    drawn = [sorted(torch.cat(batches_)[:, 1].tolist()) for batches_ in (first, second)]
    assert drawn[0] != drawn[1]


def test_a_batch_is_fetched_again_at_most_once_and_only_if_the_data_draws():
    draws_always, draws_once = Rarely(np.random.rand, 1), Rarely(np.random.rand, 1000)
    epoch_of(draws_always)
    epoch_of(draws_once)
    assert len(draws_always.fetched) == 44
    assert len(draws_once.fetched) == 44  # sample 0 draws


def test_a_draw_between_two_fetches_changes_no_batch_and_repeats_no_fetch():
    data = Rarely(random.random, 1000)
    loader = create_dataloader(
        data, None, {"batch_size": 4, "shuffle": True},
        seed=5, rank=0, num_processes=1, purpose="train",
    )  # fmt: skip
    got = []
    for batch in batches(loader, seed=5, epoch=1):
        random.random()  # as a model may in its forward pass
        got.append(batch)
    expected = epoch_of(Rarely(random.random, 1000), always=True)
    assert all(map(torch.equal, got, expected))
    assert len(data.fetched) == 44  # sample 0 draws


def test_each_evaluation_draws_the_same_between_its_batches():
    class Once(Rarely):
        def __getitem__(self, index):
            return torch.tensor(self.draw() if index == 9 else 0.0)

    def new_loader():
        return create_dataloader(
            Once(random.random, 1), None, {"batch_size": 4},
            seed=5, rank=0, num_processes=1, purpose="eval",
        )  # fmt: skip

    def drawn(loader) -> list[float]:
        rng.seed_python_and_numpy(3)  # as an evaluation begins
        engine = SimpleNamespace(num_processes=1, moved=iter)
        return [random.random() for _ in evaluation_batches(loader, engine, print, seed=5)]

    loader = new_loader()
    assert drawn(loader) == drawn(loader) == drawn(new_loader())  # also after a resume


DRAWING = {
    "a number": random.random,
    "bits": lambda: random.getrandbits(1),
    "all words": lambda: [random.random() for _ in range(312)],
    "a Gaussian": lambda: random.gauss(0, 1),
    "a seed": lambda: random.seed(3),
    "NumPy's number": np.random.rand,
    "NumPy's bits": lambda: np.random.randint(2),
    "all of NumPy's words": lambda: np.random.rand(312),
    "NumPy's seed": lambda: np.random.seed(3),
}


@pytest.fixture(params=["in place", "copied"])
def way_of_reading(request, monkeypatch):
    if request.param == "copied":  # as where the generators have another layout
        monkeypatch.setattr(rng, "_cells_at", lambda *_: None)
        monkeypatch.setattr(rng, "_cells", (*rng._cells_of_python(), *rng._cells_of_numpy()))
    assert isinstance(rng._cells[0], rng._Copy) == (request.param == "copied")


@pytest.mark.usefixtures("way_of_reading")
@pytest.mark.parametrize("draw", DRAWING.values(), ids=DRAWING)
def test_every_draw_and_seeding_moves_the_generators(draw):
    for key in (1, 2**62 + 5):
        rng.seed_python_and_numpy(key)
        before = rng.generator_positions()
        torch.rand(3), random.Random(7).random(), np.random.default_rng(7).random()
        assert rng.generator_positions() == before
        draw()
        assert rng.generator_positions() != before


@pytest.mark.usefixtures("way_of_reading")
def test_looking_at_the_generators_draws_nothing():
    rng.seed_python_and_numpy(5)
    expected = random.random(), np.random.rand()
    rng.seed_python_and_numpy(5)
    rng.generator_positions()
    assert (random.random(), np.random.rand()) == expected


def test_neighbouring_keys_are_unrelated():
    keys = [key_at(derive_key(seed, "train", epoch), place)
            for seed in (1, 2) for epoch in (1, 2) for place in range(500)]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)
    differing = [(a ^ b).bit_count() for a, b in pairwise(keys)]
    assert 28 < sum(differing) / len(differing) < 35  # half of the bits, as for random numbers


class MixupTrainer(Trainer):
    """Draws from NumPy's and Python's generators within a step, as mixup does."""

    def calculate_train_batch_loss(self, batch):
        x, y = batch
        weight, order = np.random.beta(0.4, 0.4) * random.random(), torch.randperm(len(x))
        outputs = self.model(weight * x + (1 - weight) * x[order])
        first, second = (self.loss_func(outputs, target) for target in (y, y[order]))
        loss = weight * first + (1 - weight) * second
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(x)}


@pytest.mark.parametrize("data", [tiny_data(22), NoisyData(22)], ids=["tensors", "noisy"])
def test_what_a_step_draws_from_any_generator_is_keyed(data):
    def run(draws=0, **options):
        random.seed(draws), np.random.seed(draws)
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = MixupTrainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
        trainer.train(data, 2, per_device_batch_size=4, **options)
        return weights_of(trainer)

    expected = run()
    assert_identical(run(draws=1), expected)
    assert_identical(run(eval_dataset=NoisyData(6)), expected)
    assert_identical(run(train_dataloader_kwargs={"num_workers": 2}), expected)


def test_at_most_one_batch_of_a_run_is_fetched_twice():
    class Rows(Rarely):
        def __getitem__(self, index):
            return super().__getitem__(index), index % 3

    rows = Rows(random.random, every=3)
    model = nn.Sequential(nn.Linear(2, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
    trainer.train(rows, 3, per_device_batch_size=4)
    assert len(rows.fetched) == 3 * 40 + 4  # one batch of four again, in the first epoch
