"""Keyed randomness: every random choice that training depends on is a function of a key.

A stream of random numbers can only be repeated from its start. A key can be repeated from
anywhere: after an interruption, on another number of workers, whatever a plugin drew in between.
"""

from __future__ import annotations

import random
from hashlib import blake2b

import numpy as np
import torch


def mix(*parts: int | str) -> int:
    """Hash the parts of a key to a seed of 63 bits.

    A real hash, never a sum: with ``seed + epoch``, epoch 2 of seed 1 is epoch 1 of seed 2.

    >>> mix(1, "order", 2) == mix(2, "order", 1)
    False
    >>> 0 <= mix(42, "step", 7, 0) < 2**63
    True
    """
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> 1


def nth(key: int, number: int) -> int:
    """The key of the `number`-th of many things that share `key`, at a third of `mix`'s cost.

    It is the output of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014) after `number` steps from the state `key`, less its last bit.

    >>> len({nth(mix(42, "batch"), number) for number in range(1000)})
    1000
    """
    state = (key + number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (state ^ (state >> 31)) >> 1


def seed_torch(key: int) -> None:
    """Seed torch's generator on the CPU."""
    torch.default_generator.manual_seed(key)


def seed_host(key: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators: all that augmentation draws from."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # NumPy takes 32 bits
    torch.default_generator.manual_seed(key)


class DrawWatch:
    """Tells whether anybody has drawn from Python's or NumPy's global generator.

    A twin of each generator goes along with it: as long as both give the same number, nobody else
    has drawn. To look costs a fiftieth of seeding the two.
    """

    def __init__(self) -> None:
        self._python, self._numpy = random.Random(), np.random.RandomState()
        self._python.setstate(random.getstate())
        self._numpy.set_state(np.random.get_state())

    def has_drawn(self) -> bool:
        """Whether anybody has drawn since the last look."""
        python = random.random() == self._python.random()
        return not (np.random.random_sample() == self._numpy.random_sample() and python)


def seed_model(key: int, device: torch.device) -> None:
    """Seed torch's generators on the CPU and on `device`, which a forward pass draws from.

    Not `torch.manual_seed`, which visits every backend and costs a hundred times as much.
    """
    seed_torch(key)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(key)
    elif device.type != "cpu":
        torch.manual_seed(key)


def seed_all(key: int, device: torch.device) -> None:
    """Seed Python's, NumPy's and torch's generators: all that code of the user's may draw from."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    seed_model(key, device)
