"""The hooks are documented, testable, and tested."""

import inspect
import re
from pathlib import Path

import pytest

from pa_core import hookspecs
from pa_core.plugins.explain import loop_rows, read_contract
from pa_core.plugins.manager import PluginManager

ROOT = Path(__file__).parents[2]
HOOKS = PluginManager().hooks
every_hook = pytest.mark.parametrize("name", HOOKS)

EVENTS = """
on_init_end on_training_run_start on_train_epoch_start on_train_step_start on_backward_start
on_backward_end on_gradients_ready on_optimizer_step_start on_optimizer_step_end
on_optimizer_step_skipped on_train_step_end on_train_epoch_end
on_eval_epoch_start on_eval_step_start on_eval_step_end on_eval_epoch_end on_training_run_epoch_end
on_watched_metric on_training_run_end on_evaluation_run_start on_evaluation_run_end
on_predict_step_end
on_stop_training_error on_exception on_save_training_state on_training_state_saved
on_save_training_state_error on_load_training_state
""".split()
FIRST_RESULT = """
create_accelerator create_optimizer create_train_dataloader create_eval_dataloader create_scheduler
calculate_train_batch_loss calculate_eval_batch_loss calculate_predictions
run_training run_update run_evaluation run_prediction
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
def test_a_hook_is_documented_with_its_arguments_and_its_contract(name):
    text = inspect.getdoc(HOOKS[name].function) or ""
    fields = read_contract(text).fields
    assert list(fields) == ["When", "Runs on", "Collectives allowed", "Reads the device"]
    assert all(value.endswith(".") for value in fields.values())
    for label in ("Collectives allowed", "Reads the device"):
        assert re.match(r"(yes|no)\b", fields[label]), label
    documented = re.findall(r"^    (\w+): ", text, re.MULTILINE)
    if HOOKS[name].arguments not in ((), ("trainer",)):
        assert documented == list(HOOKS[name].arguments)


@every_hook
def test_in_the_loops_over_batches_nothing_waits_and_elsewhere_it_may(name):
    """The rule in the module's docstring, from which readers know most of the contracts."""
    (row,) = [row for row in loop_rows() if row.hook == name]
    fields = read_contract(HOOKS[name].function.__doc__).fields
    allowed = [
        fields[label][:3].strip(".,") for label in ("Collectives allowed", "Reads the device")
    ]
    is_per_batch = any("batch" in phase for phase in row.phases)
    exceptions = {
        "run_update": ["yes", "no"],
        "create_optimizer": ["no", "yes"],
        "on_exception": ["no", "yes"],
        "on_save_training_state_error": ["no", "yes"],
    }
    neither = is_per_batch or name in REGISTRIES[:3]
    assert allowed == exceptions.get(name, ["no", "no"] if neither else ["yes", "yes"])


@every_hook
def test_a_hook_takes_the_trainer_first_and_has_no_defaults(name):
    parameters = list(inspect.signature(HOOKS[name].function).parameters.values())
    assert all(p.default is p.empty for p in parameters)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    names = [parameter.name for parameter in parameters]
    assert names[:1] == ["trainer"] or name in REGISTRIES


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
    result = object() if HOOKS[name].must_return else None

    def call(**arguments):
        seen.append(arguments)
        return result

    setattr(plugin, name, hookspecs.hookimpl(call))
    manager = PluginManager()
    manager.register(plugin)
    bound = manager.bind(name)
    assert bound is not None
    bound(**given)
    getattr(manager.hook, name)(**given)
    assert seen == [given, given]
