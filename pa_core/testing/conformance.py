"""A test suite that every plugin should pass."""

from __future__ import annotations

import fnmatch
import inspect
import math
import os
import shutil
import tempfile
import unittest
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from pa_core.checkpoint.codec import encode
from pa_core.diagnostics.stopwatch import Stopwatch
from pa_core.errors import NOT_SAVED, SettingsError, TrainingStateError, nearest
from pa_core.settings.build import build_from_table
from pa_core.settings.schema import table_schema
from pa_core.settings.validation import settings_model
from pa_core.testing.companions import (
    EVENTS,
    DeliberateError,
    Logs,
    Raises,
    Records,
    Saves,
)
from pa_core.testing.left_behind import Graphs, Seeds, Surroundings, hooks_of, new_hooks
from pa_core.testing.processes import find, place_of, run_on_processes
from pa_core.testing.recorder import HookRecorder
from pa_core.testing.tiny import BATCH, tiny_data, tiny_model, tiny_trainer
from pa_core.testing.watching import STEP_HOOKS, Reads, call_within

if TYPE_CHECKING:
    from pa_core import Trainer
    from pa_core.plugins.implementations import Call, Implementation

_Equality = Callable[[Any, Any], bool]
_EVENTS = [event for event in EVENTS if event not in ("on_init_end", "on_exception")]
_UNKNOWN_KEY = "no_plugin_has_this_setting"
_TIMED_RUNS = 5
_EPOCHS = 2


@dataclass(frozen=True)
class Outcome:
    """The result of a run: the weights of the model, and the values of each metric."""

    weights: dict[str, Tensor]
    history: dict[str, list[Any]]


