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
from pa_core.testing import HookRecorder, run_on_processes, tiny_data, tiny_model, tiny_trainer

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


def test_predict_has_an_event_per_batch_and_none_for_an_exception(recorder: HookRecorder) -> None:
    class Fails:
        @hookimpl
        def calculate_predictions(self) -> Any:
            raise ZeroDivisionError

    trainer = tiny_trainer(recorder)
    recorder.clear()
    trainer.predict(tiny_data(20), per_device_batch_size=8)
    assert events(recorder) == ["on_predict_step_end"] * 3
    assert [call.step for call in recorder.of("on_predict_step_end")] == [0, 1, 2]
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
RESTORED = ["on_load_training_state", "on_training_state_saved"]


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ("on_train_step_end", [*BEFORE_THE_FIRST_STEP, *RESTORED]),
        ("on_train_epoch_end", ["on_training_run_start", *RESTORED]),
        ("on_training_run_epoch_end", ["on_training_run_start", *RESTORED]),
    ],
)
def test_plugins_are_restored_after_the_last_start_event_before_training_continues(
    recorder: HookRecorder, tmp_path: Path, event: str, expected: list[str]
) -> None:
    save = In(event, lambda trainer: trainer.control.save(tmp_path / "state"), once=True)
    tiny_trainer(save).train(num_epochs=2, **DATA)

    resuming: list[tuple[str, bool, int]] = []

    def looks(event: str) -> In:
        return In(
            event, lambda trainer: resuming.append((event, trainer.is_resuming, trainer.updates))
        )

    looking = [looks(name) for name in (*expected, "on_train_step_start", "on_eval_epoch_start")]
    trainer = tiny_trainer(*looking, recorder)
    recorder.clear()
    trainer.train(num_epochs=2, resume_from=tmp_path / "state", **DATA)
    names = events(recorder)
    assert names[: len(expected)] == expected
    assert recorder.count("on_load_training_state") == 1
    assert recorder.of("on_training_state_saved")[0].state_dir == tmp_path / "state"
    updates = 1 if event == "on_train_step_end" else 6  # the position is restored before
    assert resuming[: len(expected)] == [(name, True, updates) for name in expected]
    assert not any(is_resuming for _, is_resuming, _ in resuming[len(expected) :])
    following = {
        "on_train_step_end": "on_train_step_start",
        "on_train_epoch_end": "on_eval_epoch_start",
        "on_training_run_epoch_end": "on_train_epoch_start",
    }
    assert names[len(expected)] == following[event]


# -- Gradients and updates ------------------------------------------------------------------------


def gradient_norm(trainer: Trainer) -> float:
    grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0


def test_gradients_are_ready_then_clipped_then_gone() -> None:
    norms: dict[str, list[float]] = {
        name: []
        for name in ("on_gradients_ready", "on_optimizer_step_start", "on_optimizer_step_end")
    }
    plugins = [
        In(event, lambda trainer, found=found: found.append(gradient_norm(trainer)))
        for event, found in norms.items()
    ]
    tiny_trainer(*plugins).train(num_epochs=1, gradient_clip_norm=1e-3, **DATA)
    assert all(norm > 0.1 for norm in norms["on_gradients_ready"])
    assert norms["on_optimizer_step_start"] == pytest.approx([1e-3] * 6, rel=1e-3)
    assert norms["on_optimizer_step_end"] == [0.0] * 6


def test_the_ready_gradient_is_that_of_the_mean_over_the_accumulated_batch() -> None:
    found: list[torch.Tensor] = []

    class Looks:
        @hookimpl
        def on_gradients_ready(self, trainer: Trainer) -> None:
            found.append(trainer.model[0].weight.grad.clone())

    for size, steps in ((12, 1), (5, 3)):  # the last micro-batch has two samples
        tiny_trainer(Looks()).train(
            tiny_data(12), 1, per_device_batch_size=size, gradient_accumulation_steps=steps
        )
    torch.testing.assert_close(*found)


def test_a_skipped_update_calls_its_own_event_and_counts_apart(recorder: HookRecorder) -> None:
    weights: list[torch.Tensor] = []

    class Skips:
        @hookimpl
        def on_gradients_ready(self, trainer: Trainer) -> None:
            if trainer.updates == 2 and not trainer.position.skipped:
                weights.append(trainer.model[0].weight.detach().clone())
                trainer.control.skip_update("loss spike")

        @hookimpl
        def on_optimizer_step_skipped(self, trainer: Trainer) -> None:
            weights.append(trainer.model[0].weight.detach().clone())
            assert gradient_norm(trainer) == 0.0

    trainer = tiny_trainer(Skips(), recorder)
    trainer.train(num_epochs=1, **DATA)
    assert [call.reason for call in recorder.of("on_optimizer_step_skipped")] == ["loss spike"]
    assert torch.equal(*weights)
    assert (trainer.updates, trainer.position.skipped) == (5, 1)
    assert recorder.count("on_optimizer_step_end") == recorder.count("on_optimizer_step_start") == 5
    assert recorder.count("on_gradients_ready") == recorder.count("run_update") == 6


