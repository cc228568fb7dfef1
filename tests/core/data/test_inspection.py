"""The search for generators and counts that a user's data hold."""

import random
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from pa_core.data.inspection import (
    digest_of_values,
    find_generators,
    find_unseedable,
    seed_generators,
)

SHARED = random.Random(0)
EPOCHS = {"done": 0}


def jitter(x):
    return x + SHARED.random()


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()


class Slotted:
    __slots__ = ("rng",)

    def __init__(self):
        self.rng = np.random.RandomState(0)


class Data:
    """Holds a generator in each way that the search follows, and the global ones."""

    of_class = random.Random(1)

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.again = self.rng
        self.transforms = {"all": [nn.Sequential(Noise()), Slotted()]}
        closed = random.Random(2)
        self.draw = lambda: closed.random() + 1
        self.bound = random.Random(3).random
        self.part = partial(jitter, 1)
        self.globals = (random.random, np.random.rand, torch.default_generator, random._inst)
        self.itself = self
        self.large = list(range(10_000))
        self.count = 0

    def __getitem__(self, index):
        return SHARED.random()


class Counts:
    def __iter__(self):
        EPOCHS["done"] += 1
        return iter(())


def test_generators_are_found_wherever_data_hold_them_and_seeded():
    data = Data()
    found = find_generators(Subset(data, [0]))
    assert len(found) == 7
    assert {type(one) for one in found} == {
        *(random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
    }
    assert any(one is SHARED for one in found)
    assert not {id(random._inst), id(torch.default_generator)} & {id(one) for one in found}

    def drawn(key):
        seed_generators(found, key)
        return [
            torch.rand((), generator=one).item()
            if isinstance(one, torch.Generator)
            else one.random()
            for one in found
        ]

    first = drawn(5)
    assert len(set(first)) == len(first)
    assert drawn(5) == first != drawn(6)


def test_generators_that_cant_be_seeded_are_found_with_their_place():
    data: Any = Data()
    data.transforms["secret"] = random.SystemRandom()
    assert list(find_unseedable(data)) == ["Data.transforms['secret']"]
    assert len(find_generators(data)) == 7


def test_counts_change_the_digest_of_values():
    data, counts = Data(), Counts()
    before = digest_of_values(data), digest_of_values(counts)
    data.rng.random()
    assert digest_of_values(data) == before[0]
    data.count += 1
    assert digest_of_values(data) != before[0]
    iter(counts)
    assert digest_of_values(counts) != before[1]


def test_a_suspended_generator_shows_where_it_is():
    class Counts:
        def __init__(self):
            self.numbers = self.count()

        def count(self):
            number, rng = 0, random.Random(0)
            while True:
                yield number, rng
                number += 1

    data = Counts()
    _, rng = next(data.numbers)
    assert find_generators(data) == [rng]
    before = digest_of_values(data)
    next(data.numbers)
    assert digest_of_values(data) != before
