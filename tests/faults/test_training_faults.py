"""Faults in training itself: losses, memory, data, workers and plugins."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from pa_core import Trainer, TrainerCallback, hookimpl, hookspecs
from pa_core.callbacks import (
    ProgressBarCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    TerminateOnNaNCallback,
)
from pa_core.checkpoint.storage import StateReader, find_states, read_manifest, verify
from tests.builtin_trainer import make_trainer
from tests.distributed.launch import environment
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of

# -- NaN and infinite losses ----------------------------------------------------------------------


class BadUpdates(TrainerCallback):
    """Makes the losses of some updates NaN or infinite."""

    def __init__(self, *updates, factor=math.nan, constant=0.0):
        self.updates, self.factor, self.constant = updates, factor, constant
        self.fired = 0

    def on_backward_start(self, trainer, batch_output):
        if trainer.position.attempts + 1 in self.updates:
            self.fired += 1
            batch_output["loss"] = batch_output["loss"] * self.factor + self.constant


class SkipsUpdates(TrainerCallback):
    """Skips the same updates, without any NaN."""

    def __init__(self, *updates):
        self.updates = updates

    def on_backward_end(self, trainer):
        if trainer.position.attempts + 1 in self.updates:
            trainer.control.skip_update()


def train(*callbacks, epochs=2, **options):
    trainer = make_trainer(*callbacks)
    trainer.optimizer.param_groups[0]["momentum"] = 0.9
    trainer.train(
        tiny_data(24), epochs, eval_dataset=tiny_data(8), per_device_batch_size=4, **options
    )
    return trainer


@pytest.mark.parametrize(
    ("factor", "constant"), [(math.nan, 0), (math.inf, 0), (1, math.nan), (1, math.inf)]
)
def test_a_bad_update_is_skipped_and_training_continues_as_without_it(factor, constant):
    """A NaN constant has finite gradients, so the loss itself must be checked."""
    bad = BadUpdates(3, 8, factor=factor, constant=constant)
    guard = TerminateOnNaNCallback(policy="skip")
    trainer = train(guard, bad)
    assert bad.fired == 2
    assert guard.triggered
    assert trainer.stop_reason is None
    assert (trainer.updates, trainer.position.skipped) == (10, 2)
    assert_identical(weights_of(trainer), weights_of(train(SkipsUpdates(3, 8))))
    history = trainer.run_history
    assert not any(map(math.isfinite, history.get_metric_values("train_loss_epoch")))
    records = [r for r in history.records if r["metric"] == "skipped_updates"]
    assert [(r["value"], r["update"]) for r in records] == [(1, 2), (2, 6)]


def test_gradients_that_are_not_finite_are_skipped_though_the_loss_is_finite():
    class BadGradient(TrainerCallback):
        def on_backward_end(self, trainer):
            if trainer.position.attempts == 4:
                next(trainer.model.parameters()).grad[0, 0] = math.inf

    trainer = train(TerminateOnNaNCallback(policy="skip"), BadGradient())
    assert_identical(weights_of(trainer), weights_of(train(SkipsUpdates(5))))


def test_a_bad_micro_batch_skips_its_whole_update_and_no_other():
    class BadFirst(TrainerCallback):
        def on_backward_start(self, trainer, batch_output, step):
            if step == 2:
                batch_output["loss"] = batch_output["loss"] * math.nan

    options = {"epochs": 1, "gradient_accumulation_steps": 2, "gradient_clip_norm": 1.0}
    trainer = train(TerminateOnNaNCallback(policy="skip"), BadFirst(), **options)
    assert trainer.run_history.get_metric_values("skipped_updates") == [1]
    assert_identical(weights_of(trainer), weights_of(train(SkipsUpdates(2), **options)))


def test_too_many_skips_in_a_row_stop_the_run_and_a_good_update_resets_the_count():
    trainer = train(TerminateOnNaNCallback("skip", limit=2), BadUpdates(1, 2, 4, 5))
    assert trainer.stop_reason is None
    trainer = train(TerminateOnNaNCallback("skip", limit=2), BadUpdates(3, 4, 5))
    assert "3 updates in a row" in trainer.stop_reason
    assert (trainer.updates, trainer.position.attempts) == (2, 5)


def test_the_count_of_skips_survives_an_interruption(tmp_path):
    def plugins():
        guard = TerminateOnNaNCallback("skip", limit=2)
        return guard, BadUpdates(5, 6, 7), SaveTrainingStateCallback(tmp_path, 1)

    train(*plugins())
    again = train(*plugins(), resume_from=tmp_path / "epoch_0001")
    assert "3 updates in a row" in again.stop_reason
    assert again.run_history.get_latest_metric("skipped_updates") == 3


class Blows(TrainerCallback):
    """Makes the weights diverge in one update, so that every later loss is infinite."""

    def __init__(self, update, weight=3e38):
        self.update, self.weight, self.fired = update, weight, 0

    def on_optimizer_step_end(self, trainer):
        if trainer.position.attempts >= self.update and not self.fired:
            self.fired += 1
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.fill_(self.weight)


def test_a_rollback_undoes_the_updates_since_the_state_and_continues_with_the_next_batch(tmp_path):
    blows = Blows(6)
    states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=4, save_at_end=False)
    guard = TerminateOnNaNCallback(policy="rollback")
    trainer = train(guard, blows, states)
    assert blows.fired == 1
    assert trainer.stop_reason is None
    assert trainer.run_history.get_metric_values("skipped_updates") == [1]
    # Updates 5 and 6 are undone, and 7, the first to show it, is skipped.
    assert_identical(weights_of(trainer), weights_of(train(SkipsUpdates(5, 6, 7))))


def test_a_rollback_skips_a_damaged_state(tmp_path):
    class Damages(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 5:
                file = tmp_path / "update_00000004" / "model.safetensors"
                file.write_bytes(file.read_bytes()[:-1] + b"~")

    states = SaveTrainingStateCallback(
        tmp_path,
        save_every_n_steps=2,
        save_at_end=False,
        in_background=False,  # so that it exists and can be damaged
    )
    guard = TerminateOnNaNCallback(policy="rollback")
    with pytest.warns(UserWarning, match="update_00000004.*damaged"):
        trainer = train(guard, BadUpdates(6), Damages(), states, epochs=1)
    assert_identical(weights_of(trainer), weights_of(train(SkipsUpdates(3, 4, 5, 6), epochs=1)))


@pytest.mark.filterwarnings("ignore:.* has training states of another run")
def test_a_rollback_has_a_limit_and_needs_a_state_of_this_run(tmp_path):
    def run(*updates, limit=1):
        states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, save_at_end=False)
        return train(TerminateOnNaNCallback("rollback", limit), BadUpdates(*updates), states)

    assert "the limit on rollbacks (1) has been reached" in run(4, 7).stop_reason
    # There are states of the earlier run, but none of this one.
    assert "this run has not saved a training state yet" in run(2).stop_reason
    with pytest.raises(ValueError, match="the plugin checkpoint, which isn't enabled"):
        train(TerminateOnNaNCallback("rollback"))
    with pytest.raises(ValueError, match="limit: expected greater than or equal to 1, got 0"):
        TerminateOnNaNCallback("skip", 0)


@pytest.mark.filterwarnings("ignore:.* has training states of another run")
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_no_state_and_no_best_model_contains_nan_or_infinity(tmp_path, policy):
    best = SaveBestModelCallback(tmp_path / "best.pt", load_saved_checkpoint=False)
    states = SaveTrainingStateCallback(tmp_path / "states", 1, 1)
    guard = TerminateOnNaNCallback(policy)
    blows = Blows(8, math.inf)
    trainer = train(best, guard, states, BadUpdates(2, 3), blows, epochs=3)
    assert blows.fired == (policy != "stop")
    saved = find_states(tmp_path / "states")
    assert saved
    for state in saved:
        for name in ("model.safetensors", "state.safetensors"):
            for key, tensor in StateReader(state).read_tensors(name).items():
                if key.startswith("run_history"):
                    continue  # which has the losses as they were
                assert torch.isfinite(tensor).all(), (state, key)
    finite = [
        value
        for value in trainer.run_history.get_metric_values("eval_loss_epoch")
        if math.isfinite(value)
    ]
    assert best.best_metric == min(finite, default=None)
    if finite:
        content = torch.load(tmp_path / "best.pt", weights_only=True)
        assert all(value.isfinite().all() for value in content["model_state_dict"].values())


# -- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_out_of_memory_gets_a_note_with_the_sizes_and_what_to_try(part):
    class Greedy(Trainer):
        def calculate_train_batch_loss(self, batch):
            if part == "training" or not self.model.training:
                torch.empty(2**58)  # the real error of the CPU's allocator
            return super().calculate_train_batch_loss(batch)

        calculate_eval_batch_loss = calculate_train_batch_loss

    trainer = make_trainer(trainer_class=Greedy)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        trainer.train(tiny_data(8), 1, eval_dataset=tiny_data(8), per_device_batch_size=4)
    (note,) = caught.value.__notes__
    for expected in (
        *("rank 0 of 1", "cpu (", "GiB free", "per_device_batch_size=4"),
        *("gradient_accumulation_steps=1", "mixed_precision", "find_batch_size"),
    ):
        assert expected in note


def test_an_accelerators_and_pythons_own_memory_errors_get_the_same_note():
    for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError()):

        class Raises(TrainerCallback):
            def on_train_step_start(self, trainer):
                raise error  # noqa: B023 - raised before the next iteration

        with pytest.raises(type(error)) as caught:
            make_trainer(Raises()).train(tiny_data(4), 1)
        assert any("per_device_batch_size=8" in note for note in caught.value.__notes__)


def test_an_error_that_names_its_cause_gets_no_other_hint():
    class Raises(TrainerCallback):
        def on_train_step_start(self, trainer):
            raise RuntimeError("shapes don't fit")

    with pytest.raises(RuntimeError, match="shapes") as caught:
        make_trainer(Raises()).train(tiny_data(4), 1)
    assert len(caught.value.__notes__) == 1  # the one that names the plugin


# -- Data and workers -----------------------------------------------------------------------------


class Broken(Dataset):
    """Fails at one sample, fetched alone or as part of a batch."""

    def __init__(self, error=ValueError):
        self.data, self.error = tiny_data(16), error

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == 11:
            raise self.error("a broken file")
        return self.data[index]


class BrokenBatches(Broken):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Ragged(Broken):
    def __getitem__(self, index):
        x, y = self.data[index]
        return (x[:3] if index == 11 else x), y


class BrokenStream(IterableDataset):
    def __iter__(self):
        yield from (tiny_data(16)[index] for index in range(6))
        raise ValueError("a broken file")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("data", "error", "expected"),
    [
        pytest.param(Broken(), "a broken file", "in sample 11 of Broken", id="getitem"),
        pytest.param(Broken(KeyError), "a broken file", "in sample 11 of Broken", id="KeyError"),
        pytest.param(
            Broken(StopIteration), "StopIteration", "in sample 11 of Broken", id="StopIteration"
        ),
        pytest.param(BrokenBatches(), "a broken file", "11", id="getitems"),
        pytest.param(Ragged(), "equal size", "while collating the samples [", id="collate"),
        pytest.param(BrokenStream(), "a broken file", "in batch 1 of epoch 1", id="stream"),
    ],
)
def test_an_error_in_the_data_names_its_sample_and_worker(data, error, expected, workers):
    with pytest.raises(Exception, match=error) as caught:
        make_trainer().train(
            data, 1, per_device_batch_size=4, train_dataloader_kwargs={"num_workers": workers}
        )
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert expected in text
    if "[" in expected or expected == "11":
        assert "11" in text
    if workers:
        assert "in DataLoader worker process 0" in text


KILLED = """
import os, signal, subprocess, time
from multiprocessing import resource_sharer
from torch.utils.data import Dataset
from pa_core import TrainerCallback
from tests.builtin_trainer import make_trainer
from tests.helpers import tiny_data

