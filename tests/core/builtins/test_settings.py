"""The settings of every built-in are the arguments of its constructor."""

import importlib
import inspect

import pytest
from pydantic import BaseModel, ValidationError

from pa_core.callbacks import EarlyStoppingCallback
from pa_core.durations import Duration
from pa_core.plugins.builtin_names import BUILTINS
from tests.builtin_trainer import make_trainer

REQUIRED = {
    "limit_batches": {"num_batches": 2},
    "limit_eval_steps": {"num_eval_steps": 2},
    "step_evaluation": {"eval_every_n_steps": 5},
}


def builtin(name):
    module, _, attribute = BUILTINS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", BUILTINS)
def test_settings_match_the_constructors_arguments_and_defaults(name):
    cls = builtin(name)
    has_constructor = cls.__init__ is not object.__init__
    parameters = dict(inspect.signature(cls).parameters) if has_constructor else {}
    assert issubclass(cls.Settings, BaseModel)
    assert list(cls.Settings.model_fields.keys() ^ parameters.keys()) == []
    for field, info in cls.Settings.model_fields.items():
        default = parameters[field].default
        if info.is_required():
            assert default is inspect.Parameter.empty
        else:
            expected = info.get_default(call_default_factory=True)
            assert (type(expected)(default) if default else default) == expected
        assert info.description, f"{name}.{field} has no description"


@pytest.mark.parametrize("name", BUILTINS)
def test_each_builtin_can_be_built_from_its_table(name):
    cls = builtin(name)
    table = REQUIRED.get(name, {})
    built = cls.from_settings(cls.Settings(**table))
    assert type(built) is cls
    make_trainer(built)  # this validates its hooks
    with pytest.raises(ValidationError, match="nonesuch"):
        cls.Settings(**table, nonesuch=1)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("early_stopping", "early_stopping_patience", 0),
        ("early_stopping", "early_stopping_threshold", -0.1),
        ("early_stopping", "watch_metric", ""),
        ("checkpoint", "max_checkpoints", 0),
        ("checkpoint", "save_every_n_steps", 0),
        ("checkpoint", "every", "15 minuets"),
        ("limit_batches", "num_batches", 0),
        ("limit_eval_steps", "num_eval_steps", 0),
        ("progress_bar", "interval", 0),
        ("log_metrics", "every", "often"),
        ("step_evaluation", "eval_every_n_steps", "5 meters"),
        ("step_evaluation", "eval_every_n_steps", 0),
    ],
)
def test_invalid_values_are_refused(name, field, value):
    with pytest.raises(ValidationError, match=field):
        builtin(name).Settings(**{**REQUIRED.get(name, {}), field: value})


def test_plain_numbers_mean_updates_as_in_code():
    settings = builtin("step_evaluation").Settings(eval_every_n_steps=5)
    assert settings.eval_every_n_steps == Duration(5, "updates")
    assert builtin("log_metrics").Settings(every=3).every == Duration(3, "updates")
    assert builtin("checkpoint").Settings(every="15 minutes").every == Duration(900.0, "seconds")


def test_a_subclass_with_its_own_constructor_needs_no_settings_class():
    class Patient(EarlyStoppingCallback):
        def __init__(self):
            super().__init__(early_stopping_patience=7)

    assert Patient.from_settings(Patient.Settings()).early_stopping_patience == 7


def test_from_settings_passes_given_values_and_keeps_other_defaults():
    settings = EarlyStoppingCallback.Settings(early_stopping_patience=3, watch_metric="score")
    callback = EarlyStoppingCallback.from_settings(settings)
    assert (callback.early_stopping_patience, callback.watch_metric) == (3, "score")
    assert callback.early_stopping_threshold == 0.01
