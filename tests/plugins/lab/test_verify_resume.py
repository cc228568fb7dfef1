"""``pa verify-resume`` finds what a state doesn't hold, and names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pa_lab.command import verify_resume_app
from pa_lab.diff import compare_states
from tests.core.checkpoint.test_resume import run

ROOT = Path(__file__).parents[3]
SCRIPT = """
import os, sys
import torch
from torch import nn
from pa_core import Trainer, TrainerCallback
from tests.helpers import NoisyData, NoisyModel, tiny_data

class Data(NoisyData):
    pass

class Schedule:
    def __init__(self, optimizer):
        self.optimizer, self.count = optimizer, 0

    def step(self):
        self.count += 1
        self.optimizer.param_groups[0]["lr"] = 0.01 / self.count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

class Callback(TrainerCallback):
    pass

# HERE

model = NoisyModel()
trainer = Trainer(
    model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=0.01),
    callbacks=[Callback()], plugins=["checkpoint"], seed=int(sys.argv[1]),
)
trainer.train(
    Data(22), 2, eval_dataset=tiny_data(6), per_device_batch_size=4, resume_from="auto",
    create_scheduler_fn=Schedule,
)
"""
TORCH_ALONE = """
import time
import torch
from pa_core import Trainer, TrainerCallback
from tests.helpers import tiny_data, tiny_model

class Clock(TrainerCallback):
    changes_training = False

    def __init__(self):
        self.times, self.latest = [], 0.0

    def on_train_step_end(self, trainer):
        self.times.append([trainer.updates, time.perf_counter()])
        if trainer.updates > 2:
            self.latest = time.perf_counter()

    def state_dict(self):
        return {"times": self.times, "latest": self.latest}

    def load_state_dict(self, state):
        self.times, self.latest = state["times"], state["latest"]

model = tiny_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = Trainer(model, torch.nn.CrossEntropyLoss(), optimizer, callbacks=[Clock], plugins=())
trainer.train(tiny_data(44), 2, eval_dataset=tiny_data(6))
"""
BOTH_SAME = "Both runs are the same, bit for bit"
UNSAVED_CALLBACK = """
class Callback(TrainerCallback):
    def __init__(self):
        self.updates_seen = 0

    def on_optimizer_step_start(self, trainer):
        self.updates_seen += 1
        for parameter in trainer.model.parameters():
            parameter.grad *= self.updates_seen
"""
OWN_RANDOMNESS = """
class Data(NoisyData):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + os.urandom(1)[0] / 255, y
"""
UNSAVED_SCHEDULE = """
class Forgetful(Schedule):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

Schedule = Forgetful
"""


def verify(folder: Path, monkeypatch: pytest.MonkeyPatch, change: str, *options: str):
    script = folder / "train.py"
    script.write_text(SCRIPT.replace("# HERE", change))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'plugins' / 'lab'}")
    done = CliRunner().invoke(verify_resume_app, [*options, str(script), "7"])
    assert not (folder / "training_states").exists()  # nothing of the user's was written
    return done.exit_code, done.output


@pytest.mark.slow
def test_a_script_that_keeps_the_rules_is_the_same_and_its_run_may_end_by_itself(
    tmp_path, monkeypatch
):
    code, report = verify(tmp_path, monkeypatch, "", "--at", "7")  # in the second epoch of two
    assert (code, report.partition(":")[0]) == (0, BOTH_SAME), report
    assert "12 updates without interruption, and 7 updates, a kill, and 5 more" in report


@pytest.mark.slow
def test_generators_that_nobody_draws_from_and_times_of_an_observer_may_differ(
    tmp_path, monkeypatch
):
    script = tmp_path / "train.py"
    script.write_text(TORCH_ALONE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'plugins' / 'lab'}")
    done = CliRunner().invoke(verify_resume_app, ["--updates", "4", str(script)])
    assert (done.exit_code, done.output.partition(":")[0]) == (0, BOTH_SAME), done.output
    output = " ".join(done.output.split())
    assert "except what differs between any two runs in that of 'Clock'." in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "first", "cause"),
    [
        (
            UNSAVED_CALLBACK,
            "  weights, layers.0.",
            "`updates_seen` of the plugin 'Callback' (Callback) was 3 at update 3 and is 0 after",
        ),
        (
            UNSAVED_SCHEDULE,
            "  weights, layers.0.",
            "`count` of the scheduler (Forgetful) was 3 at update 3 and is 0 after resuming",
        ),
    ],
)
def test_what_is_kept_and_not_saved_is_named(tmp_path, monkeypatch, change, first, cause):
    code, report = verify(tmp_path, monkeypatch, change, "--updates", "6", "--at", "3")
    assert code == 1, report
    assert "killed at update 3 and resumed differs from the uninterrupted one" in report
    assert first in report
    assert "The training loss differs from update " in report
    assert cause in report


@pytest.mark.slow
def test_randomness_that_no_seed_reaches_is_told_before_any_interruption(tmp_path, monkeypatch):
    code, report = verify(tmp_path, monkeypatch, OWN_RANDOMNESS, "--updates", "4")
    assert code == 1, report
    assert "differ at update 2, before any interruption" in report
    assert "Sample 0 of the training data (Data) differs each time" in report
    assert "os.urandom" in report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("raise SystemExit", "ended without calling Trainer.train"),
        ("raise ValueError('no data here')", "no data here"),
    ],
)
def test_a_script_that_cannot_be_run_is_told_with_its_own_words(tmp_path, monkeypatch, change, why):
    code, report = verify(tmp_path, monkeypatch, change)
    assert code == 2
    assert why in report


def test_arguments_that_make_no_sense_are_told(tmp_path):
    for options, why in (
        (["--at", "20", "x.py"], "--at must be between 1 and 19, not 20"),
        ([str(tmp_path / "x.py")], "Script not found"),
    ):
        done = CliRunner().invoke(verify_resume_app, options)
        assert done.exit_code == 2
        assert why in done.output


def test_states_are_compared_bit_for_bit_and_differences_have_names(tmp_path):
    for name, seed in (("one", 11), ("same", 11), ("other", 12)):
        run(save_to=tmp_path / name, seed=seed, epochs=1)
    one, same, other = (tmp_path / name / "0003-epoch" for name in ("one", "same", "other"))
    assert compare_states(one, same) == []
    found = compare_states(one, other)
    assert found[0].part == "weights"
    assert {"optimizer", "run history", "plugin 'LossSum'"} <= {item.part for item in found}
    names = [item.name for item in found if item.part in ("optimizer", "run history")]
    assert "state.layers.0.weight.exp_avg" in names
    assert "train_loss_epoch of epoch 1.value" in names
    later = compare_states(tmp_path / "one" / "0002", tmp_path / "one" / "0003")
    assert "position, updates: 2 and 3" in map(str, later)