class Kills(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return tiny_data(16)[index]

class DiesSlowly(Kills):
    # First its connections go, on which the second batch was to come, and later the worker itself.
    fetched = 0

    def __getitem__(self, index):
        self.fetched += 1
        if self.fetched > 8:
            open("lost", "w")
            resource_sharer.stop()
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return tiny_data(16)[index]

class WaitsForTheLoss(TrainerCallback):
    def on_train_step_end(self, trainer):
        while isinstance(trainer.train_dataset, DiesSlowly) and not os.path.exists("lost"):
            time.sleep(0.01)

for data in (Kills(), DiesSlowly()):
    try:
        make_trainer(WaitsForTheLoss).train(
            data, 1, per_device_batch_size=4, train_dataloader_kwargs={"num_workers": 1}
        )
    except (RuntimeError, OSError, EOFError) as error:
        time.sleep(0.4)
        # While it is held, the end of another child isn't taken for that of a worker.
        subprocess.run(["true"], check=True)
        print(type(data).__name__, "gave", repr(error), error.__notes__)
"""


def test_a_killed_worker_ends_the_run_and_the_error_says_what_to_try(tmp_path):
    """In a separate process: PyTorch raises wherever the signal finds the main thread."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if " gave " in line]
    assert [line.split()[0] for line in lines] == ["Kills", "DiesSlowly"]
    assert all("With num_workers=0" in line for line in lines), lines


# -- Plugins --------------------------------------------------------------------------------------

EVENTS = [
    name
    for name, value in vars(hookspecs).items()
    if name.startswith("on_") and hasattr(value, "pa_core_spec")
]
OUTSIDE_RUNS = {"on_init_end", "on_predict_step_end"}
OF_AN_EVALUATION = {
    *("on_evaluation_run_start", "on_eval_epoch_start", "on_eval_step_start"),
    *("on_eval_step_end", "on_eval_epoch_end", "on_evaluation_run_end"),
}


class Raising(TrainerCallback):
    """Raises in one event, at its second call if the first epoch has one."""

    def __init__(self, event, error):
        self.fired = 0

        def raises(**kwargs):
            self.fired += 1
            raise error

        setattr(self, event, raises)
        if event == "on_watched_metric":
            self.watched_metrics = ("train_loss_epoch",)


class Stops(TrainerCallback):
    """Stops a run early, so that the event of that is fired."""

    def on_train_step_end(self, trainer):
        if trainer.updates == 5:
            trainer.control.stop("enough")


class Skips(TrainerCallback):
    """Skips an update."""

    def on_backward_end(self, trainer):
        if trainer.updates == 3:
            trainer.control.skip_update()


class FullDisk(TrainerCallback):
    """Fails to save a training state for lack of space."""

    def on_save_training_state(self, trainer, **kwargs):
        raise OSError("no space")


class Watches(TrainerCallback):
    """Keeps a file open for the whole run, and closes it at the end."""

    def __init__(self, path):
        self.path, self.exceptions, self.closed = path, [], Counter()

    def _open(self, run):
        with self.path.open("w") as self.file:
            try:
                return (yield)
            finally:
                self.closed[run] += 1

    @hookimpl(wrapper=True)
    def run_training(self):
        return (yield from self._open("training"))

    @hookimpl(wrapper=True)
    def run_evaluation(self):
        return (yield from self._open("evaluation"))

    def on_exception(self, trainer, exception):
        self.exceptions.append(exception)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, StopIteration])
