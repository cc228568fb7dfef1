"""Keyed randomness: every random choice that training depends on is a function of a key.

A stream of random numbers can only be repeated from its start. Keyed numbers can be repeated from
anywhere: after an interruption, with a different number of workers, whatever a plugin draws.
"""

from __future__ import annotations

import random
from hashlib import blake2b

import numpy as np
import torch


def derive_key(*parts: int | str) -> int:
    """Hash seed, purpose and place to a key of 63 bits, from which a generator can be seeded.

    It is a hash and not a sum: with ``seed + epoch``, epoch 2 of seed 1 would be epoch 1 of seed 2.

    >>> derive_key(1, "order", 2) == derive_key(2, "order", 1)
    False
    >>> 0 <= derive_key(42, "step", 7, 0) < 2**63
    True
    """
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> 1


def key_at(key: int, number: int) -> int:
    """The key of the `number`-th of many things that share `key`, at a third of the cost of a hash.

    It is the output of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014) after `number` steps from the state `key`, without its last bit.

    >>> len({key_at(derive_key(42, "batch"), number) for number in range(1000)})
    1000
    """
    state = (key + number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (state ^ (state >> 31)) >> 1


def seed_torch(key: int) -> None:
    """Seed torch's CPU generator."""
    torch.default_generator.manual_seed(key)


def seed_host(key: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators, which augmentation may draw from."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # NumPy takes 32 bits
    torch.default_generator.manual_seed(key)


class DrawWatch:
    """Detects draws from Python's or NumPy's global generator.

    It keeps a copy of each generator and draws from both. As long as they return the same number,
    no other code has drawn. A check costs a fiftieth of seeding the two.
    """

    def __init__(self) -> None:
        self._python, self._numpy = random.Random(), np.random.RandomState()
        self._python.setstate(random.getstate())
        self._numpy.set_state(np.random.get_state())

    def has_drawn(self) -> bool:
        """Whether other code has drawn since the last call."""
        python = random.random() == self._python.random()
        return not (np.random.random_sample() == self._numpy.random_sample() and python)


def seed_model(key: int, device: torch.device) -> None:
    """Seed torch's generators on the CPU and on `device`, which a forward pass may draw from.

    `torch.manual_seed` would visit every backend, at a hundred times the cost.
    """
    seed_torch(key)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(key)
    elif device.type != "cpu":
        torch.manual_seed(key)


def seed_all(key: int, device: torch.device) -> None:
    """Seed Python's, NumPy's and torch's generators, which a user's code may draw from."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    seed_model(key, device)
