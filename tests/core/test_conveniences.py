"""overfit, model_summary, a trainer's repr, and what the doctor looks at on the machine."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pa_core import TrainerCallback
from pa_core.builtins.model_summary import summary
from pa_core.callbacks import ModelSummaryCallback, OverfitCallback
from pa_core.cli.doctor import check_machine, check_settings
from pa_core.settings.table import Settings
from tests.builtin_trainer import make_trainer
from tests.helpers import tiny_data, tiny_model


class SeesBatches(TrainerCallback):
    def __init__(self):
        self.epochs = []

    def on_train_epoch_start(self, trainer):
        self.epochs.append([])

    def on_train_step_start(self, trainer, batch):
        self.epochs[-1].append(batch[0].clone())


def test_overfit_trains_on_the_same_first_batches_in_each_epoch():
    seen, data = SeesBatches(), tiny_data(44)
    trainer = make_trainer(OverfitCallback(2), seen)
    trainer.train(data, 3, train_dataloader_kwargs={"shuffle": True}, eval_dataset=data)
    assert trainer.updates == trainer.num_updates == 3 * 2
    expected = torch.stack([data[index][0] for index in range(16)]).split(8)
    for epoch in seen.epochs:
        assert len(epoch) == 2
        assert all(map(torch.equal, epoch, expected))


def test_overfit_takes_a_loader_in_its_order_and_refuses_one_that_shuffles():
    seen, data = SeesBatches(), tiny_data(44)
    make_trainer(OverfitCallback(1), seen).train(DataLoader(data, batch_size=4), 2)
    first = torch.stack([data[index][0] for index in range(4)])
    assert [[torch.equal(batch, first) for batch in epoch] for epoch in seen.epochs] == [[True]] * 2
    with pytest.raises(ValueError, match="the given loader shuffles"):
        make_trainer(OverfitCallback()).train(DataLoader(data, shuffle=True), 1)


def test_the_summary_counts_trainable_and_frozen_parameters_and_bytes(capsys):
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3))
    model[0][0].requires_grad_(False)
    model[1].weight.data = model[1].weight.data.double()
    make_trainer(ModelSummaryCallback(depth=1), model=model)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert rows[0] == ["module", "class", "parameters", "trainable", "frozen", "size"]
    assert [row[:-2] for row in rows[1:]] == [
        ["whole", "model", "Sequential", "99", "43", "56"],
        ["0", "Sequential", "72", "16", "56"],
        ["1", "Linear", "27", "27", "0"],
    ]
    whole, first, last = summary(model, 1)
    assert (whole["parameters"], whole["trainable"]) == (99, 43)
    assert (first["module"], first["class"], first["parameters"]) == ("0", "Sequential", 72)
    assert last["bytes"] == 24 * 8 + 3 * 4
    assert whole["bytes"] == first["bytes"] + last["bytes"]
    assert first["bytes"] == 72 * 4 + 2 * 8 * 4 + 8  # with the norm's statistics and its counter
    assert [row["module"] for row in summary(model, 2)] == ["", "0", "0.0", "0.1", "1"]
    assert [row["module"] for row in summary(model, 0)] == [""]


def test_weights_that_are_shared_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert summary(model, 0)[0]["parameters"] == 16 + 4 + 4


def test_a_trainer_says_what_it_is():
    trainer = make_trainer(OverfitCallback(), model=tiny_model())
    text = "model=Sequential of 83 parameters, optimizer=SGD, plugins=[overfit], device=cpu"
    assert repr(trainer) == f"Trainer({text}, processes=1)"


def test_the_doctor_says_where_runs_are_and_what_accelerate_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(tmp_path / "accelerate.yaml"))
    texts = [finding.what for finding in check_machine()]
    assert texts[0].startswith("Training runs on ")
    expected = f"accelerate launch uses its defaults; there is no {tmp_path}"
    assert texts[1].startswith(expected)
    (tmp_path / "accelerate.yaml").write_text("")
    assert [one.what for one in check_machine()][1].endswith(str(tmp_path / "accelerate.yaml"))


def test_the_doctor_finds_a_folder_that_states_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")

    def findings(save_dir):
        tables = {"checkpoint": {"save_dir": str(save_dir)}}
        return list(check_settings(lambda: Settings(None, ("checkpoint",), (), tables)))

    right = findings(tmp_path / "new" / "states")[-1]
    assert (right.is_right, right.what) == (
        True,
        f"checkpoint can write to {tmp_path / 'new' / 'states'}",
    )
    wrong = findings(tmp_path / "file" / "states")[-1]
    assert not wrong.is_right
    assert f"{tmp_path / 'file'} is not a folder" in wrong.what
    assert "Set save_dir of checkpoint" in wrong.remedy
