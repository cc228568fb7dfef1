"""Permanently frozen batch norms, and batch norms synchronised over processes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pa_core import Trainer
from pa_models import (
    ConvertSyncBatchNormCallback,
    ModelFreezer,
    convert_sync_batch_norm,
    freeze_batch_norm,
    unfreeze_batch_norm,
)
from tests.helpers import NoisyModel, tiny_data


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(self.body(x))


def test_a_frozen_batch_norm_changes_neither_statistics_nor_weights_in_a_run():
    model = TwoNorms()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    assert freeze_batch_norm(model, "body") == ["body.1"]
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
    trainer.train(tiny_data(), 2, eval_dataset=tiny_data())
    after = model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("body.1.")}


def test_frozen_batch_norms_stay_frozen_in_train_copies_and_freezers():
    model = TwoNorms()
    assert freeze_batch_norm(model) == ["body.1", "head.0"]
    ModelFreezer(model, freeze_batch_norms=True).unfreeze()
    for each in (model, copy.deepcopy(model)):
        each.train()
        assert not each.body[1].training
        assert not each.body[1].weight.requires_grad
        assert each.head[1].training


def test_unfreezing_returns_only_frozen_batch_norms():
    model = TwoNorms()
    freeze_batch_norm(model, "body")
    model.train()
    assert unfreeze_batch_norm(model) == ["body.1"]
    assert model.body[1].training
    assert model.body[1].weight.requires_grad
    model.eval()
    assert not model.body[1].training


def test_an_unknown_name_raises():
    with pytest.raises(ValueError, match=r"no module or parameter 'bdy'. Did you mean 'body'"):
        freeze_batch_norm(TwoNorms(), "bdy")


# -- Conversion: computing the statistics needs accelerators --------------------------------------


def test_all_but_frozen_batch_norms_are_converted_and_keep_their_parameters():
    model = TwoNorms()
    weight = model.head[0].weight
    freeze_batch_norm(model, "body")
    ModelFreezer(model, freeze_batch_norms=True).freeze_named("head", set_modules_as_eval=True)
    assert convert_sync_batch_norm(model) is model
    assert type(model.body[1]) is nn.BatchNorm1d
    assert type(model.head[0]) is nn.SyncBatchNorm
    assert model.head[0].weight is weight
    assert not model.train().head[0].training  # kept in evaluation mode by the freezer
    converted = model.head[0]
    convert_sync_batch_norm(model)
    assert model.head[0] is converted


def test_a_model_that_is_a_batch_norm_is_converted():
    assert isinstance(convert_sync_batch_norm(nn.BatchNorm2d(3)), nn.SyncBatchNorm)


def test_an_unknown_batch_norm_is_not_converted_and_warns():
    class NormAndActivation(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(NormAndActivation(3))
    with pytest.warns(UserWarning, match="NormAndActivation isn't converted"):
        convert_sync_batch_norm(model)
    assert type(model[0]) is NormAndActivation


def test_timms_batch_norms_keep_their_activation():
    import timm

    model = timm.create_model("efficientnet_b0", num_classes=2).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    convert_sync_batch_norm(model)
    norms = [m for m in model.modules() if "BatchNorm" in type(m).__name__]
    assert norms
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert torch.equal(model.eval()(x), expected)


def test_one_process_keeps_its_batch_norms():
    model = NoisyModel()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[ConvertSyncBatchNormCallback],
        plugins=(),
    )
    trainer.train(tiny_data(), 1)
    assert type(model.layers[1]) is nn.BatchNorm1d


def test_a_callback_that_is_added_too_late_raises():
    def fake(model):  # what the callback reads from a trainer on two GPUs
        return SimpleNamespace(
            num_processes=2,
            device=torch.device("cuda"),
            model=model,
            get_model=lambda keep_torch_compile: model,
        )

    trainer = fake(TwoNorms())
    callback = ConvertSyncBatchNormCallback()
    with pytest.raises(RuntimeError, match="when the trainer is built"):
        callback.on_training_run_start(trainer)
    callback.on_init_end(trainer)
    callback.on_training_run_start(trainer)
    assert type(trainer.model.body[1]) is nn.SyncBatchNorm
