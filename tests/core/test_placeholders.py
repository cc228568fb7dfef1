from collections import namedtuple
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from pa_core import Trainer, TrainerPlaceholderValues
from pa_core.placeholders import replace_trainer_placeholder_values
from tests.helpers import tiny_data, tiny_model

NUM_EPOCHS = TrainerPlaceholderValues.NUM_EPOCHS
PER_EPOCH = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def trainer():
    """A trainer after 5 epochs of 3 updates (22 samples in batches of 8)."""
    trainer = make_trainer()
    trainer.train(tiny_data(22), 5, eval_dataset=tiny_data(10))
    return trainer


def make_trainer():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())


def replaced(trainer, *args, **kwargs):
    def arguments(*positional, **named):
        return positional or named

    return replace_trainer_placeholder_values(trainer, partial(arguments, *args, **kwargs))()


def test_each_placeholder_is_replaced_with_its_number(trainer):
    numbers = {member.name: replaced(trainer, member)[0] for member in TrainerPlaceholderValues}
    assert numbers == {
        "NUM_EPOCHS": 5,
        "NUM_UPDATE_STEPS_PER_EPOCH": 3,
        "PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH": 3,
        "NUM_UPDATES": 15,
        "TRAIN_DATALOADER_LEN": 3,
        "EVAL_DATALOADER_LEN": 2,
    }
    assert TrainerPlaceholderValues.placeholder_set() == set(numbers)


@pytest.mark.parametrize(
    ("expression", "number"),
    [
        (NUM_EPOCHS * 2 + 1, 11),
        (2 * NUM_EPOCHS, 10),
        (1 + NUM_EPOCHS * PER_EPOCH, 16),
        ((NUM_EPOCHS + PER_EPOCH) * 2, 16),
        (2 * (1 + NUM_EPOCHS), 12),
        (NUM_EPOCHS - 1, 4),
        (100 - NUM_EPOCHS * PER_EPOCH, 85),
        (NUM_EPOCHS / 2, 2.5),
        (10 / NUM_EPOCHS, 2.0),
        (NUM_EPOCHS // 2, 2),
        (11 // NUM_EPOCHS, 2),
        (-NUM_EPOCHS, -5),
        (NUM_EPOCHS - (NUM_EPOCHS - PER_EPOCH), 3),
    ],
    ids=str,
)
def test_b12_arithmetic_works_in_any_order(trainer, expression, number):
    assert replaced(trainer, expression) == (number,)
    assert replaced(trainer, steps=expression) == {"steps": number}


def test_b12_nested_arguments_are_replaced(trainer):
    inner = partial(dict, steps=PER_EPOCH)
    result = replaced(
        trainer,
        [NUM_EPOCHS, 1],
        (NUM_EPOCHS * 2,),
        {"a": {"b": [PER_EPOCH]}},
        {NUM_EPOCHS},
        inner,
    )
    assert result[:4] == ([5, 1], (10,), {"a": {"b": [3]}}, {5})
    assert result[4]() == {"steps": 3}


def test_arguments_without_placeholders_stay_the_same_objects(trainer):
    Point = namedtuple("Point", "x y")
    instance = object()
    point = Point(1, 2)
    result = replaced(trainer, instance, point, "NUM_EPOCHS")
    assert result[0] is instance
    assert result[1] is point
    assert result[2] == "NUM_EPOCHS"


def test_anything_but_a_partial_is_returned_as_it_is(trainer):
    def function(optimizer):
        return None

    assert replace_trainer_placeholder_values(trainer, function) is function


def test_the_partial_itself_is_not_changed(trainer):
    given = partial(dict, steps=PER_EPOCH)
    replace_trainer_placeholder_values(trainer, given)
    assert given.keywords == {"steps": PER_EPOCH}


def test_b12_no_argument_is_evaluated(trainer):
    class Named:
        name = "NUM_EPOCHS"  # pytorch-accelerated takes this for a placeholder and evaluates it
        value = "1 / 0"

    named = Named()
    assert replaced(trainer, steps=named) == {"steps": named}


def test_a_scheduler_gets_the_numbers_of_its_run():
    trainer = make_trainer()
    trainer.train(
        tiny_data(22),
        4,
        create_scheduler_fn=partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=NUM_EPOCHS * PER_EPOCH
        ),
    )
    assert trainer.scheduler.total_steps == 12


def test_an_unknown_number_is_an_error_that_names_the_placeholder():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(tiny_data(8))

    create_scheduler_fn = partial(torch.optim.lr_scheduler.StepLR, step_size=PER_EPOCH)
    with pytest.raises(ValueError, match="NUM_UPDATE_STEPS_PER_EPOCH"):
        make_trainer().train(Stream(), 1, create_scheduler_fn=create_scheduler_fn)
    create_scheduler_fn = partial(
        torch.optim.lr_scheduler.StepLR, step_size=TrainerPlaceholderValues.EVAL_DATALOADER_LEN
    )
    with pytest.raises(ValueError, match="EVAL_DATALOADER_LEN"):
        make_trainer().train(tiny_data(8), 1, create_scheduler_fn=create_scheduler_fn)


def test_the_repr_of_an_expression_shows_its_operations():
    assert repr(NUM_EPOCHS * 2 + 1) == "add(mul(NUM_EPOCHS, 2), 1)"
