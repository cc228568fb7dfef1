"""What a trainer offers to plugins, by value, on one process."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from pa_core import TrainerCallback
from pa_core.callbacks import LimitBatchesCallback
from pa_core.durations import Duration, RunLength
from pa_core.errors import TrainingStateError
from pa_core.utils import DataLoaderSlice
from tests.builtin_trainer import Records, make_trainer
from tests.helpers import NoisyData, NoisyModel, assert_identical, tiny_data, weights_of

# -- Hardware and processes -----------------------------------------------------------------------


def test_one_process_is_the_main_one_and_has_everything():
    trainer = make_trainer()
    assert (trainer.rank, trainer.num_processes, trainer.is_main_process) == (0, 1, True)
    assert trainer.scaler is None
    assert trainer.sharded_by is None
    assert trainer.has_whole_gradients


def test_collectives_of_one_process_return_what_they_get():
    trainer, tensor = make_trainer(), torch.arange(3.0)
    assert trainer.sum(tensor) is tensor
    assert trainer.largest(3, -1) == (3, -1)
    assert trainer.gather_objects({"a": [1]}) == [{"a": [1]}]
    assert trainer.run_on_all(lambda: 7) == 7
    trainer.broadcast([tensor])
    assert tensor.tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(ZeroDivisionError):
        trainer.run_on_all(lambda: 1 / 0)


@pytest.mark.parametrize(
    "collective",
    [
        lambda trainer: trainer.sum(torch.ones(1)),
        lambda trainer: trainer.largest(1),
        lambda trainer: trainer.gather_objects(1),
        lambda trainer: trainer.run_on_all(lambda: 1),
        lambda trainer: trainer.broadcast([torch.ones(1)]),
    ],
)
def test_a_collective_of_a_plugin_on_the_main_process_only_is_an_error(collective):
    class MainOnly(TrainerCallback):
        runs_on = "main"

        def on_train_epoch_end(self, trainer):
            collective(trainer)

    with pytest.raises(RuntimeError, match="runs on the main process only"):
        make_trainer(MainOnly()).train(tiny_data(8), 1)


def test_a_batch_on_a_cpu_stays_where_it_is():
    batch = {"inputs": [torch.ones(2)], "name": "a"}
    assert make_trainer().move(batch) is batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_is_moved_to_the_device_with_its_structure():
    trainer = make_trainer()
    moved = trainer.move({"inputs": [torch.ones(2)], "name": "a"})
    assert moved["inputs"][0].device == trainer.device
    assert moved["name"] == "a"
    scaled = make_trainer(mixed_precision="fp16")
    assert isinstance(scaled.scaler, torch.amp.GradScaler)


# -- The run --------------------------------------------------------------------------------------


class Watches(TrainerCallback):
    """Notes what a plugin can read at each event."""

    def __init__(self):
        self.in_run, self.losses, self.batches, self.mean = {}, [], [], []

    def on_training_run_start(self, trainer):
        self.in_run["training"] = trainer.in_run
        self.in_run["evaluate() in it"] = None

    def on_train_epoch_start(self, trainer):
        assert trainer.mean_loss == 0
        self.losses = []

    def on_train_step_end(self, trainer, batch_output):
        self.losses.append(batch_output["loss"].item())
        if trainer.num_train_batches == 5:  # whole batches
            assert trainer.mean_loss == pytest.approx(sum(self.losses) / len(self.losses))

    def on_eval_epoch_start(self, trainer):
        self.batches.append((trainer.eval_name, trainer.num_eval_batches))

    def on_eval_step_end(self, trainer, batch_output):
        self.mean.append((batch_output["loss"].item(), trainer.mean_loss))

    def on_train_epoch_end(self, trainer):
        trainer.evaluate(tiny_data(8))

    def on_evaluation_run_start(self, trainer):
        self.in_run["evaluate() in it"] = trainer.in_run

    def on_training_run_epoch_end(self, trainer):
        self.in_run["after it"] = trainer.in_run


def test_a_run_is_in_progress_in_its_events_but_not_in_an_evaluation_of_its_own():
    watches = Watches()
    trainer = make_trainer(watches)
    assert not trainer.in_run
    trainer.train(tiny_data(40), 1)
    assert watches.in_run == {"training": True, "evaluate() in it": False, "after it": True}
    assert not trainer.in_run
    assert len(watches.losses) == 5
    assert [mean for _, mean in watches.mean] == pytest.approx([loss for loss, _ in watches.mean])


def test_the_length_of_the_run():
    trainer = make_trainer()
    trainer.train(tiny_data(44), 2, gradient_accumulation_steps=2)
    assert trainer.run_length == RunLength(Duration(2, "epochs"), 6, None, updates_per_epoch=3)
    trainer.train(DataLoader(tiny_data(8), batch_size=4), "3 updates", max_num_train_steps=2)
    assert trainer.run_length == RunLength(Duration(3, "updates"), None, 2, updates_per_epoch=2)


# -- Data -----------------------------------------------------------------------------------------


def test_the_loaders_and_their_batches_within_the_limits():
    watches = Watches()
    trainer = make_trainer(watches)
    assert trainer.train_dataloader is None
    assert (trainer.num_train_batches, trainer.num_eval_batches) == (None, None)
    sets = {"small": tiny_data(9), "large": tiny_data(25)}
    trainer.train(tiny_data(44), 1, eval_dataset=sets)
    assert len(trainer.train_dataloader) == trainer.num_train_batches == 6
    assert {name: len(loader) for name, loader in trainer.eval_dataloaders.items()} == {
        "small": 2,
        "large": 4,
    }
    assert watches.batches[1:] == [("small", 2), ("large", 4)]  # the first is of evaluate()
    assert trainer.num_eval_batches == 2
    limited = make_trainer(LimitBatchesCallback(3))
    limited.train(tiny_data(44), 1, eval_dataset=tiny_data(40))
    assert (limited.num_train_batches, limited.num_eval_batches) == (3, 3)
    assert list(limited.eval_dataloaders) == [None]


def test_a_stream_has_no_number_of_batches():
    trainer = make_trainer()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tiny_data(8))

    trainer.train(Stream(), 1, per_device_batch_size=4)
    assert trainer.num_train_batches is None


class Seen(TrainerCallback):
    def __init__(self):
        self.epochs = {}

    def on_train_step_start(self, trainer, batch):
        self.epochs.setdefault(trainer.position.epoch, []).append(batch[0].clone())


class SeesAgain(TrainerCallback):
    """Iterates over the batches of each epoch again, after its end."""

    def __init__(self):
        self.epochs = {}

    def on_train_epoch_end(self, trainer):
        self.epochs[trainer.position.epoch] = [batch[0] for batch in trainer.train_batches()]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_of_an_epoch_are_those_of_the_loop(workers):
    seen, again = Seen(), SeesAgain()
    trainer = make_trainer(seen, again, model=NoisyModel())
    trainer.train(
        NoisyData(), 2, train_dataloader_kwargs={"num_workers": workers}, per_device_batch_size=6
    )
    assert seen.epochs.keys() == again.epochs.keys() == {1, 2}
    for number, batches in seen.epochs.items():
        assert len(batches) == len(again.epochs[number]) == 4
        assert all(map(torch.equal, batches, again.epochs[number]))
    for number, batches in seen.epochs.items():  # after the run, of any epoch
        few = list(trainer.train_batches(2, epoch=number))
        assert len(few) == 2
        assert all(torch.equal(one, other[0]) for one, other in zip(batches, few, strict=False))
    assert not trainer.is_padding_batch


def test_looking_at_the_batches_again_does_not_change_training():
    runs = [make_trainer(*plugins, model=NoisyModel()) for plugins in ((), (SeesAgain(),))]
    for trainer in runs:
        trainer.train(NoisyData(), 3, eval_dataset=tiny_data(9))
    assert_identical(*map(weights_of, runs))


def test_the_batches_respect_both_limits_and_need_a_run():
    trainer = make_trainer(LimitBatchesCallback(3))
    with pytest.raises(ValueError, match="No training batches yet"):
        next(trainer.train_batches())
    trainer.train(tiny_data(44), 1)
    assert [len(list(trainer.train_batches(limit))) for limit in (None, 2, 5)] == [3, 2, 3]
    ready = make_trainer()
    ready.train(DataLoaderSlice(DataLoader(tiny_data(44), batch_size=4), 5), 1)
    assert len(list(ready.train_batches())) == 5


# -- Saving ---------------------------------------------------------------------------------------


class Saves(TrainerCallback):
    """Stops after two updates, and saves states on the way."""

    def __init__(self, folder):
        self.folder = folder

    def on_optimizer_step_end(self, trainer):
        if trainer.updates == 2:
            trainer.save_training_state(self.folder / "later", {"is": "later"})
            assert not (self.folder / "later").exists()
            with pytest.raises(TrainingStateError, match="leave out now=True"):
                trainer.save_training_state(self.folder / "never", now=True)
            trainer.control.stop("enough")

    def on_stop_training_error(self, trainer):
        assert (self.folder / "later").is_dir()
        trainer.save_training_state(self.folder / "now", {"is": "now"}, now=True)
        assert (self.folder / "now").is_dir()

    def on_training_run_end(self, trainer):
        torch.nn.init.zeros_(trainer.model[0].weight)


def test_a_state_is_saved_at_once_or_at_the_boundary(tmp_path):
    trainer = make_trainer(Saves(tmp_path))
    trainer.train(tiny_data(44), 1)
    assert {path.name for path in tmp_path.iterdir()} == {"now", "later"}
    loaded = []
    for name in ("now", "later"):
        other = make_trainer()
        metadata = other.load_training_state(tmp_path / name)
        assert metadata == {"is": name, "current_epoch": 1, "global_step": 2}
        assert other.updates == 2
        loaded.append(weights_of(other))
    assert_identical(*loaded)
    assert loaded[0]["0.weight"].any()


def test_a_state_that_need_not_be_saved_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    trainer = make_trainer()
    trainer.train(tiny_data(8), 1)
    with pytest.warns(UserWarning, match="No training state was saved"):
        trainer.save_training_state(tmp_path / "file" / "state", must=False)
    with pytest.raises(OSError, match="file"):
        trainer.save_training_state(tmp_path / "file" / "state")


def test_old_states_are_removed_if_asked(tmp_path):
    trainer = make_trainer()
    trainer.train(tiny_data(8), 1)
    for number in (1, 2, 3):
        trainer.save_training_state(tmp_path / f"epoch_{number:04d}", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0002", "epoch_0003"]


def test_waiting_for_a_state_that_is_written_in_the_background(tmp_path):
    class Waits(TrainerCallback):
        def on_train_step_start(self, trainer, step):
            if step == 1:
                trainer.control.save(tmp_path / "state", in_background=True)
            elif step == 3:
                trainer.wait_for_saves()
                assert (tmp_path / "state").is_dir()

    trainer = make_trainer(Waits(), Records([1.0]))
    trainer.wait_for_saves()  # nothing to wait for
    trainer.train(tiny_data(44), 1)
    assert (tmp_path / "state").is_dir()
