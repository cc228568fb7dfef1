import json
import shutil
import warnings

import pytest
import torch

from pa_core import TrainerCallback
from pa_core.callbacks import SaveBestModelCallback, SaveTrainingStateCallback
from pa_core.checkpoint.storage import find_states, verify
from tests.builtin_trainer import Interrupts, Records, make_trainer
from tests.helpers import assert_identical, tiny_data, weights_of


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def train(folder, *more, epochs=2, samples=44, run=None, in_background=False, **kwargs):
    # In the foreground, so that the folder can be looked at within the run.
    save = SaveTrainingStateCallback(folder, in_background=in_background, **kwargs)
    trainer = make_trainer(save, *more)
    trainer.train(tiny_data(samples), epochs, **(run or {}))
    return trainer


def damage(state_dir):
    path = state_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_a_state_is_saved_at_the_end_by_default(tmp_path):
    train(tmp_path)
    assert names(tmp_path) == ["final"]
    assert verify(tmp_path / "final") == []


def test_states_are_saved_after_epochs_and_updates(tmp_path):
    train(tmp_path, epochs=4, save_every_n_epochs=2, save_every_n_steps=9)
    assert names(tmp_path) == [
        "epoch_0002",
        "epoch_0004",
        "final",
        "update_00000009",
        "update_00000018",
    ]


def test_steps_are_optimizer_updates(tmp_path):
    run = {"gradient_accumulation_steps": 2}
    train(tmp_path, run=run, save_every_n_steps=2, save_at_end=False)
    assert names(tmp_path) == ["update_00000002", "update_00000004", "update_00000006"]


@pytest.mark.parametrize("every", ["5 updates", "40 samples", "83.4%"])
def test_states_are_saved_by_any_duration(tmp_path, every):
    train(tmp_path, epochs=1, every=every, save_at_end=False)
    (name,) = names(tmp_path)
    assert name in ("update_00000005", "update_00000006")


def test_a_time_between_states_counts_from_the_start_of_the_run(tmp_path):
    train(tmp_path, every="1 hour", save_at_end=False)
    assert not list(tmp_path.iterdir())
    train(tmp_path, epochs=1, every="0.000001 seconds", save_at_end=False)
    assert len(names(tmp_path)) == 6


