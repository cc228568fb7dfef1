"""profile: the times add up, the run is as before, and only what is timed is slower."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.utils.data import Dataset, TensorDataset

from pa_core import TrainerCallback, hookimpl
from pa_core.callbacks import SaveBestModelCallback, SaveTrainingStateCallback
from pa_core.diagnostics.stopwatch import Stopwatch
from pa_lab import ProfileCallback, ProfileSettings
from tests.builtin_trainer import Interrupts, make_trainer
from tests.helpers import assert_identical, tiny_data, weights_of

ROOT = Path(__file__).parents[3]


class Sleeps(TrainerCallback):
    """Takes a hundredth of a second for each update."""

    def on_optimizer_step_end(self, trainer):
        time.sleep(0.01)


class ReadsTheLoss(TrainerCallback):
    def on_train_step_end(self, trainer, batch_output):
        batch_output["loss"].item()


class SlowData(Dataset):
    """Fetches no batch in less than two hundredths of a second."""

    def __init__(self) -> None:
        self.data = tiny_data(24)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        time.sleep(0.0025)
        return self.data[index]


def rows(report, part="hooks"):
    if part == "hooks":
        return {(row["plugin"], row["hook"]): row for row in report["hooks"]}
    return {row["phase"]: row for row in report["phases"]}


def test_each_hook_and_phase_has_its_time_and_all_times_add_up(tmp_path, capsys):
    profile = ProfileCallback()
    saves = SaveTrainingStateCallback(tmp_path / "states", save_every_n_epochs=1)
    trainer = make_trainer(profile, Sleeps(), saves, SaveBestModelCallback(tmp_path / "best.pt"))
    trainer.train(tiny_data(44), 2, eval_dataset=tiny_data(12), gradient_accumulation_steps=2)
    report = profile.report()
    assert report["steps"] == 2 * 6
    hooks, phases = rows(report), rows(report, "phases")
    assert hooks["Sleeps", "on_optimizer_step_end"]["count"] == 2 * 3
    assert hooks["Sleeps", "on_optimizer_step_end"]["mean"] >= 0.01
    assert hooks["checkpoint", "on_training_run_epoch_end"]["count"] == 2
    assert not [name for name in hooks if name[0] in ("ProfileCallback", "pa_core")]
    assert phases["forward"]["count"] == phases["backward"]["count"] == 12
    assert phases["optimizer"]["count"] == 2 * 3 * 3  # clipping, update, dropping the gradients
    assert phases["evaluation"]["count"] == 2
    assert phases["saving"]["count"] >= 3
    total = sum(row["seconds"] for part in ("hooks", "phases") for row in report[part])
    assert total == pytest.approx(report["seconds"])
    assert all(row["seconds"] >= 0 for row in [*report["hooks"], *report["phases"]])
    shown = capsys.readouterr().out
    assert "Sleeps: on_optimizer_step_end" in shown
    assert "forward" in shown


def test_what_costs_next_to_nothing_is_printed_as_one_row_and_reported_whole(capsys):
    class Idle(TrainerCallback):
        def on_init_end(self, trainer): ...

        def on_train_epoch_end(self, trainer): ...

        def on_training_run_epoch_end(self, trainer): ...

    profile = ProfileCallback()
    make_trainer(profile, Idle(), Sleeps()).train(tiny_data(160), 1, per_device_batch_size=4)
    small = [row for row in profile.report()["hooks"] if row["share"] < 0.001]
    shown = capsys.readouterr().out
    assert len(small) >= 2
    assert f"{len(small)} more, below 0.1% each" in shown
    shares = [float(share) for share in re.findall(r"([\d.]+)%$", shown, re.MULTILINE)]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert "Idle: on_train_epoch_end" not in shown


def test_each_epoch_has_its_own_times():
    profile = ProfileCallback()
    make_trainer(profile, Sleeps()).train(tiny_data(44), 3)
    report = profile.report()
    assert [epoch["epoch"] for epoch in report["epochs"]] == [1, 2, 3]
    assert [epoch["steps"] for epoch in report["epochs"]] == [6, 6, 6]
    assert all(epoch["phases"]["plugins"] >= 0.06 for epoch in report["epochs"])
    times = sum(epoch["seconds"] for epoch in report["epochs"])
    assert times == pytest.approx(report["seconds"], rel=0.01)
    assert sum(epoch["phases"]["forward"] for epoch in report["epochs"]) == pytest.approx(
        rows(report, "phases")["forward"]["seconds"]
    )


def test_waiting_for_data_is_told_with_what_to_do_and_only_where_it_is_much(capsys):
    profile = ProfileCallback()
    make_trainer(profile).train(SlowData(), 1)
    assert profile.report()["data_wait"] > 0.1
    assert "'num_workers': …}, for example to 4" in capsys.readouterr().out
    slow_step = ProfileCallback()
    make_trainer(slow_step, Sleeps(), Sleeps(), Sleeps(), Sleeps()).train(tiny_data(44), 1)
    assert slow_step.report()["advice"] is None
    assert "num_workers" not in capsys.readouterr().out


def test_the_data_of_an_evaluation_is_no_waiting_of_training():
    profile = ProfileCallback()
    make_trainer(profile).train(tiny_data(24), 1, eval_dataset=SlowData())
    phases = rows(profile.report(), "phases")
    assert phases["data"]["count"] <= 3 + 1  # (the end of the epoch may be looked for, too)
    assert phases["evaluation"]["seconds"] >= 24 * 0.0025


def test_plugins_that_read_values_in_a_step_are_named_and_others_are_not(capsys):
    profile = ProfileCallback()
    make_trainer(profile, ReadsTheLoss(), Sleeps()).train(tiny_data(8 * 11), 1)
    assert profile.report()["waits"] == [
        {"plugin": "ReadsTheLoss", "hook": "on_train_step_end", "found": 2, "looked_at": 2}
    ]
    assert "ReadsTheLoss reads values" in capsys.readouterr().out


def test_a_run_gets_the_same_numbers_and_everything_is_as_before():
    trainers = [make_trainer(), make_trainer(ProfileCallback(), ReadsTheLoss())]
    for trainer in trainers:
        trainer.train(tiny_data(44), 2, eval_dataset=tiny_data(12))
    assert_identical(*map(weights_of, trainers))
    trainer = trainers[1]
    assert not {"optimizer_step", "backward_step", "_run_train_epoch"} & vars(trainer).keys()
    assert "moved" not in vars(trainer._engine)
    assert vars(trainer).keys() == vars(trainers[0]).keys()
    (found,) = trainer.plugins.implementations("on_train_step_end")
    assert found is trainer.plugins.implementations("on_train_step_end")[0]


def test_a_run_that_fails_leaves_everything_as_before_too():
    trainer = make_trainer(ProfileCallback(), Interrupts(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tiny_data(44), 1)
    assert "optimizer_step" not in vars(trainer)
    (found,) = trainer.plugins.implementations("on_train_step_start")
    assert found is trainer.plugins.implementations("on_train_step_start")[0]


def test_wrappers_are_timed_before_and_after_what_they_surround_and_may_change_it():
    class Doubles(TrainerCallback):
        @hookimpl(wrapper=True)
        def calculate_train_batch_loss(self, trainer, batch):
            time.sleep(0.01)
            output = yield
            time.sleep(0.01)
            return output | {"seen": True}

    class Looks(TrainerCallback):
        def on_train_step_end(self, trainer, batch_output):
            assert batch_output["seen"]

    profile = ProfileCallback()
    make_trainer(profile, Doubles(), Looks()).train(tiny_data(16), 1)
    row = rows(profile.report())["Doubles", "calculate_train_batch_loss"]
    assert row["count"] == 2
    assert row["mean"] >= 0.02
    assert rows(profile.report(), "phases")["forward"]["mean"] < row["mean"]


def test_what_is_raised_inside_a_wrapper_comes_through():
    class Catches(TrainerCallback):
        @hookimpl(wrapper=True)
        def calculate_train_batch_loss(self, trainer, batch):
            try:
                return (yield)
            except ZeroDivisionError:
                inputs, targets = batch
                return {
                    "loss": trainer.model(inputs).sum(),
                    "model_outputs": None,
                    "batch_size": len(targets),
                }

    class Fails(TrainerCallback):
        @hookimpl
        def calculate_train_batch_loss(self, trainer, batch):
            raise ZeroDivisionError

    make_trainer(ProfileCallback(), Catches(), Fails()).train(tiny_data(16), 1)
    with pytest.raises(ZeroDivisionError) as caught:
        make_trainer(ProfileCallback(), Fails()).train(tiny_data(16), 1)
    assert "of plugin 'Fails'" in caught.value.__notes__[0]


def test_the_report_is_written_as_json(tmp_path):
    profile = ProfileCallback(to_json=tmp_path / "new" / "profile.json")
    trainer = make_trainer(profile)
    trainer.train(tiny_data(16), 1)
    written = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert written == profile.report() == trainer.plugins.by_name["ProfileCallback"].report()


def test_a_trace_holds_some_steps_with_the_names_of_phases_and_plugins(tmp_path, capsys):
    file = tmp_path / "trace.json"
    profile = ProfileCallback(trace=file, trace_start=2, trace_steps=3)
    make_trainer(profile, Sleeps()).train(tiny_data(44), 1)
    names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count("forward") == 3
    assert names.count("Sleeps: on_optimizer_step_end") == 3
    assert any("aten::linear" in str(name) for name in names)
    file.unlink()
    profile = ProfileCallback(trace=file, trace_start=7)
    make_trainer(profile).train(tiny_data(44), 1)
    assert not file.exists()
    assert "No trace was written: the run had 6 micro-batches" in capsys.readouterr().out


def test_laps_within_laps_are_not_counted_twice():
    watch = Stopwatch()
    with watch.lap("outer"):
        for _ in range(2):
            with watch.lap("inner"):
                time.sleep(0.01)
    assert watch.spent["inner"].count == 2
    assert watch.spent["inner"].seconds >= 0.02
    assert watch.spent["outer"].seconds < watch.spent["inner"].seconds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_plugins_that_wait_for_it_are_named():
    profile = ProfileCallback()
    data = TensorDataset(torch.randn(88, 6), torch.arange(88) % 3)
    make_trainer(profile, ReadsTheLoss(), Sleeps()).train(data, 1)
    assert [row["plugin"] for row in profile.report()["waits"]] == ["ReadsTheLoss"]


@pytest.mark.parametrize("page", ["docs/plugins/lab.md", "plugins/lab/README.md"])
def test_the_table_of_settings_is_that_of_the_code(page):
    text = (ROOT / page).read_text().partition("| setting | default | meaning |\n")[2]
    rows = [
        f"| `{key}` | {'none' if field.default is None else f'`{field.default}`'} "
        f"| {field.description} |"
        for key, field in ProfileSettings.model_fields.items()
    ]
    assert text.partition("\n\n")[0].splitlines()[1:] == rows


def test_a_table_of_settings_builds_it_and_its_mistakes_are_errors():
    settings = ProfileSettings(trace="trace.json", trace_steps=2)
    profile = ProfileCallback.from_settings(settings)
    assert (profile.trace, profile.trace_start, profile.trace_steps) == (Path("trace.json"), 10, 2)
    for wrong in ({"trace_steps": 0}, {"trace_start": -1}, {"nonesuch": 1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            ProfileSettings(**wrong)


def test_plugins_answer_the_hook_of_costs_in_its_place_or_without_it():
    class Answers:
        @hookimpl(optionalhook=True)
        def calculate_costs(self, trainer):
            return {"advice": "none"}

    trainer = make_trainer(Answers(), ProfileCallback())
    assert trainer.plugins.hook.calculate_costs(trainer=trainer) == {"advice": "none"}
    trainer = make_trainer(ProfileCallback())
    trainer.train(tiny_data(16), 1)
    assert trainer.plugins.hook.calculate_costs(trainer=trainer)["steps"] == 2
    assert "calculate_costs" not in make_trainer(Answers()).plugins.hooks
