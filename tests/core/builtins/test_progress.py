"""print_progress and progress_bar: what they show of a run."""

from contextlib import suppress

import pytest
from torch.utils.data import IterableDataset

from pa_core import StopTrainingError, Trainer, TrainerCallback
from pa_core.builtins.progress_bar import _Bar
from pa_core.callbacks import (
    PrintProgressCallback,
    ProgressBarCallback,
    StepBasedEvaluationCallback,
)
from pa_core.tracking import LossTracker
from tests.builtin_trainer import Interrupts, make_trainer
from tests.helpers import tiny_data


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny_data(20))


def last_displays(text):
    """The final text of each terminal line that shows a bar."""
    lines = [line.split("\r")[-1] for line in text.split("\n")]
    return [line for line in lines if "batch" in line]


def test_lines_show_the_progress_of_a_run(capsys):
    trainer = make_trainer(PrintProgressCallback)
    trainer.train(tiny_data(16), 2, eval_dataset=tiny_data(8))
    trainer.train(tiny_data(16), 1, reset_run_history=False, eval_dataset={"dev": tiny_data(8)})
    trainer.evaluate(tiny_data(8))
    trainer.evaluate({"dev": tiny_data(8)})
    shown = [
        line for line in capsys.readouterr().out.splitlines() if line and "Plugins" not in line
    ]
    assert shown == [
        "Training starts",
        "Epoch 1 of 2: training",
        "Epoch 1: evaluation",
        "Epoch 2 of 2: training",
        "Epoch 2: evaluation",
        "Training finished after 4 updates",
        "Training starts",
        "Epoch 3 of 3: training",
        "Epoch 3: evaluation on dev",
        "Training finished after 2 updates",
        "Evaluation starts",
        "Evaluation finished",
        "Evaluation starts",
        "Evaluation on dev",
        "Evaluation finished",
    ]


def test_a_run_of_unknown_length_shows_no_number_of_epochs(capsys):
    make_trainer(PrintProgressCallback).train(Stream(), "5 updates")
    assert "Epoch 1: training" in capsys.readouterr().out


@pytest.fixture
def shown_bars(monkeypatch):
    """Have bars where there is no terminal."""
    monkeypatch.setattr("pa_core.builtins.progress_bar.shows_bars", lambda: True)


def test_there_are_no_bars_in_a_file(capsys):
    trainer = make_trainer(ProgressBarCallback(1e-9), PrintProgressCallback)
    trainer.train(tiny_data(44), 2, eval_dataset=tiny_data(20))
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\r" not in printed.out


def test_bars_show_steps_and_mean_loss(capsys, shown_bars):
    trainer = make_trainer(ProgressBarCallback)
    trainer.train(tiny_data(44), 2, eval_dataset=tiny_data(20))
    bars = last_displays(capsys.readouterr().err)
    assert [bar.split(":")[0] for bar in bars] == ["Epoch 1", "Evaluation", "Epoch 2", "Evaluation"]
    names = ["train_loss_epoch", "eval_loss_epoch"] * 2
    values = {name: list(trainer.run_history.get_metric_values(name)) for name in names}
    for bar, name, epoch, steps in zip(bars, names, (0, 0, 1, 1), (6, 3) * 2, strict=True):
        assert f"{steps}/{steps}" in bar
        assert f"loss={values[name][epoch]:.4g}" in bar
        assert "batch/s" in bar or "s/batch" in bar


def test_bars_show_limits_and_the_names_of_evaluation_datasets(capsys, shown_bars):
    trainer = make_trainer(ProgressBarCallback)
    trainer.train_batch_limit = 2
    trainer.train(tiny_data(44), 1, eval_dataset={"dev": tiny_data(8), "test": tiny_data(24)})
    bars = last_displays(capsys.readouterr().err)
    assert [bar.split(":")[0] for bar in bars] == ["Epoch 1", "Evaluation", "Evaluation"]
    assert "2/2" in bars[0]
    assert "dev" in bars[1]
    assert "1/1" in bars[1]
    assert "test" in bars[2]
    assert "3/3" in bars[2]


def test_a_stream_of_unknown_length_shows_a_count(capsys, shown_bars):
    make_trainer(ProgressBarCallback).train(Stream(), 1)
    (bar,) = last_displays(capsys.readouterr().err)
    assert "3batch" in bar


def test_the_bar_of_a_resumed_epoch_starts_where_it_was_interrupted(tmp_path, capsys, shown_bars):
    class Saves(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 4:
                trainer.control.save(tmp_path / "state")

    with pytest.raises(KeyboardInterrupt):
        make_trainer(Saves, Interrupts(4)).train(tiny_data(44), 1)
    bars = ProgressBarCallback()
    seen = []

    class ReadsPosition(TrainerCallback):
        def on_train_step_start(self, trainer):
            seen.append(bars.pbar.n)

    make_trainer(bars, ReadsPosition).train(tiny_data(44), 1, resume_from=tmp_path / "state")
    assert seen[0] == 4
    assert "6/6" in last_displays(capsys.readouterr().err)[-1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopTrainingError])
@pytest.mark.parametrize("where", ["on_train_step_end", "on_eval_step_end"])
def test_bars_are_closed_however_the_run_ends(error, where):
    opened = []

    class Fails(TrainerCallback):
        pass

    def fail(self, trainer):
        opened.append(bars.pbar if where == "on_train_step_end" else bars.eval_pbar)
        raise error("on purpose")

    setattr(Fails, where, fail)
    bars = ProgressBarCallback()
    trainer = make_trainer(bars, Fails)
    with suppress(error):
        trainer.train(tiny_data(16), 1, eval_dataset=tiny_data(8))
    assert bars.pbar is None
    assert bars.eval_pbar is None
    assert opened[0].disable  # tqdm disables a bar that is closed
    assert not _Bar._instances


def test_the_bar_of_an_evaluation_is_closed_after_an_error():
    class Fails(TrainerCallback):
        def on_eval_step_end(self, trainer):
            raise RuntimeError("on purpose")

    bars = ProgressBarCallback()
    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(bars, Fails).evaluate(tiny_data(8))
    assert not _Bar._instances


def test_an_evaluation_within_an_epoch_leaves_the_training_bar_running(capsys, shown_bars):
    make_trainer(ProgressBarCallback, StepBasedEvaluationCallback(3)).train(
        tiny_data(44), 1, eval_dataset=tiny_data(16)
    )
    training = [bar for bar in last_displays(capsys.readouterr().err) if bar.startswith("Epoch 1")]
    assert "6/6" in training[-1]


class CountedTracker(LossTracker):
    """Counts how often the mean is read."""

    reads = 0

    @property
    def average(self):
        CountedTracker.reads += 1
        return super().average


@pytest.mark.parametrize(("interval", "most"), [(60.0, 1), (1e-9, 50)])
def test_c1_the_loss_is_read_once_per_display_and_not_per_step(interval, most, capsys, shown_bars):
    class Counted(Trainer):
        def train_epoch_start(self):
            super().train_epoch_start()
            self._means.loss = CountedTracker()

    CountedTracker.reads = 0
    trainer = make_trainer(ProgressBarCallback(interval), trainer_class=Counted)
    trainer.train(tiny_data(392), 1)
    # 49 steps: one read at the end of the epoch only, or one more at each step
    assert CountedTracker.reads == most
    assert "49/49" in last_displays(capsys.readouterr().err)[-1]


@pytest.mark.gpu
def test_bars_and_lines_work_on_a_gpu():
    make_trainer(ProgressBarCallback, PrintProgressCallback).train(
        tiny_data(44), 1, eval_dataset=tiny_data(8)
    )
