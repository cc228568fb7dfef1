"""Resuming with a difference that changes the numbers is reported, by its name."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from pa_core.checkpoint.fingerprint import describe, describe_dataset
from pa_core.checkpoint.storage import read_manifest
from pa_core.errors import TrainingStateError
from tests.helpers import tiny_data, tiny_model


def plain_model():
    return tiny_model()


def model_with_dropout(p):
    return nn.Sequential(tiny_model(), nn.Dropout(p))


def collate(samples):
    return torch.utils.data.default_collate(samples)


def constant(optimizer, factor):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=factor)


class Enabled:
    """A plugin without state that settings enable."""


BASE = {
    "model": partial(model_with_dropout, 0.1),
    "loss_func": nn.CrossEntropyLoss(label_smoothing=0.1),
    "optimizer": partial(torch.optim.AdamW, lr=0.1),
    "dataset": tiny_data(16),
    "settings": "",
    "seed": 42,
    "mixed_precision": "no",
    "per_device_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_clip_norm": None,
    "gradient_clip_value": None,
    "create_scheduler_fn": partial(constant, factor=0.5),
    "train_dataloader_kwargs": {"num_workers": 0},
    "collate_fn": None,
    "callbacks": (),
}


def train(folder, num_epochs, changes=(), **run):
    options = BASE | dict(changes)
    file = folder / "pyproject.toml"
    file.write_text(f"[tool.pa-core]\ndisable = ['progress_bar']\n{options.pop('settings')}")
    model, optimizer = options.pop("model")(), options.pop("optimizer")
    trainer = Trainer(
        model,
        options.pop("loss_func"),
        optimizer(model.parameters()),
        callbacks=options.pop("callbacks"),
        seed=options.pop("seed"),
        mixed_precision=options.pop("mixed_precision"),
        settings=file,
    )
    trainer.train(options.pop("dataset"), num_epochs, **options, **run)
    return trainer


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    train(folder, 1).save_training_state(folder / "state")
    return folder / "state"


DIFFERENCES = {
    "seed: 42 → 7": {"seed": 7},
    "per_device_batch_size: 4 → 8": {"per_device_batch_size": 8},
    "gradient_accumulation_steps: 1 → 2": {"gradient_accumulation_steps": 2},
    "gradient_clip_norm: None → 1.0": {"gradient_clip_norm": 1.0},
    "gradient_clip_value: None → 0.5": {"gradient_clip_value": 0.5},
    "mixed_precision: 'no' → 'bf16'": {"mixed_precision": "bf16"},
    "order.shuffle: True → False": {"train_dataloader_kwargs": {"shuffle": False}},
    "order.drop_last: False → True": {"train_dataloader_kwargs": {"drop_last": True}},
    "collate_fn: None → 'collate'": {"collate_fn": collate},
    "dataset_length: 16 → 12": {"dataset": tiny_data(12)},
    "dataset.content.0.rows: ": {
        "dataset": TensorDataset(tiny_data(16).tensors[0] + 1, tiny_data(16).tensors[1])
    },
    "loss.label_smoothing: 0.1 → 0.2": {"loss_func": nn.CrossEntropyLoss(label_smoothing=0.2)},
    "loss.class: 'CrossEntropyLoss' → 'MultiMarginLoss'": {"loss_func": nn.MultiMarginLoss()},
    "optimizer_settings.0.lr: 0.05 → 0.1": {"optimizer": partial(torch.optim.AdamW, lr=0.2)},
    "optimizer_settings.0.weight_decay: 0.01 → 0.1": {
        "optimizer": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    },
    "scheduler.factor: 0.5 → 0.25": {"create_scheduler_fn": partial(constant, factor=0.25)},
    "layers.Dropout(p=0.5, inplace=False): not set → 1": {
        "model": partial(model_with_dropout, 0.5)
    },
    "the type of 0.0.weight, 0.0.bias, 0.2.weight, 0.2.bias: float32 → bfloat16": {
        "model": lambda: model_with_dropout(0.1).bfloat16(),
        "mixed_precision": "bf16",
    },
    "plugin 'limit_batches': not enabled → enabled": {
        "settings": "plugins = ['limit_batches']\n[tool.pa-core.limit_batches]\nnum_batches = 9\n"
    },
}


@pytest.mark.parametrize(("difference", "changes"), DIFFERENCES.items(), ids=DIFFERENCES)
def test_a_difference_is_a_warning_and_an_error_under_strict(state, tmp_path, difference, changes):
    with pytest.raises(TrainingStateError) as refused:
        train(tmp_path, 2, changes, resume_from=state, strict=True)
    assert difference in str(refused.value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, 2, changes, resume_from=state)
    assert any(difference in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("obstacle", "changes"),
    [
        ("global batch size, which was 4 and is now 8", {"per_device_batch_size": 8}),
        ("dataset", {"dataset": tiny_data(12)}),
    ],
)
def test_a_position_in_the_middle_of_an_epoch_needs_the_same_batches(obstacle, changes, tmp_path):
    save = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, save_at_end=False)
    train(tmp_path, 1, {"callbacks": [save]})
    with pytest.raises(TrainingStateError, match=f"only valid for the same {obstacle}"):
        train(tmp_path, 2, changes, resume_from=tmp_path / "update_00000002")


def test_a_different_optimizer_is_refused(state, tmp_path):
    with pytest.raises(TrainingStateError, match="'AdamW' → 'NAdam'.*can't be loaded into another"):
        train(tmp_path, 2, {"optimizer": partial(torch.optim.NAdam, lr=0.1)}, resume_from=state)


def test_without_a_difference_nothing_is_reported(state, tmp_path):
    train(tmp_path, 2, resume_from=state, strict=True)


@pytest.mark.parametrize("plugins", ["print_progress", "log_metrics"])
def test_a_plugin_that_does_not_change_training_makes_no_difference(state, tmp_path, plugins):
    settings = f"plugins = ['{plugins}', 'checkpoint']\n[tool.pa-core.checkpoint]\nsave_dir = '"
    settings += f"{tmp_path}/states'\n"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no state of the plugin")
        train(tmp_path, 2, {"settings": settings}, resume_from=state, strict=True)


def test_a_removed_plugin_and_changed_settings_are_reported(tmp_path):
    def settings(number):
        return (
            f"plugins = ['limit_batches']\n[tool.pa-core.limit_batches]\nnum_batches = {number}\n"
        )

    train(tmp_path, 1, {"settings": settings(9)}).save_training_state(tmp_path / "state")
    with pytest.warns(UserWarning, match="plugin 'limit_batches': enabled → not enabled"):
        train(tmp_path, 2, resume_from=tmp_path / "state")
    with pytest.warns(UserWarning, match="limit_batches': setting.num_batches: 9 → 8"):
        train(tmp_path, 2, {"settings": settings(8)}, resume_from=tmp_path / "state")


def test_a_callback_of_the_script_is_reported_only_under_strict(state, tmp_path):
    class Mine(TrainerCallback):
        pass

    train(tmp_path, 2, {"callbacks": [Mine]}, resume_from=state)
    with pytest.raises(TrainingStateError, match="plugin 'Mine': not enabled → enabled"):
        train(tmp_path, 2, {"callbacks": [Mine]}, resume_from=state, strict=True)


def test_the_manifest_describes_the_run(state):
    manifest = read_manifest(state)
    assert manifest["seed"] == 42
    assert manifest["run"]["num_processes"] == 1
    assert manifest["run"]["dataset_length"] == 16
    assert {"torch", "accelerate", "numpy", "pa-core", "python"} <= set(manifest["packages"])
    assert set(manifest["hardware"]) >= {"device", "name", "threads", "capability"}
    assert "git" in manifest


def test_no_sample_is_fetched_to_describe_a_dataset():
    class Costly(Dataset):
        fingerprint = "v3"

        def __len__(self):
            return 5

        def __getitem__(self, index):
            raise AssertionError("fetched")

    assert describe_dataset(Costly()) == {
        "type": Costly.__qualname__,
        "fingerprint": "v3",
    }


def test_subsets_and_concatenations_are_described_down_to_their_tensors():
    data = tiny_data(20)
    first, second = Subset(data, range(10)), Subset(data, range(5, 15))
    assert describe_dataset(first) != describe_dataset(second)
    assert describe_dataset(first) == describe_dataset(Subset(tiny_data(20), list(range(10))))
    assert describe_dataset(ConcatDataset([first, second]))["of"] == [
        describe_dataset(first),
        describe_dataset(second),
    ]
    assert describe_dataset(TensorDataset(torch.zeros(0, 2)))["content"][0]["shape"] == [0, 2]


def test_the_class_weights_are_part_of_a_loss():
    first, second = (nn.CrossEntropyLoss(torch.tensor([1.0, n])) for n in (2.0, 3.0))
    assert describe(first) == describe(nn.CrossEntropyLoss(torch.tensor([1.0, 2.0])))
    assert describe(first) != describe(second)
    assert describe(nn.functional.mse_loss) == "mse_loss"
