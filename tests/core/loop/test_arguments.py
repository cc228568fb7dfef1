"""Bad input is told before training starts: what, where, and what would be right."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_core.errors import PluginError
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of


def trainer_of(model=None, optimizer=None, trainer_class=Trainer, **kwargs):
    model = tiny_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    arguments = {"callbacks": (), "plugins": ()} | kwargs
    return trainer_class(model, nn.CrossEntropyLoss(), optimizer, **arguments)


def test_an_empty_dataset():
    empty = TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="train dataset is empty"):
        trainer_of().train(empty, num_epochs=1)
    with pytest.raises(ValueError, match="eval dataset is empty"):
        trainer_of().train(tiny_data(), num_epochs=1, eval_dataset=empty)


def test_drop_last_that_leaves_no_batch():
    with pytest.raises(ValueError, match="44 samples, too few for one batch.*at least 64"):
        trainer_of().train(
            tiny_data(), 1, per_device_batch_size=64, train_dataloader_kwargs={"drop_last": True}
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_device_batch_size": 0}, "per_device_batch_size must be a positive integer, not 0"),
        ({"train_dataloader_kwargs": {"batch_size": 0}}, "batch size must be a positive integer"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a positive"),
        ({"max_num_train_steps": 0}, "max_num_train_steps must be a positive integer"),
        ({"gradient_clip_norm": -1.0}, "gradient_clip_norm must be a positive number, not -1.0"),
        ({"gradient_clip_norm": 1.0, "gradient_clip_value": 1.0}, "not by both"),
        ({"num_epochs": "3 fortnights"}, "fortnights"),
        ({"num_epochs": 0}, "0"),
    ],
)
def test_numbers_that_make_no_sense(arguments, message):
    trainer = trainer_of()
    before = weights_of(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny_data(), **{"num_epochs": 1} | arguments)
    assert_identical(before, weights_of(trainer))


def test_a_model_without_parameters():
    model = tiny_model()
    with pytest.raises(ValueError, match="Flatten has no parameters"):
        trainer_of(nn.Flatten(), torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_optimizer_over_other_parameters():
    with pytest.raises(ValueError, match="holds 4 parameters that aren't in the model"):
        trainer_of(tiny_model(), torch.optim.SGD(tiny_model().parameters(), lr=0.1))


def returning(change):
    class Changed(Trainer):
        def calculate_train_batch_loss(self, batch):
            return change(super().calculate_train_batch_loss(batch))

    return trainer_of(trainer_class=Changed)


def test_a_loss_that_is_no_scalar():
    with pytest.raises(
        TypeError, match=r"calculate_train_batch_loss returned a tensor of shape \(2,\) as the loss"
    ):
        returning(lambda output: output | {"loss": output["loss"].repeat(2)}).train(tiny_data(), 1)


def test_a_batch_output_without_its_keys_names_them():
    with pytest.raises(ValueError, match="without model_outputs, batch_size; it has loss"):
        returning(lambda output: {"loss": output["loss"]}).train(tiny_data(), 1)


def test_a_batch_output_that_is_no_dict():
    with pytest.raises(TypeError, match="returned a Tensor, not a dict with the keys loss"):
        returning(lambda output: output["loss"]).train(tiny_data(), 1)


def test_a_callback_class_that_cannot_be_built():
    class NeedsMore(TrainerCallback):
        def __init__(self, more):
            self.more = more

    with pytest.raises(PluginError, match=r"NeedsMore.*more"):
        trainer_of(callbacks=[NeedsMore])


@pytest.mark.parametrize("is_given", [True, False])
def test_processes_that_were_left_to_train_a_model_each(is_given, monkeypatch):
    accelerator = Accelerator(cpu=True)  # made before the others are known of, so they stay unknown
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="2 processes were launched together, but .* none of"):
        trainer_of(accelerator=accelerator if is_given else None)


def test_fsdp_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.warns(UserWarning, match="each process holds the whole model"):
        trainer_of(accelerator={"cpu": True})


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is there")
def test_deepspeed_where_it_is_not_installed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ImportError, match="deepspeed isn't installed: pip install .* deepspeed"):
        trainer_of()


@pytest.mark.parametrize(
    ("optimizer", "schedule", "advice"),
    [
        (torch.optim.LBFGS, None, "overrides optimizer_step"),
        (
            torch.optim.SGD,
            torch.optim.lr_scheduler.ReduceLROnPlateau,
            "which steps it",
        ),
    ],
)
def test_what_takes_more_than_a_step(optimizer, schedule, advice):
    model = tiny_model()
    trainer = trainer_of(model, optimizer(model.parameters(), lr=0.1))
    with pytest.raises(TypeError) as failed:
        trainer.train(tiny_data(8), 1, create_scheduler_fn=schedule)
    assert advice in "".join(failed.value.__notes__)


def test_evaluating_nothing():
    with pytest.raises(ValueError, match="evaluate.* needs a dataset"):
        trainer_of().evaluate()


def test_a_schedule_whose_length_nobody_knows():
    loader = DataLoader(tiny_data(), batch_size=4)
    with pytest.raises(Exception, match="nonesuch"):
        trainer_of().train(loader, 1, create_scheduler_fn="nonesuch")


def test_an_unknown_model_name_is_told():
    with pytest.raises(PluginError, match="resnet_of_nowhere"):
        Trainer("resnet_of_nowhere", None, torch.optim.SGD, plugins=())
