"""The conformance suite, and tests of ``sample_images``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pa_core import Trainer, hookimpl
from pa_core.testing import PluginConformance, tiny_data, tiny_model, tiny_trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pa_sample_images import SampleImagesPlugin

RunTiny = Callable[..., Any]


def image_data(samples: int) -> TensorDataset:
    vectors, classes = tiny_data(samples, features=48).tensors
    return TensorDataset(vectors.reshape(-1, 3, 4, 4), classes)


class TestSampleImagesPlugin(PluginConformance):
    plugin = SampleImagesPlugin

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), tiny_model(features=48, dropout=0.1))

    def make_data(self, samples: int) -> Any:
        return image_data(samples)


# -- Grids ----------------------------------------------------------------------------------------


class Guesses(nn.Module):
    """Predicts an image's class from its first pixel: 0.1 is class 1, 0.2 is class 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        classes = (images[:, 0, 0, 0] * 10).round().long()
        return self.weight * nn.functional.one_hot(classes, 3).float()


class Tracker:
    """Receives images, as tracking plugins do."""

    def __init__(self) -> None:
        self.received: list[tuple[int, str, Tensor]] = []

    @hookimpl
    def on_init_end(self) -> None: ...

    def log_images(self, trainer: Trainer, name: str, images: Tensor) -> None:
        self.received.append((trainer.updates, name, images))


def squares(*shades: float, channels: int = 1) -> Tensor:
    return torch.tensor(shades)[:, None, None, None].expand(-1, channels, 8, 8).clone()


def guess(
    images: Tensor, true: list[int], *others: Any, model: nn.Module | None = None, **settings: Any
) -> Trainer:
    data = TensorDataset(images, torch.tensor(true))
    plugin = SampleImagesPlugin(SampleImagesPlugin.Settings(**settings))
    trainer = tiny_trainer(plugin, *others, model=model or Guesses())
    trainer.train(data, 2, data, per_device_batch_size=2)
    return trainer


def colours(picture: Image.Image) -> set[Any]:
    return {picture.getpixel((x, y)) for x in range(picture.width) for y in range(picture.height)}


def test_each_evaluation_writes_a_grid_of_the_first_samples(isolated_settings: Path) -> None:
    guess(squares(0.1, 0.2, 0.1, 0.2, 0.1), [1, 2, 2, 0, 1], samples=4, size=32)
    files = sorted(Path("samples").iterdir())
    assert [file.name for file in files] == ["update_00000003.png", "update_00000006.png"]
    with Image.open(files[0]) as picture:
        # Two by two cells, each of 32 pixels with two lines of 14 below, and a gap of 4 around.
        assert picture.size == (4 + 2 * 36, 4 + 2 * 64)
        for number, shade in enumerate((0.1, 0.2, 0.1, 0.2)):
            row, column = divmod(number, 2)
            left, top = 4 + 36 * column, 4 + 64 * row
            cell = picture.crop((left, top, left + 32, top + 32))
            assert colours(cell) == {(round(255 * shade),) * 3}
            caption = colours(picture.crop((left, top + 32, left + 32, top + 46)))
            reds = [red - green for red, green, _ in caption]
            assert max(reds, key=abs) * (1 if row else -1) > 50  # red in the second row
            true = colours(picture.crop((left, top + 46, left + 32, top + 60)))
            assert min(map(max, true)) < 100  # black


def test_labels_are_named_and_channels_are_denormalised(isolated_settings: Path) -> None:
    class Reads(SampleImagesPlugin):
        drawn: list[Any] = []  # noqa: RUF012

        def _samples(self, *parts: Tensor) -> list[Any]:
            self.drawn += (samples := super()._samples(*parts))
            return samples

    settings = {"labels": ["ant", "bee"], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 1.0]}
    images = squares(0.1, 0.2, channels=3)
    trainer = tiny_trainer(Reads(Reads.Settings(**settings)), model=Guesses())
    trainer.evaluate(TensorDataset(images, torch.tensor([0, 1])))
    assert [(s.predicted, s.true) for s in Reads.drawn] == [("bee", "ant"), ("2", "bee")]
    assert Reads.drawn[0].image[:, 0, 0].tolist() == pytest.approx([0.525, 0.55, 0.6])


@pytest.mark.parametrize("scores", [lambda x: x, lambda x: x[:, None]], ids=["flat", "column"])
def test_one_score_per_sample_is_a_binary_prediction(
    isolated_settings: Path, scores: Callable[[Tensor], Tensor]
) -> None:
    plugin = SampleImagesPlugin(SampleImagesPlugin.Settings())
    outputs = {"model_outputs": scores(torch.tensor([-1.0, 2.0]))}
    found = plugin.read_samples((squares(0.1, 0.2), torch.tensor([0.0, 0.0])), outputs)
    assert found is not None
    assert found[1].tolist() == [0, 1]


def test_trackers_receive_the_grid(isolated_settings: Path) -> None:
    tracker = Tracker()
    guess(squares(0.1, 0.2), [1, 1], tracker)
    received = [(update, name) for update, name, _ in tracker.received]
    assert received == [(1, "samples"), (2, "samples")]
    images = tracker.received[0][2]
    with Image.open("samples/update_00000001.png") as picture:
        assert images.shape == (3, picture.height, picture.width)
        pixel: Any = picture.getpixel((20, 10))
    assert images[:, 10, 20].tolist() == list(pixel)


def test_each_dataset_and_model_has_its_own_files(isolated_settings: Path) -> None:
    class Twin:
        @hookimpl
        def register_eval_models(self) -> Mapping[str, nn.Module]:
            return {"twin": Guesses()}

    data = TensorDataset(squares(0.1, 0.2), torch.tensor([1, 1]))
    trainer = tiny_trainer(SampleImagesPlugin, Twin(), model=Guesses())
    trainer.train(data, 1, {"a": data, "b/c": data})
    trainer.evaluate(data)
    names = {file.name.removesuffix("update_00000001.png") for file in Path("samples").iterdir()}
    assert names == {
        *("a_", "b-c_", "twin_a_", "twin_b-c_"),
        *("evaluation_", "evaluation_twin_"),
    }


# -- Errors ---------------------------------------------------------------------------------------


def test_data_without_images_is_one_warning(run_tiny: RunTiny) -> None:
    with pytest.warns(UserWarning, match="found no images.*override read_samples") as caught:
        run_tiny(SampleImagesPlugin)
    assert len(caught) == 1


def test_a_folder_that_can_not_be_written_is_one_warning(isolated_settings: Path) -> None:
    Path("taken").write_text("")
    with pytest.warns(UserWarning, match="can't write taken") as caught:
        guess(squares(0.1, 0.2), [1, 1], folder=Path("taken"))
    assert len(caught) == 1


@pytest.mark.parametrize("wrong", [{"mean": [0.5]}, {"mean": [0.5] * 2, "std": [0.5] * 2}])
def test_mean_and_std_must_fit(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected both or neither, with one number per channel"):
        SampleImagesPlugin.Settings(**wrong)
