"""The digest of a batch: equal for equal data, whatever holds them, and in all processes."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch

from pa_core.data.digest import batch_digest

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    names: set


class Graph:
    """A batch that is an object which knows itself, as graph libraries have."""

    def __init__(self, x):
        self.x, self.parent = x, self

    def __call__(self):
        raise AssertionError


def batch():
    return {
        "x": torch.arange(6.0).reshape(2, 3),
        "y": [np.array([1, 2]), 3, "four", None, True],
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "names": np.array(["a", "b"], dtype=object),
        "sample": Sample(torch.tensor(1), {"p", "q", "r"}),
    }


def test_equal_data_have_equal_digests():
    assert batch_digest(batch()) == batch_digest(UserDict(reversed(batch().items())))
    x, y = torch.ones(2), torch.zeros(2)
    assert batch_digest((x, y)) == batch_digest([x, y]) == batch_digest(Pair(x, y))
    assert batch_digest({"x": x}) == batch_digest(OrderedDict(x=x.clone()))
    wide = torch.randn(50, 400)  # sampled
    assert batch_digest(wide) == batch_digest(wide.T.contiguous().T.requires_grad_())
    assert batch_digest(Graph(x)) == batch_digest(Graph(x.clone()))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        ([[1], 2], [[1, 2]]),
        (["ab", "c"], ["a", "bc"]),
        ({"x": 1, "y": 2}, {"x": 2, "y": 1}),
        (1, 1.0),
        (1, True),
        ("1", b"1"),
        (np.array(["a", "b"], dtype=object), np.array(["a", "c"], dtype=object)),
        (Graph(torch.zeros(2)), Graph(torch.ones(2))),
        (Sample(torch.tensor(1), {"p"}), Sample(torch.tensor(1), {"q"})),
        (torch.zeros(0), torch.zeros(0, 2)),
        (torch.tensor([1j]).conj(), torch.tensor([1j])),
    ],
)
def test_different_data_have_different_digests(one, other):
    assert batch_digest(one) != batch_digest(other)


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, list])
def test_the_head_the_tail_and_a_sample_of_large_data_count(kind):
    numbers = torch.arange(100_000)
    whole = batch_digest(kind(numbers.numpy()))
    for changed in (slice(1), slice(99_999, None), slice(40_000, 40_100)):
        other = numbers.clone()
        other[changed] += 1
        assert batch_digest(kind(other.numpy())) != whole


def test_of_tensors_on_other_devices_only_shape_and_type_count():
    meta = torch.zeros(2, 3, device="meta")
    assert batch_digest(meta) == batch_digest(torch.ones(2, 3, device="meta"))
    assert batch_digest(meta) != batch_digest(torch.ones(3, 2, device="meta"))
    assert batch_digest(torch.eye(2).to_sparse()) == batch_digest(torch.eye(2).to_sparse())


def test_the_digest_is_the_same_in_every_process():
    assert batch_digest(batch()) == "7bc6fb65777acc536c535a8f4bcf393f"
