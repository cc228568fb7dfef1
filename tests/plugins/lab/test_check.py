"""pa check and fast_dev_run: a run is gone through once, mistakes are found, nothing is kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from textwrap import dedent

import pytest

from pa_core import TrainerCallback
from pa_core.callbacks import FastDevRunCallback, SaveBestModelCallback, SaveTrainingStateCallback
from pa_lab.check import check_script, check_settings
from tests.builtin_trainer import make_trainer
from tests.helpers import tiny_data
from tests.warm import start_warm

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys
import torch
from torch.utils.data import TensorDataset
from pa_core import Trainer

model = torch.nn.Linear(4, 1)
data = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
trainer = Trainer(model, torch.nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1))
trainer.train(
    data,
    num_epochs=5,
    eval_dataset=data,
    gradient_accumulation_steps=2,
    create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=int(sys.argv[1])
    ),
)
trainer.save_checkpoint("last.pt")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'plugins' / 'lab'}")
    monkeypatch.delenv("PA_CORE_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def settings(folder, text):
    (folder / "pyproject.toml").write_text(dedent(text))


def test_a_script_that_is_right_is_told_whole_with_exit_code_0_and_writes_nothing(project):
    settings(
        project,
        """
        [tool.pa-core]
        plugins = ["checkpoint", "early_stopping", "save_best_model"]
        """,
    )
    (done,) = start_warm("pa_core", "check", "train.py", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    *_, rest, end = done.stdout.strip().split("\n\n")
    assert end == "No problems found."  # what the run is comes last, below the loop
    rows = dict(line.split("  ", 1) for line in rest.splitlines() if "  " in line)
    told = {name: value.strip() for name, value in rows.items()}
    assert told["updates"] == "20"
    assert told["samples per update"] == "16"
    assert told["scheduler"] == "CosineAnnealingLR"
    assert told["settings"] == "pyproject.toml"
    assert told["plugins"].endswith("checkpoint, early_stopping, save_best_model")
    assert told["training state"].endswith("saved and loaded")
    assert "on_training_run_epoch_end\n" in done.stdout
    assert ":environment" not in done.stdout
    assert sorted(path.name for path in project.iterdir()) == ["pyproject.toml", "train.py"]


def test_settings_are_checked_with_the_plugins_that_the_script_passes(project):
    settings(project, "[tool.pa-core]\n[tool.pa-core.early_stopping]\nearly_stopping_patience = 3")
    assert "isn't enabled" in "".join(check_settings(project))
    code = SCRIPT.replace("0.1))", '0.1), plugins=["early_stopping"])')
    (project / "train.py").write_text(code)
    (done,) = start_warm("pa_core", "check", "train.py", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "early_stopping" in done.stdout
    (project / "train.py").write_text(SCRIPT)
    (done,) = start_warm("pa_core", "check", "train.py", "20")
    assert done.returncode == 1
    assert "'early_stopping' isn't enabled" in done.stdout


def test_all_that_is_wrong_with_a_run_is_told(project):
    settings(
        project,
        """
        [tool.pa-core]
        plugins = ["early_stopping", "save_best_model"]
        [tool.pa-core.early_stopping]
        watch_metric = "eval_loss_epochs"
        [tool.pa-core.save_best_model]
        watch_metric = "accuracy"
        greater_is_better = true
        """,
    )
    assert check_settings(project / "train.py") == []
    text, problems = check_script(project / "train.py", ["5"])
    assert "CosineAnnealingLR" in text
    schedule, stopping, best = problems
    assert "was built for 5 updates (T_max), but the run has 20" in schedule
    assert "early_stopping watches 'eval_loss_epochs'" in stopping
    assert "Did you mean 'eval_loss_epoch'?" in stopping
    assert "save_best_model watches 'accuracy'" in best


def test_a_disk_too_small_for_the_states_is_told(monkeypatch):
    from pa_lab.check_plugin import CheckPlugin

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        check = CheckPlugin(report)
        saves = SaveTrainingStateCallback(Path(folder, "no", "such"), max_checkpoints=10**15)
        trainer = make_trainer(check, FastDevRunCallback(), saves)
        trainer.train(tiny_data(16), 1)
        (problem,) = check.report["problems"]
        assert "the training states kept there need" in problem
        assert not Path(folder, "no").exists()


def test_a_script_that_never_trains_is_no_run(project):
    (project / "train.py").write_text("print('hello')\n")
    text, problems = check_script(project / "train.py", [])
    assert text == ""
    assert problems == [f"{project / 'train.py'} doesn't train: it never called Trainer.train()"]


def test_mistakes_of_settings_and_hooks_are_told_all_at_once(project):
    (project / "own.py").write_text(
        "from pa_core import TrainerCallback\n"
        "class Own(TrainerCallback):\n    def on_epoch_ned(self, trainer): ...\n"
    )
    settings(project, '[tool.pa-core]\nplugins = ["own.py"]\n')
    (problem,) = check_settings(project)
    assert "unknown hook 'on_epoch_ned'" in problem
    settings(
        project,
        """
        [tool.pa-core]
        plugins = ["checkpiont", "early_stopping"]
        [tool.pa-core.early_stopping]
        patience = 3
        """,
    )
    unknown, key = sorted(check_settings(project), reverse=True)
    assert {"checkpiont" in one for one in (unknown, key)} == {True, False}
    (done,) = start_warm("pa_core", "check")
    assert done.returncode == 1
    assert done.stdout.count("error  ") == 2
    (done,) = start_warm("pa_core", "check", "nonesuch.py")
    assert done.returncode == 2


class Counts(TrainerCallback):
    def __init__(self):
        self.micro_batches = self.updates = self.eval_batches = self.epochs = 0

    def on_train_step_end(self, trainer):
        self.micro_batches += 1

    def on_optimizer_step_end(self, trainer):
        self.updates += 1

    def on_eval_step_end(self, trainer):
        self.eval_batches += 1

    def on_train_epoch_end(self, trainer):
        self.epochs += 1


def test_a_fast_dev_run_does_everything_once_at_the_length_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = Counts()
    best, saves = SaveBestModelCallback(), SaveTrainingStateCallback(save_every_n_epochs=1)
    trainer = make_trainer(FastDevRunCallback(), counts, saves, best)
    trainer.train(tiny_data(160), 7, eval_dataset=tiny_data(44), gradient_accumulation_steps=3)
    assert vars(counts) == {"micro_batches": 3, "updates": 1, "eval_batches": 1, "epochs": 1}
    assert trainer.num_updates == 7 * 7
    trainer.save_checkpoint("mine/last.pt")
    trainer.load_checkpoint("mine/last.pt")
    trainer.save_training_state("state")
    assert trainer.load_training_state("state")["current_epoch"] == 2
    assert list(tmp_path.iterdir()) == []
    folder = Path(best.save_path).parent.parent
    assert Path(best.save_path).is_file()
    assert (saves.save_dir / "final").is_dir()
    trainer.evaluate(tiny_data(44))
    assert counts.eval_batches == 2
    plugin = trainer.plugins.by_name["fast_dev_run"]
    trainer.plugins.unregister("fast_dev_run")
    plugin._removal()
    assert not folder.exists()


def test_what_an_earlier_run_has_saved_is_loaded_from_where_it_is(tmp_path):
    file = tmp_path / "before.pt"
    make_trainer().save_checkpoint(file, {"mark": 7})
    content = file.read_bytes()
    trainer = make_trainer(FastDevRunCallback())
    assert trainer.load_checkpoint(file)["mark"] == 7
    trainer.save_checkpoint(file)
    assert file.read_bytes() == content
    assert "mark" not in trainer.load_checkpoint(file)


def test_the_environment_turns_it_on_and_a_value_that_makes_no_sense_is_told(monkeypatch):
    monkeypatch.setenv("PA_CORE_FAST_DEV_RUN", "1")
    counts = Counts()
    make_trainer(counts).train(tiny_data(44), 3)
    assert (counts.updates, counts.epochs) == (1, 1)
    monkeypatch.setenv("PA_CORE_FAST_DEV_RUN", "yes")
    with pytest.raises(ValueError, match="PA_CORE_FAST_DEV_RUN must be 1 or 0, not 'yes'"):
        make_trainer()
    monkeypatch.setenv("PA_CORE_FAST_DEV_RUN", "0")
    assert make_trainer().plugins.by_name == {}
