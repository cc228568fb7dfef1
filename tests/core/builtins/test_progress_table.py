"""progress_table: what it shows of a run in a file and on a terminal."""

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
import warnings
from contextlib import contextmanager, suppress

import pytest
import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import IterableDataset
from tqdm import tqdm

from pa_core import StopTrainingError, Trainer, TrainerCallback, hookimpl
from pa_core.builtins.run_view import above_bar_of_main_process
from pa_core.callbacks import (
    EarlyStoppingCallback,
    LogMetricsCallback,
    PrintMetricsCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    ProgressTableCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
)
from pa_core.display.screen import Progress
from pa_core.display.streams import is_terminal as is_a_terminal
from pa_core.display.terminal import Bar, _Tqdm
from tests.builtin_trainer import Interrupts, Records, make_trainer
from tests.core.builtins.test_progress import CountedTracker
from tests.helpers import tiny_data


@pytest.fixture(autouse=True)
def _no_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny_data(20))


class Copy(TrainerCallback):
    """Evaluates a second model."""

    @hookimpl
    def register_eval_models(self, trainer):
        return {"ema": trainer.model}


class Metrics(TrainerCallback):
    """Records metrics of each evaluation."""

    def __init__(self, *names):
        self.names, self.value = names, 0.0

    def on_eval_epoch_end(self, trainer):
        self.value += 0.01
        for name in self.names:
            trainer.run_history.update_metric(f"eval_{name}", self.value)


TWELVE = (
    *("accuracy", "f1", "precision", "recall", "auroc", "iou", "dice", "kappa", "specificity"),
    *("top5_accuracy", "perplexity", "calibration_error"),
)


def lines_of(capsys):
    """The lines on standard output; on the other one there is nothing."""
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\r" not in printed.out
    return [line for line in printed.out.splitlines() if not line.startswith("Plugins: ")]


def without_times(lines):
    return [re.sub(r"[\d:.]+s?$", "TIME", line) for line in lines]


def test_a_file_has_a_row_per_epoch_and_lines_at_the_start_and_the_end(capsys):
    trainer = make_trainer(ProgressTableCallback)
    trainer.train(tiny_data(40), 2, eval_dataset=tiny_data(8))
    start, data, space, header, rule, *rows, end_space, end = lines_of(capsys)
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert start == f"Training {type(trainer.model).__name__}: {size} parameters, cpu, float32"
    assert data == "40 train, 8 eval samples; 2 epochs, 10 updates of 8 samples"
    assert space == end_space == ""
    assert header.split() == "epoch train loss eval loss lr time".split()
    assert set(rule) == {"-"}
    train, evaluated = (
        trainer.run_history.get_metric_values(name)
        for name in ("train_loss_epoch", "eval_loss_epoch")
    )
    marks = ["*", "*" if evaluated[1] < evaluated[0] else ""]
    assert [row.split()[:-1] for row in rows] == [
        [str(epoch + 1), f"{train[epoch]:.4f}", f"{evaluated[epoch]:.4f}{marks[epoch]}", "0.1"]
        for epoch in range(2)
    ]
    assert len({row.index(".") for row in rows}) == 1  # numbers stand below each other
    best = min(evaluated)
    assert re.fullmatch(
        rf"Finished after 10 updates in [\d.]+s; best eval loss {best:.4f} in epoch "
        rf"{evaluated.index(best) + 1}",
        end,
    )


def test_short_epochs_take_a_line_each(capsys):
    make_trainer(ProgressTableCallback).train(tiny_data(8), 100, eval_dataset=tiny_data(8))
    printed = capsys.readouterr().out
    assert printed.count("\n") < 110
    assert len(printed) < 6000


