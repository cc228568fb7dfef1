import ast
import copy
import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

import pa_core
from pa_core import StopTrainingError, Trainer, TrainerCallback, callbacks, hookspecs
from pa_core.callbacks import CallbackHandler, get_default_callbacks
from pa_core.errors import PluginError, PluginValidationError
from pa_core.plugins.builtin_names import BUILTINS, DEFAULTS
from pa_core.plugins.manager import PluginManager
from tests.helpers import tiny_data, tiny_model

RELATIVES_NAMES = [
    "CallbackHandler",
    "EarlyStoppingCallback",
    "LimitBatchesCallback",
    "LimitEvalStepsCallback",
    "LogMetricsCallback",
    "MoveModulesToDeviceCallback",
    "PrintProgressCallback",
    "ProgressBarCallback",
    "SaveBestModelCallback",
    "SaveTrainingStateCallback",
    "StepBasedEvaluationCallback",
    "StopTrainingError",
    "TerminateOnNaNCallback",
    "TrainerCallback",
    "get_default_callbacks",
]


def make_trainer(*given, **kwargs):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=given, plugins=(), **kwargs)


def test_the_relatives_names_are_here():
    for name in RELATIVES_NAMES:
        assert getattr(callbacks, name).__name__ == name
    assert callbacks.StopTrainingError is StopTrainingError
    assert pa_core.TrainerCallback is TrainerCallback
    with pytest.raises(AttributeError, match="Nonesuch"):
        _ = callbacks.Nonesuch


def test_every_builtin_is_where_it_is_said_to_be_and_in_a_file_of_its_name():
    for name, target in BUILTINS.items():
        module, _, attribute = target.partition(":")
        assert module == f"pa_core.builtins.{name}"
        assert issubclass(getattr(importlib.import_module(module), attribute), TrainerCallback)
        assert attribute in callbacks.__all__
    assert set(DEFAULTS) <= set(BUILTINS)


def test_the_default_callbacks_show_a_table_in_place_of_the_relatives_lines_and_bars():
    names = [callback.__name__ for callback in get_default_callbacks()]
    assert names == [
        "MoveModulesToDeviceCallback",
        "TerminateOnNaNCallback",
        "ProgressTableCallback",
    ]
    *others, table = get_default_callbacks(progress_bar=False)
    assert [callback.__name__ for callback in others] == names[:2]
    assert (table.bar, table.rows, table.summary) == (False, True, True)


