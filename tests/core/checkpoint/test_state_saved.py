"""`on_training_state_saved`: at least once per state, once it is complete on disk."""

from __future__ import annotations

import pytest

from pa_core import TrainerCallback
from pa_core.builtins.checkpoint import SaveTrainingStateCallback
from pa_core.checkpoint.storage import StateReader
from tests.core.checkpoint.test_resume_once import make
from tests.helpers import tiny_data


class Saved(TrainerCallback):
    """Records each state, which it must be able to read."""

    def __init__(self):
        self.states = []

    def on_training_state_saved(self, trainer, state_dir):
        StateReader(state_dir).read_json("state.json")
        self.states.append((state_dir.name, trainer.updates))

    @property
    def names(self):
        return [name for name, _ in self.states]


@pytest.mark.parametrize("in_background", [False, True])
def test_each_state_is_announced_before_another_one_replaces_it(tmp_path, in_background):
    saved = Saved()
    checkpoint = SaveTrainingStateCallback(
        tmp_path, 1, 1, max_checkpoints=1, in_background=in_background
    )
    trainer = make(checkpoint, saved)
    trainer.train(tiny_data(16), 2, per_device_batch_size=4)
    updates = [f"update_{number:08d}" for number in range(1, 9)]
    assert saved.names == [*updates[:4], "epoch_0001", *updates[4:], "epoch_0002", "final"]
    if not in_background:
        assert saved.states[:2] == [("update_00000001", 1), ("update_00000002", 2)]


def test_a_state_written_in_the_background_is_announced_at_a_later_update(tmp_path):
    class WaitForThread(TrainerCallback):
        def on_train_step_start(self, trainer, step):
            pending = trainer._saver._pending if "_saver" in vars(trainer) else None
            if pending is not None and pending.thread is not None:
                pending.thread.join()

    saved = Saved()
    checkpoint = SaveTrainingStateCallback(tmp_path, None, 2, save_at_end=False, in_background=True)
    make(checkpoint, saved, WaitForThread()).train(tiny_data(20), 1, per_device_batch_size=4)
    assert saved.states == [("update_00000002", 3), ("update_00000004", 5)]


def test_a_state_saved_outside_a_run_is_announced_and_a_resumed_one_once_more(tmp_path):
    saved = Saved()
    trainer = make(saved)
    trainer.train(tiny_data(8), 1, per_device_batch_size=4)
    trainer.save_training_state(tmp_path / "state")
    assert saved.names == ["state"]
    trainer.load_training_state(tmp_path / "state")
    assert saved.names == ["state"]
    trainer.train(tiny_data(8), 2, per_device_batch_size=4, resume_from=tmp_path / "state")
    assert saved.names == ["state", "state"]


def test_a_state_that_was_not_saved_is_not_announced(tmp_path):
    class Full(SaveTrainingStateCallback):
        def on_save_training_state(self, trainer):
            raise OSError("no space left on device")

    saved = Saved()
    full = Full(tmp_path, None, 1, save_at_end=False, on_save_error="warn", in_background=False)
    with pytest.warns(UserWarning, match="No training state was saved"):
        make(full, saved).train(tiny_data(8), 1, per_device_batch_size=4)
    assert saved.names == []
