"""A signal pauses the run at the next boundary; the exit code asks for a restart."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.builtins import preemption
from pa_core.callbacks import (
    EarlyStoppingCallback,
    PreemptionCallback,
    ProgressBarCallback,
    SaveTrainingStateCallback,
)
from pa_core.checkpoint.storage import find_states, read_manifest
from pa_core.errors import PreemptedExit
from tests.builtin_trainer import Records
from tests.faults.launch import finish, launch, samples_by_update
from tests.helpers import NoisyData, NoisyModel, assert_identical, tiny_data, weights_of


def run(*callbacks, data=None, resume_from=None, epochs=2, loader=None, eval_loader=None):
    model = NoisyModel()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.Adam(model.parameters(), lr=0.01),
        callbacks=callbacks,
        plugins=(),
    )
    trainer.train(
        NoisyData(22) if data is None else data,  # 6 micro-batches: windows of 2, 2, 2
        num_epochs=epochs,
        eval_dataset=tiny_data(6),
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        create_scheduler_fn=torch.optim.lr_scheduler.LinearLR,
        train_dataloader_kwargs=loader,
        eval_dataloader_kwargs=eval_loader,
        resume_from=resume_from,
    )
    return trainer


@pytest.fixture(autouse=True)
def handlers_are_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


class Signals(TrainerCallback):
    """Sends this process a signal in one event, once, and records how the run ends."""

    def __init__(self, place, number=signal.SIGTERM):
        self.place, self.number, self.fired, self.ends = place, number, 0, []

    def send(self, place):
        if place == self.place and not self.fired:
            self.fired += 1
            os.kill(os.getpid(), self.number)

    def on_training_run_start(self, trainer):
        self.send("before the first step")

    def on_backward_end(self, trainer, step):
        self.send(f"micro-batch {step}")

    def on_eval_step_start(self, trainer):
        self.send("evaluation")

    def on_save_training_state(self, trainer):
        self.send("saving")

    def on_train_epoch_end(self, trainer):
        self.send("end of the training part")

    def on_training_run_epoch_end(self, trainer):
        self.send("end of an epoch")

    def on_training_run_end(self, trainer):
        self.ends.append("end")
        self.send("end of the run")

    def on_stop_training_error(self, trainer, error):
        self.ends.append(str(error))

    def on_exception(self, trainer, exception):
        self.ends.append(exception)


class SendsWhileFetching(NoisyData):
    """Sends the signal while the loop waits for its data."""

    fired = 0

    def __getitem__(self, index):
        if index == 7 and not self.fired:
            self.fired += 1
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "place",
    [
        "before the first step",
        "micro-batch 2",
        "evaluation",
        "saving",
        "end of the training part",
        "end of an epoch",
    ],
)
def test_a_signal_anywhere_pauses_the_run_which_resumes_exactly(tmp_path, place, number):
    def plugins():
        return SaveTrainingStateCallback(tmp_path, save_every_n_steps=4), PreemptionCallback()

    sends = Signals(place, number)
    with pytest.raises(PreemptedExit) as caught:
        run(*plugins(), sends)
    assert caught.value.code == 75
    assert sends.fired == 1
    assert sends.ends == [f"{number.name} was received", "end"]
    newest = find_states(tmp_path)[0]
    assert newest.name.startswith("update_")
    position = read_manifest(newest)["position"]
    assert position["is_paused"]

    resumed = run(*plugins(), resume_from="auto")
    assert resumed.stop_reason is None
    assert resumed.updates == 6
    assert find_states(tmp_path)[0].name == "final"
    assert_identical(weights_of(resumed), weights_of(run()))


def test_a_signal_while_waiting_for_data_lets_the_update_be_made(tmp_path):
    data = SendsWhileFetching()
    preempted = PreemptionCallback(save_dir=tmp_path)
    with pytest.raises(PreemptedExit):
        run(preempted, data=data)
    assert data.fired == 1
    resumed = run(PreemptionCallback(save_dir=tmp_path), data=data, resume_from="auto")
    assert_identical(weights_of(resumed), weights_of(run()))


def test_progress_bars_and_wrappers_are_closed_before_the_process_exits():
    bars, order = ProgressBarCallback(), []

    class Wraps(TrainerCallback):
        @hookimpl(wrapper=True, tryfirst=True)
        def run_training(self):
            try:
                return (yield)
            finally:
                order.append("closed")

    class Leaves(PreemptionCallback):
        @hookimpl(wrapper=True, tryfirst=True)
        def run_training(self, trainer):
            try:
                return (yield from super().run_training(trainer))
            finally:
                order.append("leaves")

    with pytest.raises(PreemptedExit):
        run(bars, Leaves(), Wraps(), Signals("micro-batch 2"))
    assert order == ["closed", "leaves"]
    assert bars.pbar is None


def test_a_signal_after_the_end_of_the_run_does_what_it_did_before(tmp_path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        trainer = run(PreemptionCallback(save_dir=tmp_path), Signals("end of the run"))
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert trainer.stop_reason is None
    assert not find_states(tmp_path)


def test_a_second_signal_ends_at_once_but_a_repetition_of_the_first_does_not(tmp_path, monkeypatch):
    class SecondSignalError(Exception):
        pass

    def default_action(number, frame):
        raise SecondSignalError

    class Twice(TrainerCallback):
        def on_backward_end(self, trainer):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, default_action)
    try:
        with pytest.raises(PreemptedExit):
            run(PreemptionCallback(save_dir=tmp_path / "echo"), Twice())
        monkeypatch.setattr(preemption, "_ECHO", 0.0)
        with pytest.raises(SecondSignalError):
            run(PreemptionCallback(save_dir=tmp_path / "second"), Twice())
        assert signal.getsignal(signal.SIGTERM) is default_action
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not find_states(tmp_path / "second")


def test_a_run_that_stops_at_that_boundary_anyway_is_not_paused(tmp_path):
    """Otherwise it would continue when resumed, though the uninterrupted run had stopped."""

    class InTheSecondEpoch(Signals):
        def send(self, place):
            if trainer_epoch() == 2:
                super().send(place)

    scores = Records([1.0, 1.0, 1.0])
    trainer_epoch = lambda: 3 - len(scores.values)  # noqa: E731
    sends, received = InTheSecondEpoch("evaluation"), []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        trainer = run(
            scores,
            EarlyStoppingCallback(early_stopping_patience=1, watch_metric="score"),
            PreemptionCallback(save_dir=tmp_path),
            sends,
            epochs=3,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sends.fired == 1
    assert received == [signal.SIGTERM]
    assert "score has not improved" in trainer.stop_reason
    assert not trainer.position.is_paused


@pytest.mark.parametrize("place", ["micro-batch 0", "evaluation"])
def test_workers_survive_a_signal_to_the_whole_group_and_keep_the_users_init_function(
    tmp_path, place
):
    set_up = torch.zeros(2, dtype=torch.bool).share_memory_()
    workers: list = []

    def init(worker_id):
        set_up[worker_id] = True

    class ToAll(Signals):
        def send(self, place):
            if place == self.place and not self.fired:
                workers.extend(multiprocessing.active_children())
                while len(workers) == 2 and not set_up.all():  # they handle the signal from then on
                    time.sleep(0.01)
                for worker in workers:
                    os.kill(worker.pid, self.number)
            super().send(place)

    sends = ToAll(place)
    loader = {"num_workers": 2, "worker_init_fn": init}
    preempted = PreemptionCallback(save_dir=tmp_path)
    with pytest.raises(PreemptedExit):
        run(preempted, sends, loader=loader, eval_loader={"num_workers": 1})
    assert sends.fired
    assert workers
    assert set_up[0]  # the other may be killed before it comes to that
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
    assert find_states(tmp_path)


def test_a_signal_ends_a_worker_once_the_run_is_over(tmp_path):
    class Waits(NoisyData):
        def __getitem__(self, index):
            time.sleep(0.01)
            return super().__getitem__(index)

    trainer = run(
        PreemptionCallback(save_dir=tmp_path),
        data=Waits(22),
        loader={"num_workers": 1},
        epochs=1,
    )
    iterator = iter(trainer.train_dataloader)
    next(iterator)
    (worker,) = iterator._workers
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number", "code"),
    [
        ("main", signal.SIGTERM, 128 + signal.SIGTERM),
        ("worker", signal.SIGTERM, -signal.SIGTERM),
        ("worker", signal.SIGINT, -signal.SIGINT),
        ("later", signal.SIGINT, 75),
    ],
)
def test_signals_end_everything_that_is_stuck(where, number, code, tmp_path):
    script = Path(__file__).with_name("stuck.py")
    process = subprocess.Popen(
        [sys.executable, str(script), where],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        try:
            deadline = time.monotonic() + 120
            stuck: list[Path] = []
            while len(stuck) < (1 if where == "main" else 2):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
                stuck = list(tmp_path.glob("stuck-*"))
            pids = {int(file.name[6:]) for file in stuck} | set(children_of(process.pid))
            process.send_signal(number)
            if where != "later":  # there, the run can be paused
                time.sleep(preemption._ECHO + 0.5)
                process.send_signal(number)
            text = process.communicate(timeout=30)[1]
        finally:
            for pid in filter(is_running, children_of(process.pid)):
                os.kill(pid, signal.SIGKILL)
            process.kill()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(filter(is_running, pids))
    assert process.returncode == code
    assert "DataLoader worker" not in text
    assert ("SIGTERM again: the process ends" in text) == (where == "main")


def children_of(pid):
    try:
        listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in listing.split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_users_own_loader_is_not_changed():
    loader = DataLoader(tiny_data(8), batch_size=4, num_workers=1)
    run(PreemptionCallback(), data=loader, epochs=1)
    assert loader.worker_init_fn is None


def test_outside_the_main_thread_signals_are_not_handled_which_is_a_warning(tmp_path):
    trainers = []

    def train():
        trainers.append(run(PreemptionCallback(save_dir=tmp_path)))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=train)
        thread.start()
        thread.join(60)
    assert trainers[0].updates == 6
    assert any("only the main thread" in str(warning.message) for warning in caught)


def test_settings_choose_signals_and_exit_code_and_an_unknown_signal_is_an_error(tmp_path):
    settings = PreemptionCallback.Settings(signals=["SIGUSR1"], exit_code=99, save_dir=tmp_path)
    sends = Signals("micro-batch 1", signal.SIGUSR1)
    with pytest.raises(PreemptedExit) as caught:
        run(PreemptionCallback.from_settings(settings), sends)
    assert caught.value.code == 99
    with pytest.raises(ValueError, match="SIGTERMINATE"):
        PreemptionCallback.Settings(signals=["SIGTERMINATE"])
    with pytest.raises(ValueError, match="signals.0: expected 'SIGTERM', .* got 'SIGNONE'"):
        PreemptionCallback(["SIGNONE"])  # type: ignore[list-item]


@pytest.mark.distributed
@pytest.mark.slow
def test_both_processes_pause_at_one_update_whichever_gets_the_signal(tmp_path, whole):
    """One process, its whole group, the launcher: three times in a row, then on to the end."""
    folder = tmp_path / "run"
    for number, (kind, place, update) in enumerate(
        [("one", "step", 5), ("group", "evaluation", 16), ("agent", "step", 20)]
    ):
        fault = {"kind": kind, "place": place, "update": update}
        ended = launch(folder, 2, name=f"run{number}", workers=1, fault=fault)
        assert ended.seconds is not None, f"no signal was sent to {kind}:\n{ended.text}"
        assert ended.code not in (0, 75)  # the launcher's own code
        assert [outcome["code"] for outcome in ended.outcomes.values()] == [75, 75], ended.text
        updates = {outcome["updates"] for outcome in ended.outcomes.values()}
        assert len(updates) == 1
        assert ended.seconds < 20
        assert updates == {read_manifest(find_states(folder / "states")[0])["position"]["updates"]}
    _, done = finish(folder, 2, name="done")
    assert done["weights"] == whole[1]["weights"]
    assert samples_by_update(folder) == samples_by_update(whole[0])
