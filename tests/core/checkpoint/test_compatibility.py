"""Whoever resumes with something different that changes the numbers is told, by its name."""

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
    "seed was 42 and is 7": {"seed": 7},
    "per_device_batch_size was 4 and is 8": {"per_device_batch_size": 8},
    "gradient_accumulation_steps was 1 and is 2": {"gradient_accumulation_steps": 2},
    "gradient_clip_norm was None and is 1.0": {"gradient_clip_norm": 1.0},
    "gradient_clip_value was None and is 0.5": {"gradient_clip_value": 0.5},
    "mixed_precision was 'no' and is 'bf16'": {"mixed_precision": "bf16"},
    "order.shuffle was True and is False": {"train_dataloader_kwargs": {"shuffle": False}},
    "order.drop_last was False and is True": {"train_dataloader_kwargs": {"drop_last": True}},
    "collate_fn was None and is 'collate'": {"collate_fn": collate},
    "dataset_length was 16 and is 12": {"dataset": tiny_data(12)},
    "dataset.content.0.rows was": {
        "dataset": TensorDataset(tiny_data(16).tensors[0] + 1, tiny_data(16).tensors[1])
    },
    "loss.label_smoothing was 0.1 and is 0.2": {
        "loss_func": nn.CrossEntropyLoss(label_smoothing=0.2)
    },
    "loss.class was 'CrossEntropyLoss' and is 'MultiMarginLoss'": {
        "loss_func": nn.MultiMarginLoss()
    },
    "optimizer_settings.0.lr was 0.05 and is 0.1": {
        "optimizer": partial(torch.optim.AdamW, lr=0.2)
    },
    "optimizer_settings.0.weight_decay was 0.01 and is 0.1": {
        "optimizer": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    },
    "scheduler.factor was 0.5 and is 0.25": {"create_scheduler_fn": partial(constant, factor=0.25)},
    "layers.Dropout(p=0.5, inplace=False) was 'nothing' and is 1": {
        "model": partial(model_with_dropout, 0.5)
    },
    "plugin 'limit_batches' was 'not enabled' and is 'enabled'": {
        "settings": "plugins = ['limit_batches']\n[tool.pa-core.limit_batches]\nnum_batches = 9\n"
    },
}


@pytest.mark.parametrize(("told", "changes"), DIFFERENCES.items(), ids=DIFFERENCES)
def test_a_difference_is_told_and_refused_under_strict(state, tmp_path, told, changes):
    with pytest.raises(TrainingStateError) as refused:
        train(tmp_path, 2, changes, resume_from=state, strict=True)
    assert told in str(refused.value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, 2, changes, resume_from=state)
    assert any(told in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("lost", "changes"),
    [
        ("with global batches of 8 samples in place of 4", {"per_device_batch_size": 8}),
        ("in another dataset", {"dataset": tiny_data(12)}),
    ],
)
def test_a_place_in_the_middle_of_an_epoch_is_no_other_runs(lost, changes, tmp_path):
    save = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, save_at_end=False)
    train(tmp_path, 1, {"callbacks": [save]})
    with pytest.raises(TrainingStateError, match=f"Its place in the epoch has no meaning {lost}"):
        train(tmp_path, 2, changes, resume_from=tmp_path / "update_00000002")


def test_another_optimizer_is_refused_since_the_state_of_one_means_nothing_to_another(
    state, tmp_path
):
    with pytest.raises(TrainingStateError, match="'AdamW' and is 'NAdam'.*means nothing to"):
        train(tmp_path, 2, {"optimizer": partial(torch.optim.NAdam, lr=0.1)}, resume_from=state)


def test_without_a_difference_nothing_is_told(state, tmp_path):
    train(tmp_path, 2, resume_from=state, strict=True)


@pytest.mark.parametrize("plugins", ["print_progress", "log_metrics"])
def test_a_plugin_that_only_looks_on_makes_no_difference(state, tmp_path, plugins):
    settings = f"plugins = ['{plugins}', 'checkpoint']\n[tool.pa-core.checkpoint]\nsave_dir = '"
    settings += f"{tmp_path}/states'\n"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*holds no state of the plugin")
        train(tmp_path, 2, {"settings": settings}, resume_from=state, strict=True)


def test_a_plugin_that_was_removed_and_one_with_other_settings_are_told(tmp_path):
    def settings(number):
        return (
            f"plugins = ['limit_batches']\n[tool.pa-core.limit_batches]\nnum_batches = {number}\n"
        )

    train(tmp_path, 1, {"settings": settings(9)}).save_training_state(tmp_path / "state")
    with pytest.warns(UserWarning, match="plugin 'limit_batches' was 'enabled' and is 'not enab"):
        train(tmp_path, 2, resume_from=tmp_path / "state")
    with pytest.warns(UserWarning, match="limit_batches': setting.num_batches was 9 and is 8"):
        train(tmp_path, 2, {"settings": settings(8)}, resume_from=tmp_path / "state")


def test_a_callback_of_the_script_is_told_under_strict_alone(state, tmp_path):
    class Mine(TrainerCallback):
        pass

    train(tmp_path, 2, {"callbacks": [Mine]}, resume_from=state)
    with pytest.raises(TrainingStateError, match="plugin 'Mine' was 'not enabled' and is 'enabled"):
        train(tmp_path, 2, {"callbacks": [Mine]}, resume_from=state, strict=True)


def test_a_state_says_which_run_it_is_of(state):
    manifest = read_manifest(state)
    assert manifest["seed"] == 42
    assert manifest["run"]["num_processes"] == 1
    assert manifest["run"]["dataset_length"] == 16
    assert {"torch", "accelerate", "numpy", "pa-core", "python"} <= set(manifest["packages"])
    assert set(manifest["hardware"]) >= {"device", "name", "threads", "capability"}
    assert "git" in manifest


def test_a_dataset_that_is_no_plain_tensor_is_never_asked_for_a_sample():
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


def test_parts_of_datasets_are_described_down_to_their_tensors():
    data = tiny_data(20)
    first, second = Subset(data, range(10)), Subset(data, range(5, 15))
    assert describe_dataset(first) != describe_dataset(second)
    assert describe_dataset(first) == describe_dataset(Subset(tiny_data(20), list(range(10))))
    assert describe_dataset(ConcatDataset([first, second]))["of"] == [
        describe_dataset(first),
        describe_dataset(second),
    ]
    assert describe_dataset(TensorDataset(torch.zeros(0, 2)))["content"][0]["shape"] == [0, 2]


def test_the_weights_of_classes_are_part_of_a_loss():
    first, second = (nn.CrossEntropyLoss(torch.tensor([1.0, n])) for n in (2.0, 3.0))
    assert describe(first) == describe(nn.CrossEntropyLoss(torch.tensor([1.0, 2.0])))
    assert describe(first) != describe(second)
    assert describe(nn.functional.mse_loss) == "mse_loss"
