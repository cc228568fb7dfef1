"""States survive failing disks and killed processes, and damage is reported."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from pa_core.checkpoint import atomic_io, storage
from pa_core.errors import TrainingStateError
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of


def new_trainer(*callbacks, **options) -> Trainer:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(
        model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, plugins=(), **options
    )


def saved(state_dir: Path) -> Trainer:
    trainer = new_trainer()
    trainer.train(tiny_data(8), 1)
    trainer.save_training_state(state_dir)
    return trainer


def test_a_replacement_that_fails_leaves_the_state_that_was_there(tmp_path, monkeypatch):
    trainer, rename, calls = saved(tmp_path / "state"), os.rename, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("the network says no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="network"):
        trainer.save_training_state(tmp_path / "state")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert not storage.verify(tmp_path / "state")


def test_a_state_whose_replacement_was_never_completed_is_found_again(tmp_path):
    saved(tmp_path / "state")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    trash = tmp_path / f".trash-state-{atomic_io._HOST}-{gone.pid}-1-00000000"
    os.rename(tmp_path / "state", trash)
    assert storage.newest_intact_state(tmp_path) == tmp_path / "state"


def test_leftovers_of_killed_processes_are_removed_and_those_of_running_ones_are_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        started = atomic_io.start_of(alive.pid)
        for owner in (f"{gone.pid}-{started}", f"{alive.pid}-{started}", f"{alive.pid}-1"):
            (tmp_path / f".tmp-update_00000001-{atomic_io._HOST}-{owner}-00000000").mkdir()
        (tmp_path / ".tmp-of-somebody-else").mkdir()
        new_trainer(SaveTrainingStateCallback(tmp_path, save_at_end=False)).train(tiny_data(8), 1)
    finally:
        alive.kill()
        alive.wait()
    assert {path.name for path in tmp_path.iterdir()} == {
        f".tmp-update_00000001-{atomic_io._HOST}-{alive.pid}-{started}-00000000",
        ".tmp-of-somebody-else",
    }


def test_the_newest_state_is_the_one_saved_last_whatever_the_clock_says(tmp_path, monkeypatch):
    class SetBack(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            now = 1e9 - 100 * trainer.position.epoch
            monkeypatch.setattr(time, "time", lambda: now)

    save = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, save_at_end=False)
    new_trainer(SetBack(), save).train(tiny_data(8), 3)
    names = [path.name for path in storage.find_states(tmp_path)]
    assert names == ["epoch_0003", "epoch_0002", "epoch_0001"]


def forged(source: Path, target: Path, change) -> Path:
    """A copy with changed content and correct hashes."""
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text())
    content = json.loads((target / "state.json").read_text())
    change(content, manifest)
    (target / "state.json").write_bytes(storage.json_bytes(content))
    manifest["files"]["state.json"] = atomic_io.size_and_hash(target / "state.json")
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(storage.json_bytes(manifest)).hexdigest()
    (target / "manifest.json").write_bytes(storage.json_bytes(manifest))
    return target


def nest(content, manifest):
    deep = content["run_history"] = []
    for _ in range(900):
        deep.append([])
        deep = deep[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda content, manifest: content["position"].update(extra=1),
        lambda content, manifest: content.pop("position"),
        lambda content, manifest: content.update(position=[1]),
        lambda content, manifest: content["position"].update(epoch="1"),
        lambda content, manifest: content.pop("optimizer"),
        lambda content, manifest: content.update(optimizer={"$tensor": ["a"]}),
        lambda content, manifest: manifest.pop("run"),
        lambda content, manifest: content.update(run_history=[1]),
        nest,
    ],
)
def test_invalid_content_with_correct_hashes_is_reported(tmp_path, change):
    saved(tmp_path / "state")
    state = forged(tmp_path / "state", tmp_path / "forged", change)
    trainer = new_trainer()
    before = weights_of(trainer)
    with pytest.raises(TrainingStateError):
        trainer.train(tiny_data(8), 2, resume_from=state)
    assert_identical(weights_of(trainer), before)


def test_a_good_state_loaded_after_an_interruption_can_be_saved_again(tmp_path):
    class Interrupt(TrainerCallback):
        def on_backward_end(self, trainer):
            raise KeyboardInterrupt

    saved(tmp_path / "good")
    trainer = new_trainer(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tiny_data(8), 1)
    trainer.load_training_state(tmp_path / "good")
    trainer.save_training_state(tmp_path / "again")


def test_a_setting_that_json_lacks_is_saved_as_text(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        '[tool.pa-core]\nplugins = ["early_stopping"]\n'
        "[tool.pa-core.early_stopping]\nearly_stopping_threshold = inf\n"
    )
    model = tiny_model()
    trainer = Trainer(
        model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), settings=file
    )
    trainer.train(tiny_data(8), 1, eval_dataset=tiny_data(4))
    trainer.save_training_state(tmp_path / "state")
    assert not storage.verify(tmp_path / "state")


@pytest.mark.parametrize("policy", ["warn", "stop"])
def test_a_state_that_cannot_be_written_stops_the_run_or_warns(tmp_path, policy):
    class Full(TrainerCallback):
        """Has the disk full from the second state on."""

        def on_save_training_state(self, trainer, state_dir):
            if trainer.updates > 2:
                raise OSError(28, "No space left on device")

    save = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, on_save_error=policy)
    trainer = new_trainer(Full(), save)
    if policy == "stop":
        with pytest.raises(OSError, match="No space left"):
            trainer.train(tiny_data(16), 1, per_device_batch_size=4)
    else:
        with pytest.warns(UserWarning, match="No training state was saved.*No space left"):
            trainer.train(tiny_data(16), 1, per_device_batch_size=4)
        assert trainer.updates == 4
    assert [path.name for path in tmp_path.iterdir()] == ["update_00000002"]
    assert not storage.verify(tmp_path / "update_00000002")


def test_a_strict_run_refuses_to_resume_with_anything_different(tmp_path):
    saved(tmp_path / "state")
    with pytest.raises(TrainingStateError, match="seed: 42 → 7.*strict=False"):
        new_trainer(seed=7).train(tiny_data(8), 2, resume_from=tmp_path / "state", strict=True)
    with pytest.warns(UserWarning, match="seed: 42 → 7"):
        new_trainer(seed=7).train(tiny_data(8), 2, resume_from=tmp_path / "state")
    new_trainer().train(tiny_data(8), 2, resume_from=tmp_path / "state", strict=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_dataset_names_the_sample(workers):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            if index == 5:
                raise ZeroDivisionError("no picture")
            return tiny_data(8)[index]

    with pytest.raises(ZeroDivisionError) as caught:
        new_trainer().train(
            Broken(), 1, train_dataloader_kwargs={"num_workers": workers, "shuffle": False}
        )
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "in sample 5 of Broken" in text


def test_a_file_of_a_state_is_answered_with_its_folder(tmp_path):
    trainer = new_trainer()
    trainer.train(tiny_data(8), 1)
    trainer.save_training_state(tmp_path / "state")
    message = f"is a folder, here {tmp_path / 'state'}"
    with pytest.raises(TrainingStateError, match=message):
        new_trainer().train(tiny_data(8), 2, resume_from=tmp_path / "state" / "manifest.json")
    with pytest.raises(TrainingStateError, match="No training state at .*nothing; .* has state$"):
        new_trainer().train(tiny_data(8), 2, resume_from=tmp_path / "nothing")


def test_without_an_optimizer_a_model_can_be_saved_and_a_state_is_refused(tmp_path):
    trainer = Trainer(tiny_model(), nn.CrossEntropyLoss(), None, callbacks=(), plugins=())
    with pytest.raises(TrainingStateError, match="Without an optimizer.* save_checkpoint"):
        trainer.save_training_state(tmp_path / "state")
    assert not list(tmp_path.iterdir())
    trainer.save_checkpoint(tmp_path / "model.pt")
    assert "optimizer_state_dict" not in trainer.load_checkpoint(tmp_path / "model.pt")