def test_columns_name_the_evaluated_model_and_the_dataset(capsys):
    trainer = make_trainer(ProgressTableCallback, Copy, StepBasedEvaluationCallback(2))
    trainer.train(tiny_data(24), 1, eval_dataset={"dev": tiny_data(8), "test": tiny_data(16)})
    lines = lines_of(capsys)
    assert lines[1].startswith("24 train, 8 dev, 16 test samples;")
    trainer.evaluate({"dev": tiny_data(8), "test": tiny_data(16)})
    (*_, header, _, row) = lines_of(capsys)
    assert header.split("  ")[:2] == ["dev eval loss", "test eval loss"]
    assert header.endswith("ema dev eval loss  ema test eval loss   time")
    assert len(row.split()) == 5
    rule = next(number for number, line in enumerate(lines) if set(line) == {"-"})
    heading = " ".join(lines[3:rule])
    assert sorted(heading.split()) == sorted(
        "epoch update train loss dev eval loss test eval loss ema dev eval loss ema test eval loss "
        "lr time".split()
    )
    within, whole = (line.split() for line in lines[-4:-2])
    assert within[:2] == ["1", "2"]  # the epoch, and the update
    assert len(within) == 6
    assert whole[0] == "1"
    assert len(whole) == 8


def test_twelve_metrics_fold_at_80_columns_and_are_chosen_by_patterns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    make_trainer(ProgressTableCallback, Metrics(*TWELVE)).train(
        tiny_data(8), 3, eval_dataset=tiny_data(8)
    )
    lines = lines_of(capsys)
    assert max(map(len, lines)) <= 80
    rule = next(number for number, line in enumerate(lines) if set(line) == {"-"})
    assert len(lines[rule + 1 : -2]) == 9
    words = " ".join(lines[3:rule]).split()
    assert sorted(words) == sorted(
        "epoch train loss eval loss lr time".split() + " ".join(TWELVE).replace("_", " ").split()
    )
    table = ProgressTableCallback(columns=["eval_f1", "train_loss", "*loss_epoch"], summary=False)
    make_trainer(table, Metrics(*TWELVE)).train(tiny_data(8), 1, eval_dataset=tiny_data(8))
    header = lines_of(capsys)[1]
    assert header.split() == "epoch train loss eval loss f1 time".split()
    many = Metrics(*(f"class_{number}" for number in range(30)))
    make_trainer(ProgressTableCallback(summary=False), many).train(
        tiny_data(8), 2, eval_dataset=tiny_data(8)
    )
    (note,) = [line for line in lines_of(capsys) if "metrics" in line]
    assert note.startswith("The table has 24 of 33 metrics: the setting columns of progress_table")


