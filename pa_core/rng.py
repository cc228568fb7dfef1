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


def seed_host(key: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators: all that augmentation draws from."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # NumPy takes 32 bits
    torch.default_generator.manual_seed(key)


def seed_model(key: int, device: torch.device) -> None:
    """Seed torch's generators on the CPU and on `device`, which a forward pass draws from.

    Not `torch.manual_seed`, which visits every backend and costs a hundred times as much; and not
    Python's and NumPy's generators, which models hardly use: theirs go on as they are, and a
    training state brings them back.
    """
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(key)
    elif device.type != "cpu":
        torch.manual_seed(key)
