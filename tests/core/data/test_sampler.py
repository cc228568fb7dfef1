"""Batches of indices, and how they travel to the workers."""

import pickle
from multiprocessing.reduction import ForkingPickler

import torch

from pa_core.data.sampler import EpochSampler, IndexBatch


def test_a_batch_of_indices_travels_to_a_worker_as_bytes():
    batch = IndexBatch(2**62, torch.tensor([3, 1, 2**40]))
    sent = bytes(ForkingPickler.dumps(batch))
    assert b"rebuild" not in sent  # as torch sends tensors, by a file descriptor
    received = pickle.loads(sent)  # noqa: S301
    assert type(received) is IndexBatch
    assert received.key == batch.key
    assert received.indices.dtype == torch.int64
    assert received.indices.tolist() == [3, 1, 2**40]


def test_a_slice_of_the_order_travels_without_the_rest_of_it():
    sampler = EpochSampler(10_000, 4, seed=1, shuffle=True)
    first = next(iter(sampler))
    assert len(ForkingPickler.dumps(first)) < 500
    received = pickle.loads(ForkingPickler.dumps(first))  # noqa: S301
    assert received.indices.tolist() == first.indices.tolist()


def test_local_sizes_add_up_to_the_global_batch():
    for samples in range(1, 20):
        ranks = [
            EpochSampler(samples, 2, seed=1, shuffle=False, rank=rank, num_processes=3)
            for rank in range(3)
        ]
        for batch in range(len(ranks[0])):
            sizes = [sampler.local_size(batch) for sampler in ranks]
            assert sum(sizes) == ranks[0].global_size(batch, batch + 1)
            assert max(sizes) - min(sizes) <= 1