def test_a_column_that_comes_later_starts_a_new_header(capsys):
    class Late(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 3:
                trainer.run_history.update_metric("oddity", 1.5)
                trainer.run_history.update_metric("confusion", [[1, 2], [3, 4]])

    make_trainer(ProgressTableCallback(summary=False), Late).train(tiny_data(8), 4)
    shown = [line.split()[0] for line in lines_of(capsys) if line]
    assert [word for word in shown if word.strip("-")] == ["epoch", "1", "2", "epoch", "3", "4"]


def test_requests_to_log_and_every_print_rows_within_the_epoch(capsys):
    table = ProgressTableCallback(every=2, summary=False)
    trainer = make_trainer(table)
    trainer.train(tiny_data(40), 2)
    places = [line[:13].split() for line in lines_of(capsys) if re.match(r" +\d ", line)]
    assert places == [["1", "2"], ["1", "4"], ["1"], ["2", "6"], ["2", "8"], ["2"]]
    assert trainer.run_history.num_recorded("train_loss") == 5  # one at the end of the last epoch


def test_a_resumed_run_continues_the_table(tmp_path, capsys):
    states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(ProgressTableCallback, states, Records([0.9, 0.1]), Interrupts(7)).train(
            tiny_data(24), 3
        )
    first = lines_of(capsys)
    assert [line.split()[0] for line in first[5:7]] == ["1", "2"]
    assert first[7:] == ["", *first[8:]]
    end = " ".join(first[8:])
    assert re.match(r"Interrupted after 7 updates in [\d.]+s; best train loss [\d.]+ in", end)
    assert re.search(r"Training state: .*update_00000006$", end)
    watch = EarlyStoppingCallback(5, watch_metric="score", greater_is_better=True)
    trainer = make_trainer(ProgressTableCallback, states, watch, Records([0.1, 0.5]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(tiny_data(24), 3, resume_from=tmp_path / "update_00000006", strict=False)
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(lines)
    assert "Resuming from" in text
    (row,) = [line.split() for line in lines if line.startswith("    3 ")]
    assert row[2] == "0.5000"  # not the best, which was that of epoch 1
    assert "best score 0.9000 in epoch 1" in text
    assert "Finished after 3 updates in" in text
    assert " since it was resumed, 9 in " in text
    assert re.search(r"Training state: .*final$", text)


def test_the_end_names_what_was_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved = (SaveBestModelCallback(watch_metric="train_loss_epoch"), SaveTrainingStateCallback())
    make_trainer(ProgressTableCallback, *saved).train(tiny_data(16), 2)
    assert (
        lines_of(capsys)[-1] == "Best model: best_model.pt, training state: training_states/final"
    )
    saved[0].save_path.unlink()
    unsaved = SaveBestModelCallback("other.pt", watch_metric="score")
    make_trainer(ProgressTableCallback, unsaved, Records([float("nan")])).train(tiny_data(16), 1)
    assert "best train loss" in lines_of(capsys)[-1]


def test_a_run_that_is_stopped_within_an_epoch_shows_what_that_recorded(capsys):
    class Stop(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 2:
                raise StopTrainingError("enough")

    trainer = make_trainer(ProgressTableCallback, Stop)
    trainer.train(tiny_data(16), num_epochs=5, per_device_batch_size=8)
    lines = lines_of(capsys)
    assert lines[-3].split()[0] == "2"
    assert lines[-1].endswith("in epoch 2")


def test_a_run_that_fails_shows_what_it_recorded_and_how_far_it_came(capsys):
    class Fails(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            trainer.evaluate(tiny_data(8))
            raise ZeroDivisionError

    trainer = make_trainer(ProgressTableCallback, Fails)
    with pytest.raises(ZeroDivisionError):
        trainer.train(tiny_data(16), 5, eval_dataset=tiny_data(8))
    row, space, end, states = lines_of(capsys)[-4:]
    assert (row.split()[0], space) == ("1", "")
    assert end.startswith("Failed after 2 updates in")
    assert states == "No training state was saved"
    with pytest.raises(ZeroDivisionError):  # before the first update
        trainer.train(tiny_data(16), 5, collate_fn=lambda samples: 1 / 0)
    assert not [line for line in lines_of(capsys) if line.startswith("Failed")]


def test_an_evaluation_within_a_run_leaves_the_values_of_the_epoch(capsys):
    class Evaluates(TrainerCallback):
        def on_eval_epoch_end(self, trainer):
            trainer.run_history.update_metric("accuracy", trainer.num_eval_batches / 10)

        def on_training_run_epoch_end(self, trainer):
            trainer.evaluate({"test": tiny_data(40)} if trainer.updates == 1 else tiny_data(40))
            trainer.run_history.update_metric("own", 7)

    trainer = make_trainer(ProgressTableCallback(summary=False), Evaluates)
    trainer.train(tiny_data(8), 2, eval_dataset=tiny_data(8))
    trainer.evaluate(tiny_data(40))
    tables = "\n".join(lines_of(capsys)).strip().split("\n\n")
    assert tables[0].startswith("test eval loss  test accuracy ")
    rows = [table.splitlines()[-1].split() for table in tables if "epoch" in table]
    assert [row[3:5] for row in rows] == [["0.1000*", "7"], ["0.1000", "7"]]
    history = trainer.run_history
    frame = history.to_pandas()
    assert list(frame.index) == [1, 2]
    assert list(frame["accuracy"]) == [0.1, 0.1]
    assert list(frame["own"]) == [7, 7]
    html = history._repr_html_()
    assert html.count("<tr>") == 3
    assert "<th>accuracy</th>" in html
    assert "epoch 2" in repr(history)
    assert history.plot()  # over epochs of one update each


def test_a_run_that_is_stopped_says_so(capsys):
    class Stops(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 3:
                raise StopTrainingError("enough")

    make_trainer(ProgressTableCallback, Stops).train(tiny_data(16), 5)
    *_, reason, space, end = lines_of(capsys)
    assert (reason, space) == ("enough", "")
    assert end.startswith("Stopped after 3 updates in")


@pytest.mark.parametrize(
    ("data", "length", "text"),
    [
        (tiny_data(20), "5 updates", "20 train samples; 5 updates of 8 samples"),
        (Stream(), "2 epochs", "2 epochs, updates of 8 samples"),
        (Stream(), "20 samples", "20 samples, updates of 8 samples"),
        (tiny_data(8), "0.1 seconds", "8 train samples; at most 0.10s, updates of 8 samples"),
    ],
)
def test_data_and_lengths_of_all_kinds_are_described(data, length, text, capsys):
    make_trainer(ProgressTableCallback).train(data, length)
    assert lines_of(capsys)[1] == text


@pytest.mark.parametrize(
    ("others", "missing"),
    [
        ((PrintMetricsCallback,), "epoch"),
        ((LogMetricsCallback,), "epoch"),
        ((PrintProgressCallback,), "Finished"),
        ((ProgressTableCallback,), ""),
    ],
)
def test_nothing_is_printed_twice(others, missing, capsys):
    make_trainer(ProgressTableCallback, *others).train(tiny_data(16), 1, eval_dataset=tiny_data(8))
    text = capsys.readouterr().out
    loss = len(re.findall(r"^ +1 |^train_loss_epoch: ", text, re.MULTILINE))
    ends = len(re.findall(r"^Finished after|^Training finished", text, re.MULTILINE))
    assert (loss, ends) == (1, 1)
    assert not missing or not re.search(rf"^{missing}", text, re.MULTILINE)


def test_a_logger_that_sends_metrics_elsewhere_leaves_the_table(capsys):
    class Sends(LogMetricsCallback):
        def log_metrics(self, trainer, metrics):
            pass

    make_trainer(ProgressTableCallback, Sends).train(tiny_data(16), 1)
    assert any(line.startswith("epoch") for line in lines_of(capsys))


class Clock:
    """A clock that a step advances."""

    def __init__(self, seconds, monkeypatch):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr("pa_core.builtins.progress_table.time.monotonic", lambda: self.now)

    def on_train_step_end(self, trainer):
        self.now += self.seconds


def test_a_long_epoch_prints_a_line_a_minute_in_a_file(capsys, monkeypatch):
    class Ticks(Clock, TrainerCallback):
        pass

    make_trainer(Ticks(10.0, monkeypatch), ProgressTableCallback(summary=False)).train(
        tiny_data(8 * 20), 1
    )
    lines = [line for line in lines_of(capsys) if line.startswith("Epoch")]
    assert len(lines) == 3
    assert re.fullmatch(r"Epoch 1/1: 6/20, 0\.1/s, loss [\d.]+, 2:20 left, run 2:20", lines[0])
    quiet = ProgressTableCallback(summary=False, bar=False)
    make_trainer(Ticks(10.0, monkeypatch), quiet).train(tiny_data(8 * 20), 1)
    assert not [line for line in lines_of(capsys) if line.startswith("Epoch")]


def test_c1_the_loss_is_read_at_displays_and_not_per_step(capsys):
    class Counted(Trainer):
        def train_epoch_start(self):
            super().train_epoch_start()
            self._means.loss = CountedTracker()

    CountedTracker.reads = 0
    trainer = make_trainer(ProgressTableCallback, trainer_class=Counted)
    trainer.train(tiny_data(392), 1)
    assert CountedTracker.reads == 0


# -- On a terminal -------------------------------------------------------------------------------


class Terminal:
    """What was written to a terminal, and what it shows at the end and after each part."""

    def __init__(self, columns):
        import pyte

        self.screen = pyte.Screen(columns, 60)
        self._stream = pyte.ByteStream(self.screen)
        self.raw, self.bars, self.both = b"", [], False

    def feed(self, part):
        self.raw += part
        for drawn in re.split(rb"(?<=[^\r])(?=\r)", part):  # a slow reader gets several at once
            self._feed(drawn)

    def _feed(self, part):
        self._stream.feed(part)
        lines = self.lines
        self.bars += [line for line in lines if re.match(r"Epoch \d|eval|Predict", line)]
        others = [re.match(r"folds:.*\|", line) for line in lines]
        self.both |= any(
            other and re.match(r"Epoch \d", line)
            for other, line in zip(others, lines[1:], strict=False)
        )

    @property
    def lines(self):
        return [line.rstrip() for line in self.screen.display if line.strip()]


@contextmanager
def terminal(monkeypatch, columns=80):
    """Have both outputs of this process on a terminal."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
    shown = Terminal(columns)

    def read():
        with suppress(OSError):
            while part := os.read(main, 65536):
                shown.feed(part)

    reader = threading.Thread(target=read)
    reader.start()
    streams = [open(os.dup(other), "w", buffering=1) for _ in range(2)]  # noqa: SIM115
    os.close(other)
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    try:
        yield shown
        assert not any("write" in vars(stream) for stream in streams)  # as they were
    finally:
        monkeypatch.undo()
        for stream in streams:
            stream.close()
        reader.join()
        os.close(main)


class Slow(TrainerCallback):
    """Takes time, and prints in all ways."""

    def __init__(self, stream=None):
        self.log = logging.Logger("own")
        if stream is not None:
            self.log.addHandler(logging.StreamHandler(stream))

    def on_train_step_end(self, trainer, step):
        time.sleep(0.004)
        if step == 3:
            trainer.print("NOTE by trainer.print")
            print("NOTE by print")
            self.log.warning("NOTE by logging")
            sys.stderr.write("NOTE by write\n")
            print("NOTE in ", end="")
        if step == 5:
            print("two parts")

    def on_eval_step_end(self, trainer):
        time.sleep(0.004)


def test_lines_stand_above_the_bar_which_leaves_nothing_behind(monkeypatch):
    with terminal(monkeypatch) as shown:
        trainer = make_trainer(ProgressTableCallback(interval=0.001), Slow(sys.stderr), Copy)
        trainer.train(tiny_data(64), 2, eval_dataset={"dev": tiny_data(24)})
    notes = [line for line in shown.lines if "NOTE" in line]
    ways = ("by trainer.print", "by print", "by logging", "by write", "in two parts")
    assert notes == [f"NOTE {way}" for way in ways] * 2
    assert not [line for line in shown.lines if "|" in line]
    rows = [line.split()[0] for line in shown.lines if re.match(r" +\d ", line)]
    assert rows == ["1", "2"]
    assert max(map(len, shown.bars)) <= 80
    titles = {line.partition("  ")[0] for line in shown.bars}
    assert {"Epoch 1/2", "Epoch 2/2", "Epoch 1/2 eval dev", "Epoch 2/2 eval ema dev"} <= titles
    assert re.search(
        r"Epoch 2/2 +\d+%\|.*\| \d/8, [\d.]+/s, loss [\d.]+, [\d.]+s left, run", str(shown.bars)
    )
    assert b"\x1b[1;32m" in shown.raw  # the best value
    assert not list(_Tqdm._instances)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopTrainingError])
@pytest.mark.parametrize("where", ["on_train_step_end", "on_eval_step_end"])
def test_the_bar_is_gone_however_a_run_ends(error, where, monkeypatch):
    def fail(self, trainer):
        raise error("on purpose")

    fails = type("Fails", (TrainerCallback,), {where: fail})
    table = ProgressTableCallback(interval=0.001)
    with terminal(monkeypatch) as shown:
        trainer = make_trainer(Slow, table, fails)
        with suppress(error):
            trainer.train(tiny_data(16), 1, eval_dataset=tiny_data(8))
        with suppress(error):
            trainer.evaluate(tiny_data(8))
    assert table._view is None
    assert shown.bars
    assert not [line for line in shown.lines if "|" in line]


def test_another_bar_takes_the_place_of_this_one(monkeypatch):
    with terminal(monkeypatch) as shown:
        make_trainer(Slow, ProgressTableCallback(interval=0.001), ProgressBarCallback(0.001)).train(
            tiny_data(64), 1
        )
    assert {line.partition(":")[0] for line in shown.bars} == {"Epoch 1"}


@pytest.mark.parametrize("variable", ["TERM=dumb", "CI=true", "NO_COLOR=1"])
@pytest.mark.parametrize("others", [(), (ProgressBarCallback(0.001),)])
def test_a_terminal_without_bars_or_colours_gets_plain_text(variable, others, monkeypatch):
    monkeypatch.setenv(*variable.split("="))
    with terminal(monkeypatch) as shown:
        trainer = make_trainer(Slow, ProgressTableCallback(interval=0.001), *others)
        trainer.train(tiny_data(64), 1)
    assert b"\x1b" not in shown.raw
    assert b"\r" not in shown.raw.replace(b"\r\n", b"")
    assert not shown.bars


def test_numbers_stand_below_each_other_and_the_rate_keeps_its_width(monkeypatch):
    class Decays(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            trainer.optimizer.param_groups[0]["lr"] /= 2.7

    scores = [0.9, 0.95, 0.91, 0.97, 0.5, 0.6, 0.98]
    with terminal(monkeypatch) as shown:
        trainer = make_trainer(ProgressTableCallback, Decays, Records(scores, "eval_acc"))
        trainer.train(tiny_data(8), 7)
    assert "\n".join(shown.lines).count("epoch  ") == 1
    rows = [line for line in shown.lines if re.match(r" +\d ", line)]
    assert len(rows) == 7
    assert (
        len({tuple(one.start() for one in re.finditer(r"\.\d{4}", row[:32])) for row in rows}) == 1
    )


def test_bars_of_other_code_stay_above_this_one_and_below_the_lines(monkeypatch):
    with terminal(monkeypatch) as shown:
        for _ in tqdm(range(2), desc="folds", leave=False):
            trainer = make_trainer(ProgressTableCallback(interval=0.001), Slow(sys.stderr))
            trainer.train(tiny_data(64), 1)
    torn = [line for line in shown.lines if "folds" in line or "|" in line]
    assert not torn
    assert len([line for line in shown.lines if re.fullmatch(r"NOTE (by|in) [\w. ]+", line)]) == 10
    assert shown.both  # bars were on the screen


def test_a_live_display_of_rich_stays_below_the_rows(monkeypatch):
    with terminal(monkeypatch) as shown:
        console = Console(file=sys.stdout, force_terminal=True)
        for _ in track(range(1), "folds", console=console, transient=True):
            make_trainer(ProgressTableCallback(interval=0.001), Slow).train(tiny_data(64), 2)
    assert not [line for line in shown.lines if "|" in line]
    assert [line.split()[0] for line in shown.lines if re.match(r" +\d ", line)] == ["1", "2"]
    assert "NOTE by print" in shown.lines


def test_a_row_starts_on_a_line_of_its_own(monkeypatch):
    class Dots(TrainerCallback):
        def on_train_step_end(self, trainer):
            print(".", end="", flush=True)

    with terminal(monkeypatch) as shown:
        make_trainer(ProgressTableCallback, Dots).train(tiny_data(24), 2)
    assert [line for line in shown.lines if "." * 3 in line] == ["..."] * 2


def test_a_stream_of_unknown_length_and_an_evaluation_alone_show_a_bar(monkeypatch):
    with terminal(monkeypatch) as shown:
        trainer = make_trainer(ProgressTableCallback(interval=0.001), Slow, Copy)
        trainer.train(Stream(), 1)
        trainer.evaluate(tiny_data(24))
    assert any(re.fullmatch(r"Epoch 1/1 \d steps, .*", line) for line in shown.bars)
    assert any(line.startswith("eval ema") for line in shown.bars)
    assert shown.lines[-3].split() == "eval loss ema eval loss time".split()


def test_a_prediction_shows_a_bar_without_a_loss(monkeypatch, capsys):
    class Predicts(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            trainer.predict(tiny_data(24))

        def on_predict_step_end(self, trainer):
            time.sleep(0.004)

    with terminal(monkeypatch) as shown:
        trainer = make_trainer(ProgressTableCallback(interval=0.001), Predicts)
        trainer.predict(Stream())
        assert trainer.predict(tiny_data(24)).shape == (24, 3)
        trainer.train(tiny_data(8), 2)
    lines = [line for line in shown.bars if "redict" in line]
    assert any(line.startswith("Epoch 2/2 predict") for line in lines)
    whole = re.compile(r"Predict +67%\|.*\| 2/3, [\d.]+/s, [\d.]+s left")
    assert any(map(whole.fullmatch, lines))
    assert any(re.fullmatch(r"Predict 2 steps, [\d.]+/s", line) for line in lines)
    assert not [line for line in lines if "loss" in line]
    assert not [line for line in shown.lines if "|" in line]
    assert "\n".join(shown.lines).count("epoch  ") == 1  # the table continues
    make_trainer(ProgressTableCallback, Predicts).predict(tiny_data(24))
    assert lines_of(capsys) == []


def test_folded_rows_have_no_empty_lines_and_a_narrower_terminal_is_kept_clean(monkeypatch):
    with terminal(monkeypatch, columns=60) as shown:
        names = [f"metric_{number}" for number in range(8)]
        trainer = make_trainer(
            ProgressTableCallback, StepBasedEvaluationCallback(2), Metrics(*names)
        )
        trainer.train(tiny_data(24), 1, eval_dataset=tiny_data(8))
    table = "\n".join(shown.lines).partition("epoch")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines() if re.match(r" {4}\d", line)]
    assert len(rows) == 2
    with terminal(monkeypatch, columns=60) as shown:
        bar = Bar(sys.stderr, [sys.stderr])
        bar.draw(Progress("Epoch 1", 1, 2, 0.5, 1.0, None))
        bar.draw(Progress("Epoch", 1, None, None, None, None))
        bar.close()
    assert b"  \r" not in shown.raw  # spaces would wrap in a terminal that is narrower by now


def test_what_a_forked_worker_prints_stands_above_the_bar(monkeypatch):
    with terminal(monkeypatch) as shown:
        bar = Bar(sys.stderr, [sys.stdout, sys.stderr])
        for step in range(2):
            child = os.fork()  # before this process draws the bar
            if child == 0:
                time.sleep(0.1)
                print(f"NOTE {step}", flush=True)
                sys.stderr.write("in two ")
                sys.stderr.write("parts\n")
                os._exit(0)
            bar.draw(Progress("Epoch 1", step, 2, 0.5, 1.0, None))
            os.waitpid(child, 0)
        bar.close()
    assert shown.bars
    assert shown.lines == ["NOTE 0", "in two parts", "NOTE 1", "in two parts"]


def test_what_another_process_prints_takes_the_place_of_the_bar(monkeypatch):
    with terminal(monkeypatch) as shown:
        bar = Bar(sys.stderr, [])
        bar.draw(Progress("Epoch 1", 1, 2, 0.5, 1.0, None))
        with above_bar_of_main_process():
            print("NOTE in ", end="")
            print("two parts")
        bar.draw(Progress("Epoch 1", 1, 2, 0.5, 1.0, None))
        bar.close()
    assert shown.bars
    assert shown.lines == ["NOTE in two parts"]


def test_what_is_no_terminal_is_known():
    assert not is_a_terminal(None)
    assert not is_a_terminal(torch)