def test_what_is_not_asked_for_is_not_imported():
    code = (
        "import sys; from pa_core.callbacks import LogMetricsCallback; "
        "print([name for name in sys.modules if name.startswith('pa_core.builtins.')])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert shown.strip() == "['pa_core.builtins.log_metrics']"


def test_the_list_of_builtins_needs_no_torch():
    code = (
        "import sys, pa_core.plugins.builtin_names, pa_core.control; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'accelerate', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_method_of_the_base_class_is_no_implementation_but_super_finds_it():
    class Polite(TrainerCallback):
        def on_train_epoch_end(self, trainer, **kwargs):
            super().on_train_epoch_end(trainer, **kwargs)

    manager = PluginManager()
    manager.register(Polite)
    implemented = [name for name in manager.hooks if manager.bind(name) is not None]
    assert implemented == ["on_train_epoch_end"]
    manager.hook.on_train_epoch_end(trainer=None)


def test_editors_see_every_event():
    """The names for editors are those of the hookspecs, in their order."""
    tree = ast.parse(inspect.getsource(callbacks))
    (base,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "TrainerCallback"
    )
    seen = [node.name for node in ast.walk(base) if isinstance(node, ast.FunctionDef)]
    assert seen == [name for name in vars(hookspecs) if name.startswith("on_")]


def test_a1_an_attribute_that_is_not_there_is_an_error():
    callback = TrainerCallback()
    with pytest.raises(AttributeError, match="metrcs"):
        _ = callback.metrcs


def test_b13_callbacks_can_be_copied_and_asked_for_attributes():
    class Mine(TrainerCallback):
        def __init__(self):
            self.seen = [1]

    first = Mine()
    second = copy.deepcopy(first)
    second.seen.append(2)
    assert first.seen == [1]
    assert not hasattr(first, "on_nonesuch")


def test_the_handler_shows_the_trainers_callbacks_in_order():
    class Mine(TrainerCallback):
        pass

    first, second = Mine(), callbacks.PrintProgressCallback()
    trainer = make_trainer(first, second)
    handler = trainer.callback_handler
    assert list(handler) == handler.callbacks == [first, second]
    assert handler.callback_list == ["Mine", "PrintProgressCallback"]


def test_callbacks_that_are_added_later_are_called_and_cleared_ones_are_not():
    log = []

    class Mine(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            log.append(type(self).__name__)

    class Late(Mine):
        pass

    trainer = make_trainer(Mine)
    trainer.callback_handler.add_callbacks([Late, Mine()])  # two of one class are welcome
    trainer.train(tiny_data(8), 1)
    assert log == ["Mine", "Late", "Mine"]
    trainer.callback_handler.clear_callbacks()
    trainer.train(tiny_data(8), 1)
    assert log == ["Mine", "Late", "Mine"]
    assert trainer.callback_handler.callbacks == []


def test_a_handler_of_ones_own_calls_its_callbacks():
    seen = []

    class Mine(TrainerCallback):
        def on_eval_epoch_end(self, trainer, is_intermediate):
            seen.append((trainer, is_intermediate))

    trainer = make_trainer()
    CallbackHandler([Mine]).call_event("on_eval_epoch_end", trainer, is_intermediate=True)
    assert seen == [(trainer, True)]
    assert trainer.callback_handler.callbacks == []


def test_an_event_by_any_name_reaches_every_callback_that_has_it():
    seen = []

    class Mine(TrainerCallback):
        def verify_batch(self, trainer, batch):
            seen.append((trainer, batch))

    class Other(TrainerCallback):
        pass

    trainer = make_trainer(Mine, Other)
    trainer.callback_handler.call_event("verify_batch", trainer, batch=3)
    assert seen == [(trainer, 3)]


def test_a_mistyped_event_is_an_error_that_names_the_nearest():
    class Mistyped(TrainerCallback):
        def on_trian_epoch_end(self, trainer):
            pass

    with pytest.raises(PluginValidationError, match="on_train_epoch_end"):
        make_trainer(Mistyped)


def test_a_class_that_cannot_be_built_is_an_error_that_names_it():
    with pytest.raises(PluginError, match="LimitBatchesCallback"):
        make_trainer().callback_handler.add_callback(callbacks.LimitBatchesCallback)


def test_an_event_of_ones_own_takes_the_trainer_by_name_too():
    class Verify(TrainerCallback):
        def verify_batch(self, trainer, batch):
            self.seen = trainer, batch

    callback = Verify()
    trainer = Trainer(tiny_model(), None, None, callbacks=[callback], plugins=())
    trainer.callback_handler.call_event("verify_batch", trainer=trainer, batch=7)
    assert callback.seen == (trainer, 7)
    trainer.callback_handler.call_event("verify_batch", trainer, batch=8)
    assert callback.seen == (trainer, 8)


def test_an_event_of_ones_own_needs_no_trainer():
    class Verify(TrainerCallback):
        def verify_batch(self, *args, **kwargs):
            seen.append((args, kwargs))

    seen = []
    trainer = Trainer(tiny_model(), None, None, callbacks=[Verify], plugins=())
    call = trainer.callback_handler.call_event
    call("verify_batch", 1, 2, size=3)
    call("verify_batch")
    assert seen == [((1, 2), {"size": 3}), ((), {})]
    call("on_train_epoch_start", trainer)
    with pytest.raises(TypeError, match="takes the trainer by position and the other arguments by"):
        call("on_train_step_start", trainer, None, 0)


def test_the_list_of_callbacks_adds_and_removes_them():
    seen = []

    class Named(TrainerCallback):
        def __init__(self, name):
            self.name = name

        def greet(self):
            seen.append(self.name)

    one, two, three = Named("one"), Named("two"), Named("three")
    trainer = Trainer(tiny_model(), None, None, callbacks=[one], plugins=())
    handler = trainer.callback_handler
    handler.callbacks.append(three)
    handler.callbacks.insert(1, two)
    assert handler.callbacks == [one, two, three]
    handler.call_event("greet")
    assert seen == ["one", "two", "three"]
    assert handler.callbacks.pop(0) is one
    handler.callbacks[0] = one
    handler.callbacks.remove(three)
    handler.call_event("greet")
    assert seen[3:] == ["one"]
    with pytest.raises(TypeError, match="one at a time"):
        handler.callbacks[:] = []
    handler.callbacks.clear()
    handler.call_event("greet")
    assert len(seen) == 4
    assert list(trainer.plugins.by_name) == []


def test_another_handler_is_refused_as_nothing_would_call_it():
    trainer = make_trainer()
    with pytest.raises(AttributeError, match="property 'callback_handler' of 'Trainer'"):
        trainer.callback_handler = callbacks.CallbackHandler([])