def test_b9_the_newest_states_are_kept(tmp_path):
    seen = []

    class Looks(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            seen.append(names(tmp_path))

    train(tmp_path, Looks, epochs=5, save_every_n_epochs=1, max_checkpoints=2)
    assert names(tmp_path) == ["epoch_0005", "final"]
    assert max(map(len, seen)) == 2


def test_b9_damaged_states_do_not_count(tmp_path):
    class Damages(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            if trainer.run_history.current_epoch == 4:
                damage(tmp_path / "epoch_0002")
                damage(tmp_path / "epoch_0003")

    train(tmp_path, Damages, epochs=4, save_every_n_epochs=1, max_checkpoints=3, save_at_end=False)
    # 1 and 4 are all that is intact, so nothing of this may go.
    assert names(tmp_path) == ["epoch_0001", "epoch_0002", "epoch_0003", "epoch_0004"]


def test_b9_the_last_intact_state_stays_while_all_newer_ones_are_damaged(tmp_path):
    seen = []

    class Damages(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            for path in find_states(tmp_path):
                if path.name != "epoch_0001":
                    damage(path)

        def on_train_epoch_end(self, trainer):
            seen.append(names(tmp_path))

    train(tmp_path, Damages, epochs=4, save_every_n_epochs=1, max_checkpoints=2, save_at_end=False)
    assert seen == [
        [],
        ["epoch_0001"],
        ["epoch_0001", "epoch_0002"],
        ["epoch_0001", "epoch_0002", "epoch_0003"],
    ]
    assert names(tmp_path) == ["epoch_0001", "epoch_0002", "epoch_0003", "epoch_0004"]


def test_what_the_user_has_put_there_is_left_alone(tmp_path):
    trainer = make_trainer()
    trainer.train(tiny_data(16), 1)
    trainer.save_training_state(tmp_path / "before_the_experiment")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "epoch_0000").mkdir()
    train(tmp_path, epochs=4, save_every_n_epochs=1, max_checkpoints=1)
    assert names(tmp_path) == ["before_the_experiment", "epoch_0000", "final", "notes.txt"]


def test_a13_a_state_is_of_the_update_that_its_name_claims(tmp_path):
    kept = {}

    class Keeps(TrainerCallback):
        def on_train_step_end(self, trainer):
            kept[trainer.updates] = weights_of(trainer)

    train(tmp_path, Keeps, save_every_n_steps=5)
    for update in (5, 10):
        state_dir = tmp_path / f"update_{update:08d}"
        trainer = make_trainer(SaveTrainingStateCallback(tmp_path))
        trainer.load_training_state(state_dir)
        assert_identical(weights_of(trainer), kept[update])
        assert json.loads((state_dir / "state.json").read_text())["position"]["updates"] == update


@pytest.mark.parametrize("updates", [7, 8, 11])
def test_auto_resumes_from_the_newest_intact_state_and_ends_as_the_whole_run(tmp_path, updates):
    whole = train(tmp_path / "whole", epochs=3, save_every_n_steps=4)
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train(folder, Interrupts(updates), epochs=3, save_every_n_steps=4)
    resumed = train(folder, epochs=3, save_every_n_steps=4, run={"resume_from": "auto"})
    assert_identical(weights_of(resumed), weights_of(whole))
    assert names(folder) == names(tmp_path / "whole")


def test_auto_starts_anew_where_nothing_was_saved(tmp_path):
    trainer = train(tmp_path / "new", run={"resume_from": "auto"})
    assert trainer.updates == 12


def test_a24_a_resumed_run_saves_at_the_same_places(tmp_path):
    def run(folder, *more, **run):
        return train(folder, *more, every="5 updates", save_at_end=False, run=run)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Interrupts(7))
    run(tmp_path / "cut", resume_from="auto")
    assert (
        names(tmp_path / "cut")
        == names(tmp_path / "whole")
        == [
            "update_00000005",
            "update_00000010",
        ]
    )


def test_the_final_state_is_that_of_the_last_update_and_not_of_the_best_epoch(tmp_path):
    last = {}

    class Keeps(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            last.update(weights_of(trainer))

    best = SaveBestModelCallback(tmp_path / "best.pt", "score")
    train(tmp_path / "states", best, Records([1, 2]), Keeps)
    trainer = make_trainer(SaveTrainingStateCallback(tmp_path), SaveBestModelCallback())
    trainer.load_training_state(tmp_path / "states" / "final")
    assert_identical(weights_of(trainer), last)


def test_a_finished_run_can_be_made_longer(tmp_path):
    whole = train(tmp_path / "whole", epochs=4)
    train(tmp_path / "part", epochs=2)
    longer = train(tmp_path / "part", epochs=4, run={"resume_from": "auto"})
    assert_identical(weights_of(longer), weights_of(whole))


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    class Spoils(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if trainer.updates == 3:
                with torch.no_grad():
                    trainer.model[0].weight[0, 0] = float("nan")

    train(tmp_path, Spoils, save_every_n_steps=2, max_checkpoints=1)
    assert names(tmp_path) == ["update_00000002"]
    assert "aren't finite" in capsys.readouterr().out


@pytest.mark.parametrize("often", [{"save_every_n_steps": 1}, {"every": "1 updates"}])
def test_a_second_run_starts_its_count_again(tmp_path, often):
    trainer = make_trainer(SaveTrainingStateCallback(tmp_path, save_at_end=False, **often))
    for _ in range(2):
        trainer.train(tiny_data(44), 1, gradient_accumulation_steps=3)
        assert names(tmp_path) == ["update_00000001", "update_00000002"]
        shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", ["save_every_n_epochs", "save_every_n_steps", "max_checkpoints"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=name):
        SaveTrainingStateCallback(**{name: 0})


def test_states_of_another_run_in_the_folder_are_a_warning(tmp_path):
    def train(trainer, **arguments):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train(tiny_data(8), 1, **arguments)
        return [str(warning.message) for warning in caught]

    trainer = make_trainer(SaveTrainingStateCallback(tmp_path))
    assert train(trainer) == []
    assert train(trainer) == []  # the states are of the same callback
    assert train(make_trainer(SaveTrainingStateCallback(tmp_path)), resume_from="auto") == []
    (text,) = train(make_trainer(SaveTrainingStateCallback(tmp_path)))
    assert text.startswith(f"{tmp_path} has training states of another run, such as final")
    assert train(make_trainer(SaveTrainingStateCallback(tmp_path / "other"))) == []
