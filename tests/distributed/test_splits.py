"""Data that split themselves by rank: every sample once, or an error on every process."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain

import pytest

from tests.distributed.launch import outcome_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ONCE, NO_ORDER = "once", "whole data on every process"
NOT_IN_ORDER, OTHER_SAMPLES = "remove (batch_)?sampler", "has other samples on each process"
OTHER_BATCHES = r"yields different batches on each process.*is_sharded = True.*is_sharded = False"
OTHER_ORDER = "yields different indices on each process.*is_sharded = True"
OTHER_WORLD = "isn't split as this run is, which has 2 processes"
IS_SAME = "the first batches are the same on every process.*is_sharded = False"

EXPECTED = {  # training, evaluation, prediction
    "distributed sampler": (ONCE, ONCE, ONCE),
    "distributed sampler, given": (ONCE, ONCE, NOT_IN_ORDER),
    "in a batch sampler": (ONCE, ONCE, ONCE),
    "in a batch sampler, given": (ONCE, ONCE, NOT_IN_ORDER),
    "in a holder": (ONCE, ONCE, NO_ORDER),
    "own order": (ONCE, ONCE, NO_ORDER),
    "own order, uneven": (
        "warning: repeats 1 sample in each epoch",
        None,
        NO_ORDER,
    ),
    "own order, uneven, in a holder": (
        "warning: repeats 1 sample in each epoch",
        "repeats 1 sample, but an evaluation counts each sample once",
        NO_ORDER,
    ),
    "other world size": (OTHER_WORLD,) * 3,
    "one rank": (OTHER_WORLD,) * 3,
    "world size 1": (ONCE, ONCE, ONCE),
    "every other": (OTHER_ORDER, OTHER_ORDER, NOT_IN_ORDER),
    "every other, marked": (ONCE, ONCE, NOT_IN_ORDER),
    "rank-aware": (ONCE, ONCE, NOT_IN_ORDER),
    "rank-aware, repeats": (None, r"RankAware .* hold 2 samples more than once", NOT_IN_ORDER),
    "unseeded": (OTHER_ORDER, OTHER_ORDER, NOT_IN_ORDER),
    "lines": (ONCE, ONCE, ONCE),
    "split lines": (OTHER_BATCHES,) * 3,
    "split lines with a worker": (OTHER_BATCHES,) * 3,
    "split lines in a holder": (OTHER_BATCHES,) * 3,
    "marked lines": (ONCE, ONCE, NO_ORDER),
    "ranked lines": (ONCE, ONCE, NO_ORDER),
    "knowing lines": (IS_SAME, IS_SAME, f"{NO_ORDER}.*is_sharded = False"),
    "node lines": (OTHER_WORLD,) * 3,
    "hub lines": (ONCE, ONCE, NO_ORDER),
    "hub lines in a holder": (ONCE, ONCE, NO_ORDER),
    "pipeline": (ONCE, ONCE, NO_ORDER),
    "noisy lines": ("warning: in all but their labels",) * 3,
    "prepared by accelerate": (ONCE, ONCE, ONCE),
    "prepared stream": (ONCE, ONCE, ONCE),
    "dispatched": ("pass the DataLoader itself",) * 3,
    "half": (OTHER_SAMPLES,) * 3,
    "half with a worker": (OTHER_SAMPLES,) * 3,
    "half, marked": (ONCE, ONCE, NO_ORDER),
    "half, marked, uneven": (None, None, NO_ORDER),
    "half in a loader": (OTHER_SAMPLES,) * 3,
    "subset by rank": (OTHER_SAMPLES,) * 3,
    "subset of noisy data": (OTHER_SAMPLES,) * 3,
    "sliced by the collation": (OTHER_SAMPLES,) * 3,
    "sliced in a loader": (OTHER_SAMPLES,) * 3,
    "marked, but whole": ("warning: the first batches are the same", IS_SAME, NO_ORDER),
    "noisy lines, explained": (ONCE, ONCE, ONCE),
    "knowing lines, explained": (ONCE, ONCE, ONCE),
    "nothing on one process": ("Process 1 has no batch of the training data", None, NO_ORDER),
    "loaders of different lengths": ("has . batches on process .*is_sharded = True",) * 3,
    "noisy": (ONCE, ONCE, ONCE),
    "plain": (ONCE, ONCE, ONCE),
    "plain loader": (ONCE, ONCE, ONCE),
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return outcome_of(tmp_path_factory.mktemp("splits") / "two", "splits.py", 2)


def test_all_cases_are_judged(outcome):
    assert {name for name in outcome if not name.startswith("resumed: ")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_each_sample_counts_once_or_every_process_raises(name, outcome):
    for use, expected in zip(("train", "evaluate", "predict"), EXPECTED[name], strict=True):
        results, warned = zip(*outcome[name][use], strict=True)
        if expected in (ONCE, None) or expected.startswith("warning: "):
            assert not any(isinstance(result, str) for result in results), (use, results)
            texts = joined(warned)
            if expected == ONCE:
                assert not texts
                check_once(use, results)
            elif expected is not None:
                assert any(expected.removeprefix("warning: ") in text for text in texts), texts
        else:
            for result in results:
                assert isinstance(result, str), (use, results)
                assert re.search(expected, result), result


def joined(lists):
    return list(chain.from_iterable(lists))


def check_once(use, results):
    samples = list(range(26))
    if use == "train":
        for epoch in (0, 1):
            assert sorted(joined(result[epoch] for result in results)) == samples
    elif use == "evaluate":
        assert sorted(joined(results)) == samples
    else:
        assert results[0] == results[1]
        assert sorted(results[0]) == samples


def test_repeated_samples_are_those_of_the_sampler(outcome):
    for epoch in (0, 1):
        trained = Counter(joined(one[epoch] for one, _ in outcome["own order, uneven"]["train"]))
        assert sorted(trained) == list(range(27))
        assert trained.total() == 28
    evaluated = joined(one for one, _ in outcome["own order, uneven"]["evaluate"])
    assert sorted(evaluated) == list(range(27))


def test_splits_of_different_lengths_are_read_whole(outcome):
    case = outcome["half, marked, uneven"]
    for epoch in (0, 1):
        assert sorted(joined(one[epoch] for one, _ in case["train"])) == list(range(25))
    assert sorted(joined(one for one, _ in case["evaluate"])) == list(range(25))


def test_a_run_resumes_within_an_epoch(outcome):
    resumed = {name: result for name, result in outcome.items() if name.startswith("resumed: ")}
    assert len(resumed) == 7
    for name, (whole, again) in resumed.items():
        assert whole == again, name
