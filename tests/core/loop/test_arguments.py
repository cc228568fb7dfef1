"""Bad input is reported before training starts: what, where, and what would be right."""

from __future__ import annotations

from functools import partial
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


def test_a_model_without_parameters_can_be_evaluated_but_not_trained():
    trainer = trainer_of(nn.Flatten(0), torch.optim.SGD(tiny_model().parameters(), lr=0.1))
    inputs, targets = torch.arange(6.0)[:, None], torch.zeros(6)
    trainer.loss_func = nn.functional.mse_loss
    found = trainer.evaluate(TensorDataset(inputs, targets), per_device_batch_size=4)
    assert found == {"evaluation_loss": pytest.approx(55 / 6)}
    with pytest.raises(ValueError, match="Flatten has no parameters"):
        trainer.train(tiny_data(), 1)


def test_a_trainer_without_a_model_needs_one_to_run():
    trainer = Trainer(None, None, None, callbacks=(), plugins=())
    assert "model=NoneType" in repr(trainer)
    for run in (trainer.evaluate, trainer.predict, lambda data: trainer.train(data, 1)):
        with pytest.raises(ValueError, match=r"given None as model: assign trainer\.model"):
            run(tiny_data())


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
    with pytest.raises(
        ValueError, match="without batch_size; it has loss and needs loss, batch_size"
    ):
        returning(lambda output: {"loss": output["loss"]}).train(tiny_data(), 1)


class PerSample(Trainer):
    """Its evaluation loss has a value for each sample, or several."""

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        output["loss"] = self.per_sample(output, batch[1])
        return output


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 2)])
def test_an_evaluation_loss_for_each_sample_is_averaged(shape):
    trainer = trainer_of(trainer_class=PerSample)
    targets, losses = torch.arange(44), torch.arange(44.0)
    values = losses.repeat_interleave(2) if shape[1:] == (2,) else losses
    trainer.per_sample = lambda output, targets: values.reshape(shape)[targets]
    seen = []
    trainer.callback_handler.add_callback(Losses(seen))
    data = TensorDataset(tiny_data(44).tensors[0], targets)
    trainer.loss_func = lambda outputs, targets: outputs.sum()
    assert trainer.evaluate(data) == {"evaluation_loss": pytest.approx(21.5)}
    assert [loss.shape for loss in seen] == [()] * 6


class Losses(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_eval_step_end(self, trainer, batch_output):
        self.seen.append(batch_output["loss"])


@pytest.mark.parametrize("more", [{"num_items_in_batch": 3}, {"batch_size": 5}])
def test_an_evaluation_loss_over_other_items_is_refused(more):
    trainer = trainer_of(trainer_class=PerSample)
    trainer.per_sample = lambda output, targets: output.update(more) or torch.ones(len(targets))
    with pytest.raises(TypeError, match=r"calculate_eval_batch_loss returned a tensor of shape"):
        trainer.evaluate(tiny_data())


def test_model_outputs_are_needed_by_those_who_use_them():
    def without(output):
        del output["model_outputs"]
        return output

    trainer = returning(without)
    trainer.train(tiny_data(), 1)
    assert trainer.updates == 6

    class Uses(TrainerCallback):
        def on_train_step_end(self, trainer, batch_output):
            batch_output["model_outputs"]

    trainer.callback_handler.add_callback(Uses)
    with pytest.raises(KeyError) as caught:
        trainer.train(tiny_data(), 1)
    notes = " ".join(caught.value.__notes__)
    assert "Uses" in notes
    assert "returned has no 'model_outputs', which the loop doesn't need" in notes


def test_attributes_of_the_trainer_that_a_subclass_takes_are_named(capsys):
    class Mine(Trainer):
        def training_run_start(self):
            self.num_updates = 3  # harmless: the run's length is run_length.num_updates

        def train_epoch_start(self):
            super().train_epoch_start()
            self.num_updates = len(self._train_dataloader)

    trainer = trainer_of(trainer_class=Mine)
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    trainer.train(tiny_data(16), 4, create_scheduler_fn=schedule)
    assert trainer.updates == 8
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 2**4)
    assert "The run now has" not in capsys.readouterr().out
    trainer.control = "mine"
    with pytest.raises(TypeError, match=r"Mine\.control was replaced by a str"):
        trainer.train(tiny_data(), 1)


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


def test_one_process_where_accelerate_launch_was_asked_for_several(monkeypatch):
    names = ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT")  # what it sets then
    for name, value in zip(names, ("no", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=r"started this process alone.* torchrun"):
        trainer_of(accelerator={"cpu": True})


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
