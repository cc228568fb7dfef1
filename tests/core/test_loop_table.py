"""The table of the loop, `pa_core.hookspecs.LOOP`, is what real runs call, in its order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from pa_core import Trainer, hookimpl
from pa_core.plugins.explain import LoopRow, loop_rows
from pa_core.plugins.manager import PluginManager
from pa_core.testing import HookRecorder
from tests.helpers import tiny_data, tiny_model

ROWS = list(loop_rows())
METHODS = [row.method for row in ROWS if row.method]


class RecordingTrainer(Trainer):
    """Records the methods of the table as it calls them, in the list of a `HookRecorder`."""

    def __init__(self, recorder: HookRecorder, *plugins: Any) -> None:
        self.calls = recorder.calls
        model = tiny_model()
        super().__init__(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.SGD(model.parameters(), lr=0.1),
            callbacks=(),
            plugins=(*plugins, recorder),
        )


def _recording(method: str) -> Any:
    def call(self: RecordingTrainer, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(_Method(f"{method}()"))
        return getattr(Trainer, method)(self, *args, **kwargs)

    return call


class _Method:
    def __init__(self, name: str) -> None:
        self.name = name


for _name in METHODS:
    setattr(RecordingTrainer, _name, _recording(_name))


def pattern_of(phase: str) -> str:
    """A regular expression for the calls of an outermost phase: the table as a grammar."""
    return _pattern([row for row in ROWS if row.phases[:1] == (phase,)])


def _pattern(rows: Sequence[LoopRow]) -> str:
    """The calls of some rows, which begin with an outermost one, and of those that belong to it."""
    pattern = alternatives = ""
    starts = [number for number, row in enumerate(rows) if row.depth == rows[0].depth]
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=False):
        row, inner = rows[start], _pattern(rows[start + 1 : end])
        names = [row.method and f"{row.method}()", row.hook]
        calls = "".join(f"{name} " for name in names if name)
        piece = f"(?:{re.escape(calls)}{inner})"
        if (row.text or row.remark).startswith("for each"):
            piece += "*"
        elif row.text.startswith("if ") or row.remark.startswith("unless"):
            piece += "?"
        if row.remark.endswith(", or"):
            alternatives += f"{piece}|"
        else:
            pattern += f"(?:{alternatives}{piece})"
            alternatives = ""
    return pattern


def words(recorder: HookRecorder) -> str:
    """The calls so far, and none from now on."""
    text = "".join(f"{call.name} " for call in recorder.calls)
    recorder.clear()
    return text


@pytest.fixture
def recorder() -> HookRecorder:
    return HookRecorder()


class Skips:
    """Requests to skip the second update, at one of the places where that is possible."""

    def __init__(self, event: str) -> None:
        self.calls = 0

        def skip(trainer: Trainer) -> None:
            self.calls += 1
            if self.calls == 2:
                trainer.control.skip_update()

        setattr(self, event, hookimpl(skip))


class EvaluatesAnother:
    @hookimpl
    def register_eval_models(self, trainer: Trainer) -> dict[str, nn.Module]:
        return {"other": tiny_model()}


class Watches:
    """Watches a metric, so that the event is called."""

    watched_metrics = ("train_loss_epoch",)

    @hookimpl
    def on_watched_metric(self, value: float) -> None:
        assert value > 0


def train(trainer: Trainer, **arguments: Any) -> None:
    given: dict[str, Any] = {
        "train_dataset": tiny_data(20),
        "num_epochs": 2,
        "eval_dataset": {"one": tiny_data(8), "two": tiny_data(4)},
        "per_device_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "create_scheduler_fn": torch.optim.lr_scheduler.ConstantLR,
    }
    trainer.train(**(given | arguments))


def test_the_grammar_notices_a_missing_a_superfluous_and_a_misplaced_call(
    recorder: HookRecorder,
) -> None:
    trainer = RecordingTrainer(recorder)
    recorder.clear()
    train(trainer)
    calls, pattern = words(recorder), pattern_of("train(...)")
    assert re.fullmatch(pattern, calls)
    step = "on_backward_start backward_step() "
    for wrong in (
        calls.replace("on_train_epoch_end ", "", 1),
        calls.replace(step, step * 2, 1),
        calls.replace(step, "backward_step() on_backward_start ", 1),
        calls.replace("on_optimizer_step_end ", "", 1),
        calls.removesuffix("on_training_run_end "),
    ):
        assert wrong != calls
        assert not re.fullmatch(pattern, wrong)


def test_a_trainer_is_built_as_the_table_says(recorder: HookRecorder) -> None:
    RecordingTrainer(recorder)
    assert re.fullmatch(pattern_of("Trainer(...)"), words(recorder))


@pytest.mark.parametrize("event", ["on_backward_end", "on_optimizer_step_start"])
def test_training_calls_what_the_table_says(recorder: HookRecorder, event: str) -> None:
    skips = Skips(event)
    trainer = RecordingTrainer(recorder, EvaluatesAnother(), Watches(), skips)
    recorder.clear()
    train(trainer)
    calls = words(recorder)
    assert re.fullmatch(pattern_of("train(...)"), calls)
    assert skips.calls >= 6
    assert calls.count("on_optimizer_step_end ") == 5  # of six updates
    assert calls.count("on_eval_epoch_start ") == 8  # two epochs, models and datasets
    called = set(calls.split())
    expected = {
        name
        for row in ROWS
        for name in (row.hook, row.method and f"{row.method}()")
        if row.phases[:1] == ("train(...)",) and name
    }
    assert expected - called == {"on_stop_training_error", "on_exception"}


def test_evaluating_predicting_saving_and_restoring_call_what_the_table_says(
    recorder: HookRecorder, tmp_path: Any
) -> None:
    trainer = RecordingTrainer(recorder)
    recorder.clear()
    trainer.evaluate(tiny_data(8), per_device_batch_size=4)
    evaluation = words(recorder)
    start, end = "evaluation_run_start() on_evaluation_run_start ", "evaluation_run_end() on_"
    assert evaluation.startswith(f"create_eval_dataloader run_evaluation {start}register_eval_mod")
    inner = evaluation.partition(start)[2].partition(end)[0]
    rows = [row for row in ROWS if "for each model and evaluation dataset" in row.phases]
    assert re.fullmatch(f"register_eval_models {_pattern(rows)}", inner)
    assert evaluation.endswith(f"{end}evaluation_run_end ")

    trainer.predict(tiny_data(8), per_device_batch_size=4)
    before, events, after = words(recorder).partition("eval_epoch_start() ")
    assert (before, events) == ("create_eval_dataloader ", "eval_epoch_start() ")
    assert re.fullmatch(pattern_of("predict(...)"), after)

    trainer.save_training_state(tmp_path / "state")
    assert re.fullmatch(pattern_of("a training state is saved"), words(recorder))
    trainer.load_training_state(tmp_path / "state")
    assert re.fullmatch(pattern_of("a training state is restored"), words(recorder))


def test_every_hook_stands_in_the_table_once() -> None:
    hooks = [row.hook for row in ROWS if row.hook]
    assert sorted(hooks) == sorted(PluginManager().hooks)
