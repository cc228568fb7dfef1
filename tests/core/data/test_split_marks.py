"""What shows that data are split by rank, and what their content says about it."""

from __future__ import annotations

import random
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
)

from pa_core import Trainer
from pa_core.data.same_stream import (
    _sights_of_samples,
    compare_batches,
    compare_samples,
    see_batches,
)
from pa_core.data.self_split import Described, decide, whole_loader
from pa_core.data.split_marks import SplitMark, find_mark, is_marked
from tests.helpers import tiny_data, tiny_model


class Stream(IterableDataset):
    def __init__(self, **fields):
        vars(self).update(fields)

    def __iter__(self):
        return iter(tiny_data(8))


class MapData(Dataset):
    def __init__(self, **fields):
        vars(self).update(fields)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return tiny_data(8)[index]


class Wrapper:
    """A custom loader."""

    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        return iter(self.inner)


class Filter(Stream):
    """As torch's and torchdata's data pipes."""

    def apply_sharding(self, num_of_instances, instance_id):
        pass


class ResampledShards(Stream):
    pass


def split_by_node(source, group=None):
    return source


def single_node_only(source):
    return source


SAMPLER = DistributedSampler(tiny_data(8), 4, 1)
WORLD = SimpleNamespace(rank=1, num_ranks=4, num_nodes=1)
ENVIRONMENT = SimpleNamespace(global_rank=1, world_size=4)
HUB = SimpleNamespace(rank=1, world_size=4, strategy="auto")
SHOWN = [
    (DataLoader(tiny_data(8), sampler=SAMPLER), "known", (1, 4)),
    (DataLoader(tiny_data(8), batch_sampler=BatchSampler(SAMPLER, 2, False)), "known", (1, 4)),
    (Wrapper(DataLoader(tiny_data(8), sampler=SAMPLER)), "known", (1, 4)),
    (Wrapper({"a": [Wrapper(DataLoader(tiny_data(8), sampler=SAMPLER))]}), "known", (1, 4)),
    (DataLoader(Stream(_distributed=HUB)), "known", (1, 4)),
    (DataLoader(Stream(source=Stream(_distributed=HUB))), "known", (1, 4)),
    (DataLoader(Stream(_unique_rank_world=WORLD)), "known", (1, 4)),
    (DataLoader(Stream(distributed_env=ENVIRONMENT)), "known", (1, 4)),
    (DataLoader(Stream(pipeline=[Stream(), split_by_node])), "known", (None, None)),
    (
        DataLoader(Stream(pipeline=[Stream(), partial(split_by_node, group=1)])),
        "known",
        (None, None),
    ),
    (DataLoader(Stream(pipeline=[ResampledShards()])), "known", (None, None)),
    (DataLoader(Stream(source_datapipe=Filter())), "known", (None, None)),
    (DataLoader(MapData(rank=0, world_size=2), sampler=SAMPLER), "known", (1, 4)),
    (DataLoader(Stream(rank=1, world_size=4)), "fields", (1, 4)),
    (DataLoader(Stream(_rank=1, _world_size=4)), "fields", (1, 4)),
    (DataLoader(MapData(process_index=1, num_processes=4)), "fields", (1, 4)),
    (DataLoader(Stream(cur_shard=1, shard_count=4)), "fields", (1, 4)),
    (DataLoader(Stream(is_sharded=True, rank=1, world_size=4)), "marked", (None, None)),
]
NOT_SHOWN = [
    DataLoader(tiny_data(8)),
    DataLoader(Stream(rank=0)),
    DataLoader(Stream(rank="first", world_size="all")),
    DataLoader(Stream(rank=0, world_size=1)),
    DataLoader(Stream(_distributed=None)),
    DataLoader(Stream(pipeline=[Stream(), single_node_only])),
    DataLoader(tiny_data(8), sampler=DistributedSampler(tiny_data(8), 1, 0)),
    Stream(source_datapipe=Filter()),  # nothing shards it outside a DataLoader
]


@pytest.mark.parametrize(("data", "kind", "numbers"), SHOWN)
def test_what_shows_a_split(data, kind, numbers):
    mark = find_mark(data)
    assert (mark.kind, mark.is_split) == (kind, True)
    assert (mark.rank, mark.world_size) == numbers


@pytest.mark.parametrize("data", NOT_SHOWN)
def test_what_shows_none(data):
    assert find_mark(data) is None


def test_the_users_word_counts_before_anything_else():
    mark = find_mark(DataLoader(Stream(inner=Stream(is_sharded=False), rank=1, world_size=4)))
    assert (mark.kind, mark.is_split) == ("marked", False)
    assert is_marked(Subset(MapData(is_sharded=True), [0])) is True
    assert is_marked(MapData(rank=1, world_size=4)) is None


def described(*numbers, kind="known", owner="Sampler (rank, num_replicas)"):
    marks = [one and SplitMark(owner, kind, True, *one) for one in numbers]
    return [Described(mark) for mark in marks]