@pytest.mark.parametrize("event", [name for name in EVENTS if name not in OUTSIDE_RUNS])
def test_a_hook_that_raises_ends_the_run_in_good_order_and_is_named(tmp_path, event, error):
    policy = "stop" if event == "on_save_training_state" else "warn"
    states = SaveTrainingStateCallback(
        tmp_path / "states", save_every_n_steps=2, on_save_error=policy
    )
    if event == "on_load_training_state":
        make_trainer(states).train(tiny_data(16), 1, per_device_batch_size=4)
    raising, bars = Raising(event, error("the cause")), ProgressBarCallback()
    watches = Watches(tmp_path / "log.txt")
    others: list[TrainerCallback] = []
    if event == "on_stop_training_error":
        others.append(Stops())
    if event == "on_optimizer_step_skipped":
        others.append(Skips())
    if event == "on_save_training_state_error":
        others.append(FullDisk())
    if event == "on_exception":
        others.append(Raising("on_train_epoch_end", error("the cause")))
    trainer = make_trainer(*others, bars, raising, watches, states)
    is_evaluation = event.startswith("on_evaluation")

    def run():
        if is_evaluation:
            trainer.evaluate(tiny_data(8))
        else:
            loading = event == "on_load_training_state"
            trainer.train(
                tiny_data(16),
                2,
                eval_dataset=tiny_data(8),
                per_device_batch_size=4,
                resume_from="auto" if loading else None,
            )

    expected = RuntimeError if error is StopIteration else error
    with pytest.raises(expected) as caught:
        run()
    assert raising.fired == 1
    notes = "\n".join(getattr(caught.value, "__notes__", ()))
    if error is not KeyboardInterrupt:  # which no plugin has caused
        assert "plugin 'Raising'" in notes
        assert event in notes or event == "on_exception"
    assert watches.exceptions == [caught.value]
    assert watches.closed == {"evaluation" if is_evaluation else "training": 1}
    assert watches.file.closed
    assert bars.pbar is bars.eval_pbar is None
    for state in find_states(tmp_path / "states"):
        assert not verify(state)
    # Only the identity of a run that has no state yet: no lock, and nothing that is half written.
    assert {path.name for path in (tmp_path / "states").glob(".*")} <= {".run.json"}
    if event not in ("on_load_training_state", *OF_AN_EVALUATION):
        newest = find_states(tmp_path / "states")
        assert all(read_manifest(state)["position"]["updates"] % 2 == 0 for state in newest[1:])


