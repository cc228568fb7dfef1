"""Keyed randomness: every random choice that training depends on is a function of a key.

A stream of random numbers can only be repeated from its start. Keyed numbers can be repeated from
anywhere: after an interruption, with a different number of workers, whatever a plugin draws.
"""

from __future__ import annotations

import _random
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_uint32
from hashlib import blake2b
from typing import Any, Protocol

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
    seed_python_and_numpy(key)
    torch.default_generator.manual_seed(key)


def seed_python_and_numpy(key: int) -> None:
    """Seed Python's and NumPy's global generators."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # NumPy takes 32 bits


@contextmanager
def host_generators_kept() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's CPU generators on exit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def generator_positions() -> tuple[Any, ...]:
    """Where Python's and NumPy's global generators stand; any draw and any seeding changes it.

    Both are Mersenne Twisters: a draw moves the position in the 624 words of the state, and once
    they are exhausted, all of them are replaced. So a draw changes the position or each word.
    Reading them in place takes a tenth of a microsecond and draws nothing; `getstate` and
    `get_state` copy all words, at a hundred times the cost.
    """
    python, python_word, numpy, numpy_word = _cells
    return python.value, python_word.value, numpy.value, numpy_word.value


class _Cell(Protocol):
    """A number in memory, like ctypes' `c_uint32`."""

    @property
    def value(self) -> Any: ...


class _Copy:
    """A number that is read from a copy of the state, where it can't be read in place."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    @property
    def value(self) -> Any:
        return self._read()


def _cells_of_python() -> list[_Cell]:
    """Position and second word of Python's generator; the first word is always seeded alike."""
    *words, position = random.getstate()[1]
    room = _random.Random.__basicsize__ - object.__basicsize__
    if sys.implementation.name == "cpython" and room >= 4 * 625:
        address = id(random._inst) + object.__basicsize__
        cells = _cells_at(address, [position, *words], 0, 2)
        if cells is not None:
            return cells
    return [_Copy(lambda: random.getstate()[1][-1]), _Copy(lambda: random.getstate()[1][1])]


def _cells_of_numpy() -> list[_Cell]:
    """Position and first word of NumPy's generator."""
    state: Any = np.random.get_state(legacy=False)
    if state["bit_generator"] == "MT19937":
        words = [*state["state"]["key"].tolist(), int(state["state"]["pos"])]
        cells = _cells_at(_numpy_generator.ctypes.state_address, words, 624, 0)
        if cells is not None:
            return cells
    return [
        _Copy(lambda: int(np.random.get_state(legacy=False)["state"]["pos"])),
        _Copy(lambda: int(np.random.get_state(legacy=False)["state"]["key"][0])),
    ]


def _cells_at(address: int, words: list[int], *places: int) -> list[_Cell] | None:
    """Some words of a generator's state in memory; None if it doesn't hold all the given words."""
    if list((c_uint32 * len(words)).from_address(address)) != words:
        return None
    return [c_uint32.from_address(address + 4 * place) for place in places]


# Kept, since it owns the memory.
_numpy_generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
_cells = (*_cells_of_python(), *_cells_of_numpy())


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
    seed_python_and_numpy(key)
    seed_model(key, device)
