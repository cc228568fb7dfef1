import types

import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.callbacks import MoveModulesToDeviceCallback
from tests.builtin_trainer import make_trainer
from tests.helpers import tiny_data, tiny_model


class Tracked(nn.Linear):
    """Keeps the devices that it is moved to."""

    def __init__(self):
        super().__init__(1, 1)
        self.moves = []

    def to(self, *args, **kwargs):
        self.moves.append(args)
        return super().to(*args, **kwargs)


def trained(*callbacks, **attributes):
    trainer = make_trainer(MoveModulesToDeviceCallback, *callbacks)
    vars(trainer).update(attributes)
    trainer.train(tiny_data(8), 1)
    return trainer


def test_modules_of_the_trainer_are_moved_once_per_run():
    module = Tracked()
    trainer = trained(teacher=module, also_teacher=module)
    assert module.moves == [(trainer.device,)]
    trainer.evaluate(tiny_data(8))
    assert len(module.moves) == 2


def test_c9_modules_in_containers_are_moved():
    modules = [Tracked() for _ in range(5)]
    first, second, third, fourth, fifth = modules
    trained(a=[first, [second]], b={"x": third, "y": (fourth,)}, c={fifth})
    assert all(len(module.moves) == 1 for module in modules)


def test_c9_modules_of_plugins_are_moved():
    class Holds(TrainerCallback):
        def __init__(self):
            self.metrics = {"accuracy": [Tracked()]}

    class Is(Tracked, TrainerCallback):
        pass

    holds, itself = Holds(), Is()
    plugin = types.ModuleType("one_file_plugin")
    plugin.metric = Tracked()
    plugin.on_init_end = hookimpl(lambda trainer: None)
    trained(holds, itself, plugin)
    assert len(holds.metrics["accuracy"][0].moves) == 1
    assert len(itself.moves) == 1
    assert len(plugin.metric.moves) == 1


def test_c9_no_property_is_evaluated():
    class Careful(Trainer):
        @property
        def expensive(self):
            raise AssertionError("evaluated")

    trainer = make_trainer(MoveModulesToDeviceCallback, trainer_class=Careful)
    trainer.train(tiny_data(8), 1)


def test_the_model_and_its_submodules_are_left_to_accelerate():
    model = nn.Sequential(tiny_model(), nn.Linear(3, 3))
    tracked = Tracked()
    model.add_module("unused", nn.Identity())
    model.unused.inner = tracked
    trainer = make_trainer(MoveModulesToDeviceCallback, model=model)
    trainer.head = tracked
    trainer.parts = [model]
    before = list(tracked.moves)
    callback = trainer.callback_handler.callbacks[0]
    assert callback._get_modules(trainer) == [trainer.loss_func]
    callback._move_modules_to_device(trainer)
    assert tracked.moves == before


def test_containers_that_contain_themselves_are_searched_once():
    loop: list = [Tracked()]
    loop.append(loop)
    trained(loop=loop)
    assert len(loop[0].moves) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_loss_function_with_weights_is_moved_to_the_gpu():
    loss_func = nn.CrossEntropyLoss(weight=torch.ones(3))
    trainer = make_trainer(MoveModulesToDeviceCallback, loss_func=loss_func)
    trainer.train(tiny_data(8), 1)
    assert loss_func.weight.device.type == "cuda"
