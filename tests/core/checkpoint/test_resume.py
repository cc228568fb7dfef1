"""A run that is interrupted and resumed equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from pa_core.errors import TrainingStateError
from tests.helpers import NoisyData, NoisyModel, assert_identical, tiny_data, weights_of


class LossSum(TrainerCallback):
    """A plugin with state, which it resets in each epoch and each run."""

    def __init__(self):
        self.total, self.epochs, self.tensor = 0.0, [], torch.zeros(2)

    def on_training_run_start(self, trainer):
        self.epochs = []

    def on_train_epoch_start(self, trainer):
        self.total = 0.0

    def on_train_step_end(self, trainer, batch_output):
        if trainer.position.batch == 0 or trainer.updates:
            self.total += batch_output["loss"].item()
            self.tensor += torch.rand(2)  # draws numbers, and must not shift training

    def on_train_epoch_end(self, trainer):
        self.epochs.append(self.total)

    def state_dict(self):
        return {"total": self.total, "epochs": self.epochs}

    def load_state_dict(self, state):
        self.total, self.epochs = state["total"], list(state["epochs"])


class SaveEveryUpdate(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_optimizer_step_end(self, trainer):
        trainer.save_training_state(self.folder / f"{trainer.updates:04d}")

    def on_train_epoch_end(self, trainer):
        trainer.save_training_state(self.folder / f"{trainer.updates:04d}-eval")

    def on_training_run_epoch_end(self, trainer):
        trainer.save_training_state(self.folder / f"{trainer.updates:04d}-epoch")


def run(*, workers=0, save_to=None, resume_from=None, epochs=2, seed=11):
    model = NoisyModel()
    callback = LossSum()
    callbacks = [callback] if save_to is None else [callback, SaveEveryUpdate(save_to)]
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.Adam(model.parameters(), lr=0.01),
        callbacks=callbacks,
        plugins=(),
        seed=seed,
    )
    trainer.train(
        NoisyData(22),  # 6 micro-batches of 4 and 2: windows of 2, 2, 2
        num_epochs=epochs,
        eval_dataset=tiny_data(6),
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_clip_norm=1.0,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.05, total_steps=6
        ),
        train_dataloader_kwargs={"num_workers": workers},
        resume_from=resume_from,
    )
    return trainer, callback


def outcome(trainer, callback):
    optimizer = trainer.optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer["state"].items()
        for name, value in state.items()
    }
    history = [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in trainer.run_history.records
    ]
    rest = (
        history,
        trainer.scheduler.state_dict(),
        optimizer["param_groups"],
        callback.state_dict(),
        trainer.updates,
        trainer.position.samples,
    )
    return weights_of(trainer) | tensors, rest


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_every_update_gives_the_uninterrupted_run(tmp_path, workers):
    whole, whole_callback = run(save_to=tmp_path, workers=workers)
    expected_tensors, expected_rest = outcome(whole, whole_callback)
    states = sorted(tmp_path.iterdir())
    assert len(states) == 6 + 2 + 2
    for state in states:
        torch.manual_seed(hash(state.name) % 1000)  # whatever the new process has drawn before
        tensors, rest = outcome(*run(resume_from=state, workers=workers))
        assert_identical(expected_tensors, tensors)
        assert rest == expected_rest, state.name


def test_the_augmentation_is_the_same_for_any_number_of_workers():
    assert_identical(weights_of(run(workers=0)[0]), weights_of(run(workers=2)[0]))


def test_another_seed_gives_another_run():
    first, second = weights_of(run(seed=1)[0]), weights_of(run(seed=2)[0])
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_second_resume_of_a_resumed_run_is_exact_too(tmp_path):
    """In pytorch-accelerated, only the first save of a fresh run could be loaded (fault B1)."""
    whole = run(save_to=tmp_path / "first")
    again = run(save_to=tmp_path / "second", resume_from=tmp_path / "first" / "0002")
    third = run(resume_from=tmp_path / "second" / "0005")
    for tensors, rest in (outcome(*again), outcome(*third)):
        assert_identical(outcome(*whole)[0], tensors)
        assert rest == outcome(*whole)[1]


def test_a_folder_of_states_means_its_newest_intact_one(tmp_path):
    whole = run(save_to=tmp_path)
    for name in ("0006", "0006-eval", "0006-epoch"):
        shutil.rmtree(tmp_path / name)
    damaged = tmp_path / "0005" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match=r"0004.*newest intact.*0005/model.safetensors.*damaged"):
        resumed = run(resume_from=tmp_path)
    assert_identical(outcome(*whole)[0], outcome(*resumed)[0])


def test_when_no_state_is_intact_the_error_names_them_all(tmp_path):
    run(save_to=tmp_path, epochs=1)
    for state in tmp_path.iterdir():
        (state / "state.json").write_text("{}")
    with pytest.raises(TrainingStateError, match="No state.*0003.*0002.*0001"):
        run(resume_from=tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.json", "manifest.json", "process-00000.safetensors"]
)
def test_a_damaged_state_is_refused_before_anything_changes(tmp_path, name):
    run(save_to=tmp_path, epochs=1)
    path = tmp_path / "0002" / name
    path.write_bytes(path.read_bytes()[:-1] + b"~")
    with pytest.raises(TrainingStateError, match=name):
        run(resume_from=tmp_path / "0002")


def test_a_missing_and_an_unlisted_file_are_reported(tmp_path):
    run(save_to=tmp_path, epochs=1)
    (tmp_path / "0002" / "model.safetensors").rename(tmp_path / "0002" / "more.safetensors")
    with pytest.raises(
        TrainingStateError, match=r"model.safetensors is missing.*more.safetensors isn't listed"
    ):
        run(resume_from=tmp_path / "0002")


def test_a_state_of_a_different_model_is_refused_naming_the_difference(tmp_path):
    run(save_to=tmp_path, epochs=1)
    model = nn.Linear(6, 3)
    trainer = Trainer(
        model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()), callbacks=(), plugins=()
    )
    before = weights_of(trainer)
    with (
        pytest.raises(TrainingStateError, match=r"a different model than this Linear.*layers"),
        pytest.warns(UserWarning, match="differs"),
    ):
        trainer.train(
            tiny_data(22), 1, per_device_batch_size=4, resume_from=tmp_path / "0003-epoch"
        )
    assert_identical(before, weights_of(trainer))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    whole = run(save_to=tmp_path)
    assert_identical(outcome(*whole)[0], outcome(*run(resume_from=tmp_path / "0006-epoch"))[0])


def test_a_plugin_state_that_is_not_plain_data_is_refused_naming_plugin_and_key(tmp_path):
    class Bad(TrainerCallback):
        def state_dict(self):
            return {"inner": {"callback": print}}

        def load_state_dict(self, state): ...

    model = NoisyModel()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.Adam(model.parameters()),
        callbacks=[Bad],
        plugins=(),
    )
    with pytest.raises(TrainingStateError, match=r"plugin 'Bad'.inner.callback can't be saved"):
        trainer.save_training_state(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_names_of_states_in_pytorch_accelerated_find_those_here(tmp_path, capsys):
    def trainer():
        saving = SaveTrainingStateCallback(
            tmp_path, save_every_n_epochs=1, save_every_n_steps=3, save_at_end=False
        )
        model = nn.Linear(6, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = nn.CrossEntropyLoss()
        return Trainer(model, loss, optimizer, callbacks=[saving], plugins=())

    trainer().train(tiny_data(16), 2)
    for name, right in (("epoch_1", "epoch 2, update 2"), ("step_3", "epoch 2, update 3")):
        resumed = trainer()
        resumed.train(tiny_data(16), 2, resume_from=tmp_path / name)
        assert (resumed.updates, resumed.run_history.current_epoch) == (4, 3)
        assert right in capsys.readouterr().out
        metadata = trainer().load_training_state(tmp_path / f"update_{3:08d}")
        assert metadata == {"current_epoch": 2, "global_step": 3}
    message = "No training state at .*epoch_9; .* has epoch_0002, update_00000003, epoch_0001"
    with pytest.raises(TrainingStateError, match=message):
        trainer().train(tiny_data(16), 2, resume_from=tmp_path / "epoch_9")
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    trainer().train(tiny_data(16), 3, gradient_accumulation_steps=2)
    # There, a step is a micro-batch.
    with pytest.raises(TrainingStateError, match="No training state at .*step_3; "):
        trainer().train(tiny_data(16), 3, resume_from=tmp_path / "step_3")


def test_a_state_of_pytorch_accelerated_is_named(tmp_path):
    torch.save({}, tmp_path / "trainer_metadata.pt")
    trainer = Trainer(nn.Linear(1, 1), nn.MSELoss(), torch.optim.SGD, plugins=())
    with pytest.raises(TrainingStateError, match="saved by pytorch-accelerated"):
        trainer.train(tiny_data(8), 1, resume_from=tmp_path)