class PluginConformance:
    """Tests of one plugin, for pytest: subclass it and set `plugin`.

    Each test trains a tiny model in an empty folder, with the plugin alone or beside another one.
    List a test that doesn't apply in `exempt`, with the reason. To change the run, override
    `make_plugin`, `make_model`, `make_data`, `make_trainer` or `train`.

    Attributes:
        plugin: the plugin's class or module, or a function that makes one.
        settings: its table, as in ``[tool.pa-core.NAME]``.
        train_arguments: further arguments of ``Trainer.train``, such as ``create_scheduler_fn``.
        exempt: the tests that don't apply, by name (without ``test_``), each with the reason.
        measured_metrics: names or patterns of metrics that differ from run to run, such as times.
        max_microseconds_per_step: the time that the plugin may add to a training step, in
            microseconds; None skips the test.
        processes: the number of processes in the distributed test.

    >>> from pa_core.builtins.terminate_on_nan import TerminateOnNaNCallback
    >>> class TestTerminateOnNaN(PluginConformance):
    ...     plugin = TerminateOnNaNCallback
    """

    plugin: ClassVar[Any]
    settings: ClassVar[Mapping[str, Any]] = {}
    train_arguments: ClassVar[Mapping[str, Any]] = {}
    exempt: ClassVar[Mapping[str, str]] = {}
    measured_metrics: ClassVar[tuple[str, ...]] = ()
    max_microseconds_per_step: ClassVar[float | None] = None
    processes: ClassVar[int] = 2

    def __init_subclass__(cls) -> None:
        tests = [name.removeprefix("test_") for name in dir(cls) if name.startswith("test_")]
        for name, reason in cls.exempt.items():
            if name not in tests:
                raise TypeError(
                    f"{cls.__name__}.exempt: unknown test {name!r}.{nearest(name, tests)}"
                )
            if not reason.strip():
                raise TypeError(
                    f"{cls.__name__}.exempt: give the reason why {name!r} doesn't apply"
                )

    # -- The plugin and its run, which subclasses may override ----------------------------------

    def make_plugin(self) -> Any:
        """Make a new instance of the plugin from its settings."""
        declared = self._declared_plugin()
        if inspect.isfunction(declared):
            return declared()
        return build_from_table(declared, self.settings)

    def _declared_plugin(self) -> Any:
        found = inspect.getattr_static(type(self), "plugin", None)
        found = found.__func__ if isinstance(found, staticmethod) else found
        if not (inspect.isclass(found) or inspect.ismodule(found) or inspect.isfunction(found)):
            raise TypeError(
                f"{type(self).__name__}.plugin must be the plugin's class or module, or a function "
                f"that makes a new one, not {found!r}"
            )
        return found

    def make_model(self) -> nn.Module:
        """Make a model, with the same weights each time; its forward pass may be random."""
        return tiny_model(dropout=0.1)

    def make_data(self, samples: int) -> Any:
        """Make a dataset of this many samples, the same each time."""
        return tiny_data(samples)

    def make_trainer(self, *plugins: Any) -> Trainer:
        """Make a trainer with a new model and only these plugins."""
        return tiny_trainer(*plugins, model=self.make_model())

    def train(self, trainer: Trainer, **arguments: Any) -> None:
        """Train for two epochs, each with an evaluation.

        Args:
            trainer: the trainer.
            **arguments: arguments of ``Trainer.train``, which override all others.
        """
        given = {
            "train_dataset": self.make_data(44),  # 11 batches, so the last window has a single one
            "num_epochs": _EPOCHS,
            "eval_dataset": self.make_data(14),
            "per_device_batch_size": max(1, BATCH // trainer.num_processes),
            "gradient_accumulation_steps": 2,
        }
        trainer.train(**(given | dict(self.train_arguments) | arguments))

    def outcome(self, *plugins: Any, **arguments: Any) -> Outcome:
        """Train a new model with these plugins, and return the result."""
        trainer = self.make_trainer(*plugins)
        self.train(trainer, **arguments)
        return self.outcome_of(trainer)

    def outcome_of(self, trainer: Trainer) -> Outcome:
        """The result of a trainer's last run, without the measured metrics."""
        model = trainer.get_model(keep_torch_compile=False)
        history = {
            name: list(trainer.run_history.get_metric_values(name))
            for name in trainer.run_history.get_metric_names()
            if not any(fnmatch.fnmatch(name, measured) for measured in self.measured_metrics)
        }
        return Outcome({k: v.detach().clone() for k, v in model.state_dict().items()}, history)

    def shared_outcome(self) -> Outcome:
        """The result of a run with the plugin on all processes."""
        return self._shared_outcome(self.make_plugin())

    def _shared_outcome(self, *plugins: Any) -> Outcome:
        trainer = self.make_trainer(*plugins)
        for module in trainer.get_model().modules():
            # Dropout draws, and batch norms calculate, differently on each process.
            module.eval()
            module.train = MethodType(_stay_in_evaluation_mode, module)
        self.train(trainer)
        return self.outcome_of(trainer)

    # -- Set-up and tear-down -------------------------------------------------------------------

    def setup_method(self, method: Callable[..., Any]) -> None:
        """Skip an exempt test, and change to an empty folder."""
        reason = self.exempt.get(method.__name__.removeprefix("test_"))
        if reason:
            raise unittest.SkipTest(reason)
        self._folder, self._before = Path(tempfile.mkdtemp(prefix="pa-core-")), Path.cwd()
        os.chdir(self._folder)
        self._surroundings = Surroundings()

    def teardown_method(self) -> None:
        """Restore what the plugin has changed in this process, change back, remove the folder."""
        self._surroundings.restore()
        os.chdir(self._before)
        shutil.rmtree(self._folder)

    # -- The tests ------------------------------------------------------------------------------

    def test_builds_from_its_settings(self) -> None:
        """It can be built from its settings table, which `pa schema` can describe."""
        try:
            plugin = self.make_plugin()
        except SettingsError as error:
            _fail(f"The settings {dict(self.settings)} are invalid: {error}")
        self.make_trainer(plugin)  # the names of hooks and arguments are checked here
        model = settings_model(type(plugin))
        if model is not None:
            try:
                table_schema(model, "plugin", {})
            except Exception as error:  # noqa: BLE001 - reported as a failure
                _fail(f"`pa schema` can't describe the settings: {error}")

    def test_refuses_an_unknown_setting(self) -> None:
        """A mistyped key is an error, not ignored."""
        declared = self._declared_plugin()
        if settings_model(declared) is None:
            raise unittest.SkipTest("it has no settings, so every key is an error")
        try:
            build_from_table(declared, {**self.settings, _UNKNOWN_KEY: 1})
        except SettingsError:
            return
        _fail("Unknown keys are accepted, which hides typos: don't set extra='allow'")

    def test_trains_twice(self) -> None:
        """One instance can run twice with equal results, and cleans up after itself."""
        start, plugin = Surroundings(), self.make_plugin()
        trainer = self.make_trainer(plugin)
        self.train(trainer)
        first, before = self.outcome_of(trainer), self._surroundings_again(start)
        second = self.outcome(plugin)
        _assert_left_nothing(before, "A run")
        _assert_equal(first, second, "A second run with the same instance differs from the first")
        self.train(trainer)  # continues from the trained weights
        self._check_what_a_run_leaves()

    def _surroundings_again(self, start: Surroundings) -> Surroundings:
        """The surroundings after a first run, in which modules are imported.

        What that run has changed in the process since `start` is restored: a plugin changes it
        again in each run.
        """
        start.restore()
        return Surroundings()

    def _check_what_a_run_leaves(self) -> None:
        """Fail if a run of a new instance leaves anything in the process or on the model."""
        before, seeds = Surroundings(), Seeds()
        with seeds.within("Building the plugin"):
            plugin = self.make_plugin()
        trainer = self.make_trainer(plugin)
        changed = before.changed_settings()
        assert not changed, f"Building the plugin changes the process: {'; '.join(changed)}"
        before = Surroundings()  # a plugin may open files and start threads
        model = trainer.get_model(keep_torch_compile=False)
        hooks = hooks_of(model)
        _instrument(trainer, plugin, partial(call_within, context=seeds.within))
        with Graphs() as graphs:
            self.train(trainer)
        left = new_hooks(hooks, model)
        assert not left, f"A run doesn't clean up: {'; '.join(left)}"
        _assert_left_nothing(before, "A run")
        assert not seeds.found, (
            f"{'; '.join(seeds.found)}, so others draw the same numbers again and again. Draw from "
            "trainer.rng(), or from your own generator"
        )
        assert graphs.alive() <= self._graphs_without_plugin(graphs), (
            "It keeps the autograd graph of a step: call detach() on a tensor before you keep it"
        )

    def _graphs_without_plugin(self, graphs: Graphs) -> int:
        """The number of graphs that the model itself keeps; asked for only if any is kept."""
        if not graphs.alive():
            return 0
        with suppress(Exception), Graphs() as without:  # the plugin may be what makes it train
            self.train(self.make_trainer())
            return without.alive()
        return 0

    def test_evaluates_alone(self) -> None:
        """`evaluate` and `predict` work without a training run, and change no weights."""
        start, trainer = Surroundings(), self.make_trainer(self.make_plugin())
        before = self.outcome_of(trainer).weights
        model = trainer.get_model(keep_torch_compile=False)
        data, hooks = self.make_data(14), hooks_of(model)
        for is_first in (True, False):
            surroundings = self._surroundings_again(start)
            values = trainer.evaluate(data, per_device_batch_size=BATCH)
            assert "evaluation_loss" in values, f"evaluate() recorded no evaluation_loss: {values}"
            trainer.predict(data, per_device_batch_size=BATCH)
            if not is_first:
                _assert_left_nothing(surroundings, "evaluate() or predict()")
        left = new_hooks(hooks, model)
        assert not left, f"evaluate() or predict() doesn't clean up: {'; '.join(left)}"
        after = self.outcome_of(trainer).weights
        differing = _differing(before, after, _same)
        assert not differing, f"evaluate() or predict() changed the model: {differing}"

    def test_survives_exceptions(self) -> None:
        """If another plugin raises, this one cleans up and can run again."""
        start, plugin = Surroundings(), self.make_plugin()
        first, before = self.outcome(plugin), self._surroundings_again(start)
        for event in _EVENTS:
            for last in (False, True):
                where = f"A run in which another plugin raises in {event}"
                left = self._fail_in(event, plugin, last=last)
                assert not left, f"{where} doesn't clean up: {'; '.join(left)}"
                _assert_left_nothing(before, where)
        again = self.outcome(plugin)
        _assert_equal(first, again, "After failed runs, a run with the same instance differs")

    def _fail_in(self, event: str, plugin: Any, *, last: bool) -> list[str]:
        """Raise in an event; returns what the run leaves on the model."""
        raising = Raises(event, last=last)
        plugins = (plugin, raising) if last else (raising, plugin)
        trainer = self.make_trainer(*plugins)
        model = trainer.get_model(keep_torch_compile=False)
        hooks = hooks_of(model)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.filterwarnings("always", NOT_SAVED)
                if event.startswith("on_evaluation_run"):
                    trainer.evaluate(self.make_data(14), per_device_batch_size=BATCH)
                else:
                    self.train(trainer, num_epochs=1)
                    trainer.save_training_state("failed")
                    trainer.load_training_state("failed")
        except DeliberateError as error:
            notes = [n for n in getattr(error, "__notes__", ()) if n.startswith("Then ")]
            assert not notes, f"After another plugin raised in {event}: {' '.join(notes)}"
        except Exception as error:
            raise AssertionError(
                f"The exception of another plugin in {event} was replaced by {error!r}"
            ) from error
        else:
            # A run continues without the state that a plugin asked for, and reports why.
            is_reported = any(DeliberateError.__name__ in str(one.message) for one in caught)
            is_lost = raising.has_raised and not is_reported
            assert not is_lost, f"The exception of another plugin in {event} was lost"
        return new_hooks(hooks, model)

    def test_keeps_state_as_plain_data(self) -> None:
        """The result of `state_dict` can be saved, and restores the same state."""
        plugin = self.make_plugin()
        has = [hasattr(plugin, name) for name in ("state_dict", "load_state_dict")]
        assert all(has) or not any(has), "It implements only one of state_dict and load_state_dict"
        if not any(has):
            raise unittest.SkipTest("it has no state")
        trainer = self.make_trainer(plugin)
        self.train(trainer)
        state, tensors = _encode(plugin.state_dict())
        trainer.save_training_state("state")
        other = self.make_plugin()
        trainer = self.make_trainer(other)
        self.train(trainer, max_num_train_steps=3)
        trainer.load_training_state("state")
        restored, other_tensors = _encode(other.state_dict())
        assert _same(restored, state), f"The state {state} is restored as {restored}"
        differing = _differing(tensors, other_tensors, _same)
        assert not differing, f"A tensor of the state is restored with other values: {differing}"

    def test_resumes_exactly(self) -> None:
        """A run that is resumed at any point gives the uninterrupted result, bit for bit."""
        saver = Saves(self._folder / "states")
        whole = self.outcome(self.make_plugin(), saver)
        states = sorted(saver.folder.iterdir()) if saver.folder.exists() else []
        assert states, "No training state was saved: does the plugin end the run at once?"
        for state in states:
            resumed = self.outcome(self.make_plugin(), resume_from=state)
            _assert_equal(
                whole,
                resumed,
                f"The run resumed from {state.name} differs from the uninterrupted one. Return "
                "all that the plugin remembers from state_dict()",
            )

    def test_keeps_order(self) -> None:
        """The result doesn't depend on its place in the list, and others keep their order."""
        log: list[tuple[str, str]] = []
        self.train(self.make_trainer(Logs("1", log), self.make_plugin(), Logs("2", log)))
        opened: list[str] = []
        for name, event in log:
            if name == "1":
                opened.append(event)
            else:
                latest = opened.pop() if opened else None
                assert latest == event, (
                    f"Two other plugins, listed before and after this one, were called in {event} "
                    "in a different order from the list"
                )
        assert not opened, (
            f"{opened[-1]} didn't reach the plugin that is listed after this one. To end a run, "
            "call trainer.control.stop()"
        )
        first = self.outcome(self.make_plugin(), Records())
        last = self.outcome(Records(), self.make_plugin())
        _assert_equal(
            first,
            last,
            "The result depends on the plugin's place in the list. Use trylast=True for a hook "
            "that reads what others record, and tryfirst=True for one whose results others use",
        )

    def test_does_not_synchronise(self) -> None:
        """It reads no tensor in a step, which would be a host-device synchronisation."""
        plugin = self.make_plugin()
        trainer = self.make_trainer(plugin)
        reads = Reads(trainer)
        self.train(trainer, num_epochs=1)  # one-time costs aren't costs of a step
        _instrument(trainer, plugin, partial(call_within, context=reads.within))
        self.train(trainer)
        found = "\n".join(reads.found)
        assert not found, (
            f"Tensors are read in a step, so the host waits for the device:\n{found}\n"
            "Add them up on the device, and read the sum at the end of the epoch"
        )

    def test_leaves_training_unchanged(self) -> None:
        """Training with it gives the same weights and losses as training without it."""
        without, with_it = self.outcome(), self.outcome(self.make_plugin())
        shared = {name: with_it.history.get(name, []) for name in without.history}
        _assert_equal(
            without,
            Outcome(with_it.weights, shared),
            "Training with the plugin differs from training without it",
        )

    def test_works_on_two_processes(self) -> None:
        """On several processes, each records what a single process records, up to rounding."""
        check_on_processes([type(self)], self.processes)

    def test_costs_little(self) -> None:
        """Its hooks take at most `max_microseconds_per_step` of a training step."""
        limit = self.max_microseconds_per_step
        if limit is None:
            raise unittest.SkipTest("max_microseconds_per_step is not set")
        plugin, times = self.make_plugin(), []
        for _ in range(_TIMED_RUNS):
            watch, recorder = Stopwatch(), HookRecorder()
            trainer = self.make_trainer(plugin, recorder)
            _instrument(trainer, plugin, partial(_timed_in_training_steps, watch))
            self.train(trainer, gradient_accumulation_steps=1)
            seconds = sum(spent.seconds for spent in watch.spent.values())
            times.append(seconds * 1e6 / max(1, recorder.count("on_train_step_end")))
        best = min(times)  # other load on the machine only adds time
        assert best <= limit, (
            f"A step takes {best:.1f} µs, more than max_microseconds_per_step = {limit:g}"
        )


# -- On several processes -------------------------------------------------------------------------


def check_on_processes(test_classes: Sequence[type[PluginConformance]], processes: int = 2) -> None:
    """Fail unless each plugin records the same on several processes as on a single one.

    This is ``works_on_two_processes`` for several classes; the processes start only once.

    Args:
        test_classes: the plugins' test classes, each at the top level of its module.
        processes: the number of processes.
    """
    outcomes = _outcomes_on_processes(test_classes, processes)
    for test_class, ranks in zip(test_classes, outcomes, strict=True):
        suite = test_class()
        try:
            check_processes(suite.shared_outcome(), ranks)
        except AssertionError as error:
            # Not the plugin's fault if the model, the loss or the data do the same without it.
            (others,) = _outcomes_on_processes([test_class], processes, without_plugin=True)
            try:
                check_processes(suite._shared_outcome(), others)
            except AssertionError:
                _check_ranks(ranks)
            else:
                error.add_note(f"in {test_class.__name__}")
                raise


def _outcomes_on_processes(
    test_classes: Sequence[type[PluginConformance]], processes: int, *, without_plugin: bool = False
) -> list[list[Outcome]]:
    """The outcomes of each class by rank."""
    places = [place_of(test_class) for test_class in test_classes]
    results = run_on_processes(_outcomes, processes, places, without_plugin)
    return [[Outcome(*rank[number]) for rank in results] for number in range(len(places))]


def _outcomes(
    places: list[tuple[str, str, str]], without_plugin: bool
) -> list[tuple[dict[str, Tensor], dict[str, list[Any]]]]:
    """The outcomes of the test classes on this process."""
    suites = [find(*place)() for place in places]
    outcomes = [
        suite._shared_outcome() if without_plugin else suite.shared_outcome() for suite in suites
    ]
    return [(outcome.weights, outcome.history) for outcome in outcomes]


def check_processes(one: Outcome, outcomes: Sequence[Outcome]) -> None:
    """Fail unless all processes have the same history, and it is that of a single process.

    Args:
        one: the outcome on a single process.
        outcomes: the outcomes on several processes, by rank. They may differ from `one` by
            rounding.
    """
    _check_ranks(outcomes)
    for rank, outcome in enumerate(outcomes):
        where = f"Process {rank} of {len(outcomes)}"
        differing = _differing(one.history, outcome.history, _close)
        assert not differing, f"{where} and a single process record different values: {differing}"
        differing = _differing(one.weights, outcome.weights, _close)
        assert not differing, f"{where} and a single process have different weights: {differing}"


def _check_ranks(outcomes: Sequence[Outcome]) -> None:
    """Fail unless all processes have the same history."""
    for rank, outcome in enumerate(outcomes):
        differing = _differing(outcomes[0].history, outcome.history, _same)
        assert not differing, (
            f"Process {rank} of {len(outcomes)} and process 0 record different values: {differing}"
        )


# -- Helpers --------------------------------------------------------------------------------------


def _stay_in_evaluation_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _fail(message: str) -> NoReturn:
    raise AssertionError(message)


def _instrument(trainer: Trainer, plugin: Any, around: Callable[[Implementation], Call]) -> None:
    (name,) = [name for name, found in trainer.plugins.by_name.items() if found is plugin]

    def around_this(found: Implementation) -> Call:
        return around(found) if found.name == name else found.call

    trainer.plugins.wrap_calls(around_this)


def _timed_in_training_steps(watch: Stopwatch, found: Implementation) -> Call:
    if found.hook not in STEP_HOOKS or "_eval_" in found.hook:
        return found.call
    timed = watch.timed_wrapper if found.wrapper else watch.timed
    return timed(found.hook, found.call)


def _assert_left_nothing(before: Surroundings, what: str) -> None:
    changes = before.changes()
    assert not changes, f"{what} doesn't clean up: {'; '.join(changes)}"


def _assert_equal(first: Outcome, second: Outcome, message: str) -> None:
    differing = _differing(first.history, second.history, _same) or _differing(
        first.weights, second.weights, _same
    )
    assert not differing, f"{message}. {differing}"


def _differing(first: Mapping[str, Any], second: Mapping[str, Any], is_equal: _Equality) -> str:
    """Describe the first entry that differs between two mappings; empty if they are equal."""
    for name in dict.fromkeys([*first, *second]):
        if name not in first or name not in second:
            return f"{name!r} is missing in one of them"
        if not is_equal(first[name], second[name]):
            return f"{name}: {first[name]} and {second[name]}"
    return ""


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return repr(first) == repr(second)  # NaN equals NaN


def _close(first: Any, second: Any) -> bool:
    """Whether two values are equal up to rounding, which depends on the order of summation."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.allclose(
            first.double(), second.double(), rtol=1e-4, atol=1e-5, equal_nan=True
        )
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_close, first, second))
    if isinstance(first, float) and isinstance(second, float) and math.isfinite(first):
        return math.isclose(first, second, rel_tol=1e-4, abs_tol=1e-5)
    return _same(first, second)


def _encode(state: Any) -> tuple[Any, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    try:
        encoded = encode(state, tensors, "state_dict()")
    except TrainingStateError as error:
        _fail(str(error))
    return encoded, {name: tensor.clone() for name, tensor in tensors.items()}
