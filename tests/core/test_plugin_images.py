"""Image tensors as 8-bit RGB arrays; expected values are written out or computed in NumPy."""

import numpy as np
import pytest
import torch

from pa_core.plugin import to_uint8_images


def test_floats_are_clamped_scaled_and_rounded():
    image = torch.tensor([[[-0.5, 0.0, 0.2, 0.25], [0.75, 0.998, 1.0, 3.0]]])
    (array,) = to_uint8_images(image)
    expected = [[0, 0, 51, 64], [191, 254, 255, 255]]
    assert array.dtype == np.uint8
    assert array.shape == (2, 4, 3)
    for channel in range(3):
        assert array[..., channel].tolist() == expected


def test_nan_is_black_and_infinite_values_are_clamped():
    (array,) = to_uint8_images(torch.tensor([[[float("nan"), float("inf"), -float("inf")]]]))
    assert array[..., 0].tolist() == [[0, 255, 0]]


def test_colours_come_last():
    image = torch.zeros(3, 2, 5)
    image[0, 0, 0] = image[1, 1, 4] = image[2, 0, 3] = 1.0
    (array,) = to_uint8_images(image)
    assert array[0, 0].tolist() == [255, 0, 0]
    assert array[1, 4].tolist() == [0, 255, 0]
    assert array[0, 3].tolist() == [0, 0, 255]
    assert int(array.astype(int).sum()) == 3 * 255


def test_8_bit_batches_keep_their_values():
    values = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    arrays = to_uint8_images(torch.from_numpy(values))
    assert len(arrays) == 4
    for array, value in zip(arrays, values, strict=True):
        np.testing.assert_array_equal(array, np.moveaxis(value, 0, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_gradients_are_accepted(dtype):
    images = torch.full((2, 1, 2, 2), 0.5, dtype=dtype, requires_grad=True)
    arrays = to_uint8_images(images)
    assert {int(value) for array in arrays for value in array.flat} == {128}


def test_limit_keeps_the_first_images():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2)
    assert [array[0, 0, 0] for array in to_uint8_images(images, limit=2)] == [0, 1]
    assert len(to_uint8_images(images, limit=9)) == 5


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6), (2, 2, 4, 6), (1, 2, 3, 4, 6)])
def test_another_shape_is_an_error_that_shows_it(shape):
    with pytest.raises(ValueError, match="got ") as error:
        to_uint8_images(torch.zeros(shape))
    assert str(error.value).endswith(f"got {shape}")
