"""What the hookspecs state about their hooks, beyond their order: see `pa_core.hookspecs`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from pa_core import StopTrainingError, Trainer, hookimpl
from pa_core.errors import PreemptedExit
from pa_core.testing import HookRecorder, run_on_processes, tiny_data, tiny_trainer

DATA = {"train_dataset": tiny_data(24), "eval_dataset": tiny_data(8), "per_device_batch_size": 4}


class In:
    """Calls a function in one event: every time, or the first time only."""

    def __init__(self, event: str, act: Callable[[Trainer], Any], *, once: bool = False) -> None:
        self.calls = 0

        def call(trainer: Trainer) -> None:
            self.calls += 1
            if self.calls == 1 or not once:
                act(trainer)

        setattr(self, event, hookimpl(call))


class Around:
    """Wraps both runs, and counts how often they have closed."""

    def __init__(self) -> None:
        self.closed = 0

    @hookimpl(wrapper=True)
    def run_training(self) -> Any:
        try:
            return (yield)
        finally:
            self.closed += 1

    @hookimpl(wrapper=True)
    def run_evaluation(self) -> Any:
        try:
            return (yield)
        finally:
            self.closed += 1


def fails(trainer: Trainer) -> None:
    raise ZeroDivisionError


def stops(trainer: Trainer) -> None:
    trainer.control.stop("enough")


def events(recorder: HookRecorder, *, after: str | None = None) -> list[str]:
    """The events so far, without repetition and providers; those after the last call of one."""
    names = [name for name, _ in groupby(recorder.names) if name.startswith("on_")]
    if after is not None:
        names = names[len(names) - names[::-1].index(after) :]
    return names


@pytest.fixture
def recorder() -> HookRecorder:
    return HookRecorder()


# -- How a run ends -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "last"),
    [
        ("on_train_step_end", "on_train_step_end"),  # within the epoch: it isn't completed
        ("on_train_epoch_end", "on_train_epoch_end"),  # no evaluation follows
        ("on_eval_epoch_end", "on_training_run_epoch_end"),
        ("on_training_run_epoch_end", "on_training_run_epoch_end"),
    ],
)
@pytest.mark.parametrize("is_pause", [False, True])
def test_a_stop_or_a_pause_is_granted_at_the_next_place_and_only_the_end_follows(
    recorder: HookRecorder, event: str, last: str, is_pause: bool
) -> None:
    def request(trainer: Trainer) -> None:
        (trainer.control.pause if is_pause else trainer.control.stop)("enough")

    trainer = tiny_trainer(In(event, request), recorder)
    trainer.train(num_epochs=3, **DATA)
    assert events(recorder, after=last) == ["on_stop_training_error", "on_training_run_end"]
    assert recorder.count("on_stop_training_error") == 1
    assert recorder.count("on_exception") == 0
    assert (trainer.stop_reason, trainer.position.is_paused) == ("enough", is_pause)


def test_a_raised_stop_ends_the_run_like_a_requested_one(recorder: HookRecorder) -> None:
    def raises(trainer: Trainer) -> None:
        raise StopTrainingError("enough")

    trainer = tiny_trainer(In("on_backward_end", raises), recorder)
    trainer.train(num_epochs=1, **DATA)
    assert events(recorder)[-2:] == ["on_stop_training_error", "on_training_run_end"]
    assert trainer.stop_reason == "enough"


@pytest.mark.parametrize("event", ["on_training_run_start", "on_backward_end", "on_eval_step_end"])
def test_after_an_exception_only_on_exception_is_called_once_the_wrappers_have_closed(
    recorder: HookRecorder, event: str
) -> None:
    around = Around()
    closed: list[int] = []
    report = In("on_exception", lambda trainer: closed.append(around.closed))
    with pytest.raises(ZeroDivisionError):
        tiny_trainer(around, In(event, fails), report, recorder).train(num_epochs=1, **DATA)
    assert closed == [1]
    assert recorder.names[-2:] == [event, "on_exception"]


def test_a_clean_preemption_calls_no_on_exception(recorder: HookRecorder) -> None:
    class Preempts:
        @hookimpl(wrapper=True)
        def run_training(self) -> Any:
            yield
            raise PreemptedExit(75)

    with pytest.raises(SystemExit):
        tiny_trainer(Preempts(), recorder).train(num_epochs=1, **DATA)
    assert recorder.count("on_exception") == 0
    assert recorder.names[-1] == "on_training_run_end"


def test_an_exception_before_the_first_event_calls_no_on_exception(recorder: HookRecorder) -> None:
    class Fails:
        @hookimpl
        def create_train_dataloader(self, trainer: Trainer) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny_trainer(Fails(), recorder).train(num_epochs=1, **DATA)
    assert events(recorder) == ["on_init_end"]


# -- Evaluation -----------------------------------------------------------------------------------


def test_evaluate_can_be_stopped_and_fail_like_a_run(recorder: HookRecorder) -> None:
    trainer = tiny_trainer(In("on_eval_epoch_end", stops), recorder)
    trainer.evaluate(tiny_data(8))
    assert events(recorder)[-2:] == ["on_stop_training_error", "on_evaluation_run_end"]
    assert trainer.stop_reason is None  # which is that of a training run
    recorder.clear()
    trainer = tiny_trainer(In("on_eval_step_end", fails), recorder)
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate(tiny_data(8))
    assert events(recorder)[-2:] == ["on_eval_step_end", "on_exception"]


def test_a_failing_evaluation_within_a_run_is_reported_by_both(recorder: HookRecorder) -> None:
    evaluates = In("on_train_epoch_end", lambda trainer: trainer.evaluate(tiny_data(8)))
    trainer = tiny_trainer(evaluates, In("on_eval_step_end", fails), recorder)
    with pytest.raises(ZeroDivisionError):
        trainer.train(num_epochs=1, **DATA)
    assert events(recorder, after="on_eval_step_end") == ["on_exception"]
    assert recorder.count("on_exception") == 2


def test_predict_has_no_events_not_even_for_an_exception(recorder: HookRecorder) -> None:
    class Fails:
        @hookimpl
        def calculate_predictions(self) -> Any:
            raise ZeroDivisionError

    trainer = tiny_trainer(recorder)
    recorder.clear()
    trainer.predict(tiny_data(8))
    assert events(recorder) == []
    trainer = tiny_trainer(Fails(), recorder)
    recorder.clear()
    with pytest.raises(ZeroDivisionError):
        trainer.predict(tiny_data(8))
    assert events(recorder) == []


def test_an_evaluation_is_intermediate_only_if_it_was_requested_within_an_epoch(
    recorder: HookRecorder,
) -> None:
    request = In("on_train_step_end", lambda trainer: trainer.control.evaluate(), once=True)
    trainer = tiny_trainer(request, recorder)
    trainer.train(num_epochs=1, **DATA)
    trainer.evaluate(tiny_data(8))
    for event in ("on_eval_epoch_start", "on_eval_epoch_end"):
        assert [call.is_intermediate for call in recorder.of(event)] == [True, False, False]
    assert recorder.count("register_eval_models") == 3
    # It is granted right after the event, before the next micro-batch.
    names = events(recorder)
    first = names.index("on_train_step_end")
    assert names[first : first + 2] == ["on_train_step_end", "on_eval_epoch_start"]


# -- Training states ------------------------------------------------------------------------------


def test_a_state_requested_at_the_end_is_saved_after_that_event(
    recorder: HookRecorder, tmp_path: Path
) -> None:
    save = In("on_training_run_end", lambda trainer: trainer.control.save(tmp_path / "last"))
    tiny_trainer(save, recorder).train(num_epochs=1, **DATA)
    recorder.assert_order("on_training_run_end", "on_save_training_state")
    recorder.assert_called("on_save_training_state", times=1)
    assert (tmp_path / "last" / "manifest.json").exists()


def test_a_state_in_the_background_is_complete_before_the_event_of_the_end(tmp_path: Path) -> None:
    found: list[bool] = []
    save = In(
        "on_training_run_epoch_end",
        lambda trainer: trainer.control.save(tmp_path / "last", in_background=True),
    )
    look = In(
        "on_training_run_end", lambda _: found.append((tmp_path / "last/manifest.json").exists())
    )
    tiny_trainer(save, look).train(num_epochs=1, **DATA)
    assert found == [True]


BEFORE_THE_FIRST_STEP = ["on_training_run_start", "on_train_epoch_start"]


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ("on_train_step_end", [*BEFORE_THE_FIRST_STEP, "on_load_training_state"]),
        ("on_train_epoch_end", ["on_training_run_start", "on_load_training_state"]),
        ("on_training_run_epoch_end", ["on_training_run_start", "on_load_training_state"]),
    ],
)
def test_plugins_are_restored_after_the_last_start_event_before_training_continues(
    recorder: HookRecorder, tmp_path: Path, event: str, expected: list[str]
) -> None:
    save = In(event, lambda trainer: trainer.control.save(tmp_path / "state"), once=True)
    tiny_trainer(save).train(num_epochs=2, **DATA)

    class Counts:
        count, seen = 0, None

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.count = state["count"]

        @hookimpl
        def on_training_run_start(self, trainer: Trainer) -> None:
            assert trainer.updates > 0  # the position is restored before

    trainer = tiny_trainer(Counts(), recorder)
    recorder.clear()
    with pytest.warns(UserWarning, match="has no state of the plugin"):
        trainer.train(num_epochs=2, resume_from=tmp_path / "state", **DATA)
    names = events(recorder)
    assert names[: len(expected)] == expected
    assert recorder.count("on_load_training_state") == 1
    following = {
        "on_train_step_end": "on_train_step_start",
        "on_train_epoch_end": "on_eval_epoch_start",
        "on_training_run_epoch_end": "on_train_epoch_start",
    }
    assert names[len(expected)] == following[event]


# -- Gradients ------------------------------------------------------------------------------------


def test_gradients_are_clipped_at_the_start_of_the_step_and_gone_at_its_end() -> None:
    norms: dict[str, list[float]] = {"on_optimizer_step_start": [], "on_optimizer_step_end": []}

    def reads(event: str) -> Callable[[Trainer], None]:
        def read(trainer: Trainer) -> None:
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            norms[event].append(float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0)

        return read

    plugins = [In(event, reads(event)) for event in norms]
    tiny_trainer(*plugins).train(num_epochs=1, gradient_clip_norm=1e-3, **DATA)
    assert norms["on_optimizer_step_start"] == pytest.approx([1e-3] * 6, rel=1e-3)
    assert norms["on_optimizer_step_end"] == [0.0] * 6


# -- On several processes -------------------------------------------------------------------------


def padding_of_each_step() -> list[tuple[str, bool]]:
    """The hooks of the steps of an epoch, each with whether the batch is a padding batch."""
    seen: list[tuple[str, bool]] = []

    class Looks:
        @hookimpl
        def on_train_step_start(self, trainer: Trainer) -> None:
            seen.append(("on_train_step_start", trainer.is_padding_batch))

        @hookimpl
        def on_backward_end(self, trainer: Trainer) -> None:
            seen.append(("on_backward_end", trainer.is_padding_batch))

        @hookimpl
        def on_train_step_end(self, trainer: Trainer) -> None:
            seen.append(("on_train_step_end", trainer.is_padding_batch))

    tiny_trainer(Looks()).train(tiny_data(5), 1, per_device_batch_size=2)
    return seen


def test_the_hooks_of_a_step_are_called_for_padding_batches_which_the_trainer_marks() -> None:
    names = ["on_train_step_start", "on_backward_end", "on_train_step_end"]
    with_samples, without = run_on_processes(padding_of_each_step)
    assert with_samples == [(name, False) for name in names * 2]
    assert without == [(name, False) for name in names] + [(name, True) for name in names]