def test_a_hook_that_raises_in_a_prediction_is_named_and_closes_its_bar():
    raising = Raising("on_predict_step_end", ZeroDivisionError("the cause"))
    bars = ProgressBarCallback()
    trainer = make_trainer(bars, raising)
    model = trainer.model
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.predict(tiny_data(8))
    assert raising.fired == 1
    assert "hook on_predict_step_end of plugin 'Raising'" in caught.value.__notes__[0]
    assert bars._predict_pbar is None
    assert trainer.model is model
    assert model.training


@pytest.mark.parametrize("event", sorted(OF_AN_EVALUATION))
def test_a_hook_that_raises_in_an_evaluation_alone_closes_it_too(tmp_path, event):
    raising, bars = Raising(event, ZeroDivisionError("the cause")), ProgressBarCallback()
    watches = Watches(tmp_path / "log.txt")
    with pytest.raises(ZeroDivisionError) as caught:
        make_trainer(bars, raising, watches).evaluate(tiny_data(8))
    assert raising.fired == 1
    assert f"hook {event} of plugin 'Raising'" in caught.value.__notes__[0]
    assert watches.exceptions == [caught.value]
    assert watches.closed == {"evaluation": 1}
    assert watches.file.closed
    assert bars.eval_pbar is None


def test_a_hook_that_raises_while_the_trainer_is_built_is_named():
    with pytest.raises(ZeroDivisionError) as caught:
        make_trainer(Raising("on_init_end", ZeroDivisionError("the cause")), model=tiny_model())
    assert "hook on_init_end of plugin 'Raising'" in caught.value.__notes__[0]


def test_a_run_after_a_failed_one_is_not_affected_by_it():
    raising = Raising("on_optimizer_step_end", ZeroDivisionError("the cause"))
    trainer = make_trainer(raising, loss_func=nn.CrossEntropyLoss())
    before = weights_of(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.train(tiny_data(16), 1)
    trainer.get_model().load_state_dict(before)
    trainer.plugins.unregister("Raising")
    trainer.train(tiny_data(16), 1)
    fresh = make_trainer()
    fresh.train(tiny_data(16), 1)
    assert_identical(weights_of(trainer), weights_of(fresh))
