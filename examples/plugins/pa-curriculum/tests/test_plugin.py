"""The conformance suite, and tests of ``curriculum``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pa_core import Trainer, hookimpl
from pa_core.testing import PluginConformance, tiny_data, tiny_trainer
from torch.utils.data import DataLoader, TensorDataset

from pa_curriculum import CurriculumPlugin

RunTiny = Callable[..., Any]


class TestCurriculumPlugin(PluginConformance):
    plugin = CurriculumPlugin
    settings = {"start": 0.5, "epochs": 2}  # noqa: RUF012
    exempt = {"leaves_training_unchanged": "it is meant to change training"}  # noqa: RUF012


class Seen:
    """Records the samples of each epoch, by their first feature."""

    def __init__(self) -> None:
        self.epochs: list[list[int]] = []
        self.lengths: list[int | None] = []

    @hookimpl(trylast=True)
    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    @hookimpl
    def on_train_step_start(self, batch: Any) -> None:
        self.epochs[-1] += batch[0][:, 0].int().tolist()

    @hookimpl
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        self.lengths.append(trainer.num_updates)


def curriculum(**settings: Any) -> CurriculumPlugin:
    return CurriculumPlugin(CurriculumPlugin.Settings(**settings))


def numbered(samples: int = 40) -> TensorDataset:
    """Vectors whose first feature is their number."""
    vectors, classes = tiny_data(samples).tensors
    vectors[:, 0] = torch.arange(samples)
    return TensorDataset(vectors, classes)


def test_each_epoch_has_more_of_the_data_and_the_run_has_their_length() -> None:
    seen, data = Seen(), numbered()
    trainer = tiny_trainer(curriculum(start=0.25, epochs=3), seen)
    trainer.train(data, 4, per_device_batch_size=4)
    counts = [10, 25, 40, 40]
    assert [sorted(epoch) for epoch in seen.epochs] == [list(range(count)) for count in counts]
    assert trainer.updates == 3 + 7 + 10 + 10
    assert seen.lengths == [4 * 3, 3 + 3 * 7, 3 + 7 + 2 * 10, 3 + 7 + 2 * 10]
    assert trainer.progress.fraction == 1.0
    assert trainer.train_dataset is data


def test_the_difficulties_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "difficulties.txt"
    file.write_text("\n".join(str(-0.5 * number) for number in range(40)))
    seen = Seen()
    tiny_trainer(curriculum(start=0.25, epochs=2, difficulties=file), seen).train(numbered(), 2)
    assert sorted(seen.epochs[0]) == list(range(30, 40))
    assert len(seen.epochs[1]) == 40
    with pytest.raises(ValueError, match="40 difficulties for 44 samples"):
        tiny_trainer(curriculum(difficulties=file)).train(tiny_data(), 1)


def test_with_all_of_the_data_from_the_start_training_is_unchanged(run_tiny: RunTiny) -> None:
    with_it, without = run_tiny(curriculum(start=1.0)), run_tiny()
    assert torch.equal(with_it.model[0].weight, without.model[0].weight)


def test_data_without_a_length_are_an_error() -> None:
    with pytest.raises(TypeError, match="length and indices, not a DataLoader"):
        tiny_trainer(curriculum()).train(DataLoader(tiny_data()), 1)