def test_a_state_waits_for_an_update_that_is_made_and_skips_in_a_row_end_the_run(
    recorder: HookRecorder, tmp_path: Path
) -> None:
    class Skips:
        @hookimpl
        def on_backward_end(self, trainer: Trainer, step: int) -> None:
            if step in (1, 2):
                trainer.control.skip_update()

        @hookimpl
        def on_train_step_end(self, trainer: Trainer, step: int) -> None:
            if step == 1:
                trainer.control.save(tmp_path / "state")

    tiny_trainer(Skips(), recorder).train(num_epochs=1, **DATA)
    names = recorder.names
    assert names[: names.index("on_save_training_state")].count("on_train_step_end") == 4

    skips = In("on_backward_end", lambda trainer: trainer.control.skip_update())
    trainer = tiny_trainer(skips, recorder)
    trainer.train(num_epochs=100, **DATA)
    assert (trainer.updates, trainer.position.skipped) == (0, 100)
    assert "100 updates in a row were skipped" in str(trainer.stop_reason)


class TwoPasses:
    """Makes an update from gradients that it calculates twice, without changing the weights."""

    needs_recompute = True

    def __init__(self) -> None:
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.losses: list[float] = []

    @hookimpl
    def run_update(self, trainer: Trainer) -> Any:
        first = trainer.model[0].weight.grad.clone()
        loss = trainer.recompute_gradients()
        assert loss.shape == ()
        self.losses.append(float(loss))
        self.pairs.append((first, trainer.model[0].weight.grad.clone()))
        trainer.clip_gradients()
        return trainer.apply_update()


def test_gradients_can_be_recomputed_with_the_same_randomness_and_nothing_counts_twice(
    recorder: HookRecorder,
) -> None:
    data = DATA | {"gradient_accumulation_steps": 2, "eval_dataset": None}
    plain = tiny_trainer(model=tiny_model(dropout=0.5))
    plain.train(num_epochs=1, **data)
    twice = TwoPasses()
    trainer = tiny_trainer(twice, recorder, model=tiny_model(dropout=0.5))
    trainer.train(num_epochs=1, **data)
    assert len(twice.pairs) == 3
    for first, second in twice.pairs:
        assert torch.equal(first, second)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name
    assert trainer.updates == plain.updates == 3
    loss = trainer.run_history.get_latest_metric("train_loss_epoch")
    assert loss == plain.run_history.get_latest_metric("train_loss_epoch")
    assert loss == pytest.approx(sum(twice.losses) / 3)
    counts = {name: recorder.count(name) for name in ("on_backward_start", "on_backward_end")}
    assert counts == {"on_backward_start": 12, "on_backward_end": 6}


def test_an_update_can_be_wrapped_and_must_not_be_dropped(recorder: HookRecorder) -> None:
    results: list[Any] = []

    class Wraps:
        @hookimpl(wrapper=True)
        def run_update(self, trainer: Trainer) -> Any:
            recorder.assert_called("on_gradients_ready", times=trainer.updates + 1)
            result = yield
            results.append(result)
            return result

    trainer = tiny_trainer(Wraps(), recorder)
    trainer.train(num_epochs=1, **DATA)
    assert [result.is_updated for result in results] == [True] * 6

    class ReturnsNothing:
        @hookimpl
        def run_update(self, trainer: Trainer) -> None:
            trainer.apply_update()

    with pytest.raises(TypeError, match="must return UpdateResult"):
        tiny_trainer(ReturnsNothing()).train(num_epochs=1, **DATA)


# -- States that are complete ---------------------------------------------------------------------


@pytest.mark.parametrize("in_background", [False, True])
def test_each_state_is_announced_once_when_it_is_complete_and_before_the_run_returns(
    recorder: HookRecorder, tmp_path: Path, in_background: bool
) -> None:
    complete: list[bool] = []

    class Plugin:
        @hookimpl
        def on_train_epoch_end(self, trainer: Trainer) -> None:
            path = tmp_path / f"epoch-{trainer.position.epoch}"
            trainer.control.save(path, in_background=in_background)

        @hookimpl
        def on_training_run_end(self, trainer: Trainer) -> None:
            trainer.control.save(tmp_path / "last", in_background=in_background)

        @hookimpl
        def on_training_state_saved(self, state_dir: Path) -> None:
            complete.append((state_dir / "manifest.json").exists())

    tiny_trainer(Plugin(), recorder).train(num_epochs=2, **DATA)
    saved = [call.state_dir.name for call in recorder.of("on_training_state_saved")]
    assert saved == ["epoch-1", "epoch-2", "last"]
    assert complete == [True] * 3


# -- Data that change -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "samples"),
    [
        ("on_training_run_start", [8, 8, 8]),
        ("on_train_epoch_start", [8, 8, 8]),
        ("on_train_step_end", [24, 8, 8]),
        ("on_train_epoch_end", [24, 8, 8]),
    ],
)
def test_data_that_a_hook_changes_are_used_from_the_next_start_of_an_epoch(
    recorder: HookRecorder, event: str, samples: list[int]
) -> None:
    def change(trainer: Trainer) -> None:
        trainer.train_dataset = tiny_data(8)

    tiny_trainer(In(event, change, once=True), recorder).train(num_epochs=3, **DATA)
    ends = [number for number, name in enumerate(recorder.names) if name == "on_train_epoch_end"]
    starts = [0, *ends]
    found = [
        4 * recorder.names[start:end].count("on_train_step_start")
        for start, end in zip(starts, ends, strict=False)
    ]
    assert found == samples
    assert recorder.count("create_train_dataloader") == 2


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
