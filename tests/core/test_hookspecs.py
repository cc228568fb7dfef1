"""The hooks are documented, testable, and tested."""

import inspect
import re
from pathlib import Path

import pytest

from pa_core import hookspecs
from pa_core.plugins.manager import PluginManager

ROOT = Path(__file__).parents[2]
HOOKS = PluginManager().hooks
TAIL = re.compile(
    r"When: .+\.\s+Runs on: .+\.\s+"
    r"Collectives allowed: (yes|no)\b[^.]*\.\s+"
    r"Reads the device: (yes|no)\b[^.]*\.",
    re.DOTALL,
)
every_hook = pytest.mark.parametrize("name", HOOKS)

EVENTS = """
on_init_end on_training_run_start on_train_epoch_start on_train_step_start on_backward_start
on_backward_end on_optimizer_step_start on_optimizer_step_end on_train_step_end on_train_epoch_end
on_eval_epoch_start on_eval_step_start on_eval_step_end on_eval_epoch_end on_training_run_epoch_end
on_training_run_end on_evaluation_run_start on_evaluation_run_end on_stop_training_error
on_exception on_save_training_state on_save_training_state_error on_load_training_state
""".split()
FIRST_RESULT = """
create_accelerator create_optimizer create_train_dataloader create_eval_dataloader create_scheduler
calculate_train_batch_loss calculate_eval_batch_loss calculate_predictions
run_training run_evaluation
""".split()
REGISTRIES = """
register_schedulers register_models register_metrics register_eval_models
""".split()


def test_these_are_the_hooks_in_the_order_of_a_run():
    assert list(HOOKS) == EVENTS + FIRST_RESULT + REGISTRIES
    assert [name for name, hook in HOOKS.items() if hook.firstresult] == FIRST_RESULT


def test_every_function_of_the_module_is_a_hook():
    functions = [
        name
        for name, value in vars(hookspecs).items()
        if inspect.isfunction(value) and value.__module__ == hookspecs.__name__
    ]
    assert functions == list(HOOKS)


@every_hook
def test_a_hook_is_documented_with_its_arguments_and_the_fixed_tail(name):
    text = inspect.getdoc(HOOKS[name].function) or ""
    assert TAIL.search(text), f"{name} doesn't say when, where, and what it allows"
    assert TAIL.search(text).end() == len(text), f"{name} says something after the tail"
    documented = re.findall(r"^    (\w+): ", text, re.MULTILINE)
    if HOOKS[name].arguments not in ((), ("trainer",)):
        assert documented == list(HOOKS[name].arguments)


@every_hook
def test_a_hook_takes_the_trainer_first_and_has_no_defaults(name):
    parameters = list(inspect.signature(HOOKS[name].function).parameters.values())
    assert all(p.default is p.empty for p in parameters)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    names = [parameter.name for parameter in parameters]
    assert names[:1] == ["trainer"] or name in REGISTRIES


@every_hook
def test_a_hook_is_drawn_in_the_sketch_of_a_run_or_none_of_its_steps(name):
    sketch = re.findall(r"\w+", inspect.getdoc(hookspecs) or "")
    outside = {"on_init_end", "on_stop_training_error", "on_exception"}
    is_step = name in EVENTS and "evaluation_run" not in name and "training_state" not in name
    assert (name in sketch) == (is_step and name not in outside) or name not in EVENTS


@every_hook
def test_a_hook_has_a_test_somewhere(name):
    files = [*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("plugins/*/tests/**/*.py")]
    others = [file.read_text() for file in files if file.name != Path(__file__).name]
    assert any(re.search(rf"\b{name}\b", text) for text in others), f"{name} has no test"


@every_hook
def test_a_hook_reaches_a_plugin_with_all_its_arguments(name):
    given = {argument: object() for argument in HOOKS[name].arguments}
    seen = []

    class Plugin:
        pass

    plugin = Plugin()
    setattr(plugin, name, hookspecs.hookimpl(lambda **arguments: seen.append(arguments)))
    manager = PluginManager()
    manager.register(plugin)
    bound = manager.bind(name)
    assert bound is not None
    bound(**given)
    getattr(manager.hook, name)(**given)
    assert seen == [given, given]
