import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import RandomSampler

from pa_core import Trainer
from pa_core.run_config import TrainerRunConfig
from tests.helpers import tiny_data, tiny_model

# The fields in pytorch-accelerated, which scripts use by name.
EXPECTED_FIELDS = [
    "num_epochs",
    "train_per_device_batch_size",
    "train_dl_kwargs",
    "eval_per_device_batch_size",
    "eval_dl_kwargs",
    "gradient_accumulation_steps",
    "gradient_clip_value",
    "train_total_batch_size",
    "eval_total_batch_size",
    "num_update_steps_per_epoch",
    "num_local_update_steps_per_epoch",
    "max_num_train_steps",
    "is_local_process_zero",
    "is_world_process_zero",
    "is_distributed",
    "mixed_precision",
    "num_processes",
]


def config(**changes):
    fields = dict.fromkeys(EXPECTED_FIELDS, 1)
    return TrainerRunConfig(**{**fields, "train_dl_kwargs": {}, "eval_dl_kwargs": {}, **changes})


def test_it_has_the_fields_of_pytorch_accelerated_and_one_more():
    names = [field.name for field in dataclasses.fields(TrainerRunConfig)]
    assert names == [*EXPECTED_FIELDS, "gradient_clip_norm"]
    assert config().gradient_clip_norm is None


def test_it_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().num_epochs = 2


def test_b11_to_dict_works_without_a_training_dataloader():
    assert config(train_dl_kwargs=None).to_dict()["train_dl_kwargs"] is None


def test_b11_to_dict_makes_a_shallow_copy_of_the_dataloader_arguments():
    generator = torch.Generator()  # can't be copied
    sampler = RandomSampler(range(3), generator=generator)
    first = config(train_dl_kwargs={"sampler": sampler, "batch_size": 8})
    values = first.to_dict()
    assert values["train_dl_kwargs"] == {"sampler": sampler, "batch_size": 8}
    assert first.train_dl_kwargs == {"sampler": sampler, "batch_size": 8}
    values["train_dl_kwargs"]["batch_size"] = 1
    assert first.train_dl_kwargs["batch_size"] == 8


def test_b11_to_dict_works_after_evaluate_alone():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
    trainer.evaluate(tiny_data(8))
    values = trainer.run_config.to_dict()
    assert values["train_dl_kwargs"] is None
    assert values["eval_dl_kwargs"]["batch_size"] == 8


def test_the_maximum_is_filled_in_and_loaders_say_what_they_are():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
    for epochs, given, maximum in ((2, None, 12), (2, 5, 5), ("7 updates", None, 7), (1, 99, 99)):
        trainer.train(tiny_data(44), epochs, eval_dataset=tiny_data(8), max_num_train_steps=given)
        assert trainer.run_config.max_num_train_steps == maximum
    trainer.train(tiny_data(44), "0.01 seconds")
    assert trainer.run_config.max_num_train_steps is None
    trainer.train(tiny_data(44), 1, eval_dataset=tiny_data(8), per_device_batch_size=4)
    for loader in (trainer._train_dataloader, trainer._eval_dataloader):
        assert (loader.batch_size, loader.device) == (4, trainer.device)
    assert trainer._train_dataloader is trainer.train_dataloader
    assert len(trainer._eval_dataloader) == 2
