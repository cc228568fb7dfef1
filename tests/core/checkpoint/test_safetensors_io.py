"""Our own safetensors files are what safetensors reads, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pa_core.checkpoint.safetensors_io import _NAMES, read_tensors, tensor_bytes
from pa_core.errors import TrainingStateError


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)


def test_every_type_shape_and_layout_comes_back_as_it_was():
    tensors = {str(kind): torch.arange(6).reshape(2, 3).T.to(kind) for kind in _NAMES}
    tensors |= {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "conjugated": torch.complex(torch.ones(2), torch.ones(2)).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "a part": torch.arange(10.0)[2:5],
        "the same": torch.arange(10.0)[2:5],
    }
    back = read_tensors(tensor_bytes(tensors))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(back[name]), bits(tensor)), name
    assert read_tensors(tensor_bytes({})) == {}


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()]
)
def test_a_tensor_of_an_unsupported_type_is_refused_by_its_name(tensor):
    with pytest.raises(TrainingStateError, match="optimizer.moment can't be saved"):
        tensor_bytes({"optimizer.moment": tensor})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(2, 6)[:1, 0],  # contiguous, with a stride of 6
        torch.from_numpy(np.zeros(0)),  # with a stride of 0
    ],
)
def test_a_tensor_of_one_element_or_none_may_have_any_stride(tensor):
    assert torch.equal(read_tensors(tensor_bytes({"x": tensor}))["x"], tensor)