@pytest.mark.parametrize(
    ("given", "is_split"),
    [
        (described(None, None), False),
        (described((0, 2), (1, 2)), True),
        (described((0, 3), (1, 3), (2, 3)), True),
        (described((None, None), (None, None)), True),
        ([Described(SplitMark("is_sharded", "marked", is_split=False))] * 2, False),
        (described((3, 10), (3, 10), kind="fields", owner="Data (shard_id, num_shards)"), False),
    ],
)
def test_processes_that_agree(given, is_split):
    assert decide(given, "Data", "train") is is_split


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (described((0, 2), None), "on some of them only"),
        (described((0, 4), (1, 4)), r"which has 2 processes \(process 0: .* = 0, 4; process 1"),
        (described((0, 2), (0, 2)), r"process 1: Sampler \(rank, num_replicas\) = 0, 2"),
        (described((1, 2), (0, 2)), "process 0: .* = 1, 2"),
        (
            [*described((0, 2)), Described(SplitMark("is_sharded", "marked", is_split=False))],
            "on some of them only",
        ),
    ],
)
def test_processes_that_disagree(given, message):
    with pytest.raises(RuntimeError, match=message):
        decide(given, "Data", "train")


def see(*batches):
    return see_batches(list(batches))


def x(start=0.0):
    return torch.arange(start, start + 16)


MANY, FEW = torch.arange(16) % 8, torch.zeros(16)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (see([x(), FEW]), see([x(), FEW]), "same"),
        (see([x(), FEW]), see([x(1), FEW]), "different"),
        (see([x(), MANY]), see([x(1), MANY]), "random"),
        (see([x(), MANY]), see([x(1), MANY.flip(0)]), "different"),
        (see([x(), FEW]), see([x(), FEW], [x(), FEW]), "different"),
        (see(), see(), "same"),
        (see(x()), see(x(1)), "different"),
        (see({"id": x(), "x": x()}), see({"id": x(), "x": x(1)}), "same"),
        (see({"id": x(), "labels": MANY}), see({"id": x(1), "labels": MANY}), "different"),
        (see({"x": x(), "labels": MANY}), see({"x": x(1), "labels": MANY}), "random"),
        (see(["a", ["cat"] * 16]), see(["b", ["cat"] * 16]), "different"),
    ],
)
def test_first_batches_of_two_processes(first, second, verdict):
    assert compare_batches([first, second]) == verdict


class Items(Dataset):
    """Samples of one process: their values, labels, ids and noise."""

    def __init__(self, start=0, labels=None, noise=None, ids=None):
        self.start, self.labels, self.noise, self.ids = start, labels or [0] * 40, noise, ids

    def __len__(self):
        return 40

    def __getitem__(self, index):
        noise = 0.0 if self.noise is None else self.noise.random()
        sample = {"x": self.start + index + noise, "labels": self.labels[index]}
        return sample if self.ids is None else sample | {"id": self.ids + index}


def of_run():
    return random  # seeded for the run


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (Items(), Items(), "same"),
        (Items(), Items(40), "different"),
        (Items(noise=of_run()), Items(noise=of_run()), "same"),
        (Items(noise=of_run()), Items(40, noise=of_run()), "different"),
        (Items(noise=random.Random(1)), Items(noise=random.Random(2)), "random"),
        (
            Items(noise=random.Random(1), labels=list(range(40))),
            Items(noise=random.Random(1), labels=list(range(40, 80))),
            "different",
        ),
        (Items(noise=random.Random(1), ids=0), Items(noise=random.Random(2), ids=0), "same"),
        (Items(noise=random.Random(1), ids=0), Items(noise=random.Random(2), ids=1), "different"),
        (
            Subset(Items(noise=random.Random(1)), range(0, 40, 2)),
            Subset(Items(noise=random.Random(1)), range(1, 40, 2)),
            "different",
        ),
    ],
)
def test_samples_of_two_processes(first, second, verdict):
    state = random.getstate()
    seen = [_sights_of_samples(one, DataLoader(one), 16, 2) for one in (first, second)]
    assert compare_samples(seen) == verdict
    assert random.getstate() == state


def joined(lists):
    return list(chain.from_iterable(lists))


@pytest.mark.parametrize("samples", [24, 26])
@pytest.mark.parametrize("in_batch_sampler", [False, True])
def test_the_whole_order_has_the_batches_of_a_distributed_sampler(samples, in_batch_sampler):
    data = tiny_data(samples)

    def loader(rank):
        sampler = DistributedSampler(data, 3, rank, seed=5)
        sampler.set_epoch(2)
        if in_batch_sampler:
            return DataLoader(data, batch_sampler=BatchSampler(sampler, 4, False))
        return DataLoader(data, 4, sampler=sampler)

    by_rank = [list(loader(rank).batch_sampler) for rank in range(3)]
    whole = list(whole_loader(loader(1), "train").batch_sampler)
    assert sorted(joined(whole)) == list(range(samples))
    for step in range(samples // 12):  # the steps without repeated samples
        ours = joined(whole[3 * step : 3 * step + 3])
        assert sorted(ours) == sorted(joined(batches[step] for batches in by_rank))


def test_samplers_that_drop_samples_do_so_in_training_only():
    loader = DataLoader(
        tiny_data(26), 4, sampler=DistributedSampler(tiny_data(26), 3, 0, drop_last=True)
    )
    lengths = [len(whole_loader(loader, use).sampler) for use in ("train", "evaluate")]
    assert lengths == [24, 26]


def test_a_single_process_that_reads_one_split_is_warned():
    model = tiny_model()
    trainer = Trainer(
        model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1), plugins=()
    )
    loader = DataLoader(tiny_data(8), 4, sampler=DistributedSampler(tiny_data(8), 2, 1))
    with pytest.warns(UserWarning, match=r"split for 2 processes .* reads this split only"):
        trainer.evaluate(loader)
