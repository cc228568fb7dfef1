"""Cost of loading with workers: the training loader compared with torch's DataLoader alone.

Both fetch the same map dataset with the same number of workers. Epochs of the two are timed in
turn, so that a slow phase of the machine affects both, and the median of the ratios is printed.

    python benchmarks/loading.py --rounds 9 --workers 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pa_core.data.loader import batches, create_dataloader

SAMPLES, BATCH = 32_000, 32


class Rows(Dataset[Any]):
    """Rows of a tensor, each with a label."""

    def __init__(self) -> None:
        self.rows = torch.rand(1000, 784)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.rows[index % 1000], index % 10


def seconds(epoch: Iterable[Any]) -> float:
    """The time of an epoch from its first batch to its last, without starting the workers."""
    iterator = iter(epoch)
    next(iterator)
    start, count = time.perf_counter(), 1
    for _ in iterator:
        count += 1
    assert count == SAMPLES // BATCH
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kwargs = {"batch_size": BATCH, "shuffle": True, "num_workers": options.workers}
    plain: Any = DataLoader(Rows(), **kwargs)
    keyed = create_dataloader(
        Rows(), None, kwargs, seed=1, rank=0, num_processes=1, purpose="train"
    )
    ratios, times = [], []
    for number in range(options.rounds):
        torch_seconds = seconds(plain)
        our_seconds = seconds(batches(keyed, seed=1, epoch=number + 1))
        times.append((torch_seconds, our_seconds))
        ratios.append(our_seconds / torch_seconds)
    torch_time, our_time = (statistics.median(column) for column in zip(*times, strict=True))
    per_batch = 1e6 / (SAMPLES // BATCH)
    print(f"torch   {torch_time * per_batch:6.0f} µs per batch")
    print(f"pa-core {our_time * per_batch:6.0f} µs per batch")
    low, *_, high = sorted(ratios)
    print(f"ratio   {statistics.median(ratios):6.2f}   ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
