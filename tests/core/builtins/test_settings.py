"""What all built-ins have in common: settings that are those of their constructors."""

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
def test_settings_are_the_constructors_arguments_with_the_same_defaults(name):
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
            assert (
                type(info.default)(default) == info.default
                if default
                else (default == info.default)
            )
        assert info.description, f"{name}.{field} says nothing about itself"


@pytest.mark.parametrize("name", BUILTINS)
def test_each_builtin_can_be_built_from_its_table(name):
    cls = builtin(name)
    table = REQUIRED.get(name, {})
    built = cls.from_settings(cls.Settings(**table))
    assert type(built) is cls
    make_trainer(built)  # its hooks are right
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
def test_values_that_make_no_sense_are_refused_before_training(name, field, value):
    with pytest.raises(ValidationError, match=field):
        builtin(name).Settings(**{**REQUIRED.get(name, {}), field: value})


def test_plain_numbers_mean_updates_where_code_says_so():
    settings = builtin("step_evaluation").Settings(eval_every_n_steps=5)
    assert settings.eval_every_n_steps == Duration(5, "updates")
    assert builtin("log_metrics").Settings(every=3).every == Duration(3, "updates")
    assert builtin("checkpoint").Settings(every="15 minutes").every == Duration(900.0, "seconds")


def test_a_subclass_with_a_constructor_of_its_own_needs_no_settings_of_its_own():
    class Mine(EarlyStoppingCallback):
        def __init__(self):
            super().__init__(early_stopping_patience=7)

    assert Mine.from_settings(Mine.Settings()).early_stopping_patience == 7


def test_settings_give_what_was_set_and_defaults_for_the_rest():
    settings = EarlyStoppingCallback.Settings(early_stopping_patience=3, watch_metric="score")
    callback = EarlyStoppingCallback.from_settings(settings)
    assert (callback.early_stopping_patience, callback.watch_metric) == (3, "score")
    assert callback.early_stopping_threshold == 0.01
