"""Compiled models: checkpoints fit the uncompiled model; freezing and averages work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pa_core import Trainer
from pa_core.plugin import clean_state_dict, named_parameters
from pa_models import (
    EmaPlugin,
    GradualUnfreezingCallback,
    ModelFreezer,
    convert_sync_batch_norm,
    find_batch_size,
    fine_tune,
    freeze_batch_norm,
    layer_depths,
)
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of

CALLS: list[int] = []


def counting_backend(graph, inputs):
    """torch's backend "eager", which records that it was used."""
    CALLS.append(1)
    return graph.forward


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend=counting_backend)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture(autouse=True)
def fresh_compiler():
    CALLS.clear()
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trainer_of(model: nn.Module, *callbacks, **arguments) -> Trainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Trainer(
        model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, plugins=(), **arguments
    )


def clean_weights(trainer: Trainer) -> dict[str, Any]:
    return clean_state_dict(trainer.get_model(keep_torch_compile=False))


def train(trainer: Trainer, epochs: int = 1, **arguments) -> Trainer:
    data = tiny_data()
    trainer.train(data, epochs, eval_dataset=data, per_device_batch_size=22, **arguments)
    return trainer


def with_compiled_part(model: nn.Module) -> nn.Module:
    model.body = compiled(model.body)
    return model


WAYS = {
    "wrapped": compiled,
    "a part": with_compiled_part,
    "in place": lambda model: model.compile(backend=counting_backend) or model,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
def test_files_and_states_of_a_compiled_model_fit_the_uncompiled_one_and_back(way, tmp_path: Path):
    trainer = train(trainer_of(way(Net())))
    assert CALLS
    trainer.save_checkpoint(tmp_path / "model.pt")
    trainer.save_training_state(tmp_path / "state")
    weights = clean_weights(trainer)
    plain = Net()
    plain.load_state_dict(torch.load(tmp_path / "model.pt")["model_state_dict"])
    assert_identical(plain.state_dict(), weights)

    plain_trainer = train(trainer_of(Net()))
    plain_trainer.save_checkpoint(tmp_path / "plain.pt")
    plain_trainer.save_training_state(tmp_path / "plain")
    for path, load in (("plain.pt", "load_checkpoint"), ("plain", "load_training_state")):
        other = trainer_of(way(Net()))
        getattr(other, load)(tmp_path / path)
        loaded = clean_weights(other)
        assert_identical(loaded, weights_of(plain_trainer))


@pytest.mark.filterwarnings("ignore:.*model was 'OptimizedModule'")
def test_an_uncompiled_run_resumes_a_compiled_one(tmp_path: Path):
    trainer = train(trainer_of(compiled(Net()), EmaPlugin()))
    trainer.save_training_state(tmp_path / "state")
    resumed = train(trainer_of(Net(), EmaPlugin()), 2, resume_from=tmp_path / "state")
    whole = train(trainer_of(Net(), EmaPlugin()), 2)
    for name, value in weights_of(whole).items():
        assert torch.allclose(value, weights_of(resumed)[name], atol=1e-5)


@every_way
def test_the_average_of_a_compiled_model_equals_that_of_the_uncompiled_one(way, tmp_path: Path):
    plain, ema = EmaPlugin(0.9), EmaPlugin(0.9)
    train(trainer_of(Net(), plain))
    trainer = train(trainer_of(way(Net()), ema))
    assert trainer.run_history.get_latest_metric("ema_eval_loss_epoch") > 0
    names = ema.ema_model.module.state_dict().keys()
    assert names == Net().state_dict().keys()
    assert not any("_orig_mod" in name for name in ema.state_dict()["ema"])
    for name in names:
        expected = plain.ema_model.module.state_dict()[name]
        assert torch.allclose(ema.ema_model.module.state_dict()[name], expected, atol=1e-5)


@every_way
def test_freezing_and_unfreezing_work_for_a_compiled_model_in_a_run(way):
    results = []
    for make in (way, lambda model: model):
        model = make(Net())
        freeze_batch_norm(model)
        callback = GradualUnfreezingCallback({"0 epochs": "head", "1 epochs": "*"})
        trainer = train(trainer_of(model, callback), 2)
        results.append(clean_weights(trainer))
    assert CALLS
    for name, value in results[1].items():
        assert torch.allclose(results[0][name], value, atol=1e-5)
    assert torch.equal(results[0]["body.1.running_mean"], torch.zeros(8))


def test_fine_tuning_and_finding_a_batch_size_work_with_a_compiled_model():
    trainer = trainer_of(compiled(Net()))
    before = clean_weights(trainer)
    before = {name: value.clone() for name, value in before.items()}
    assert find_batch_size(trainer, tiny_data(), max_batch_size=16).batch_size == 16
    assert_identical(clean_weights(trainer), before)
    fine_tune(trainer, tiny_data(), 1)
    assert ModelFreezer(trainer.model).get_trainable_parameters()


def test_layers_and_patterns_have_the_names_of_the_plain_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    expected = layer_depths(model)
    model[1] = compiled(model[1])
    model[0] = compiled(model[0])
    assert layer_depths(model) == expected
    ModelFreezer(model).freeze_named("1.0")
    frozen = [name for name, p in named_parameters(model) if not p.requires_grad]
    assert frozen == ["1.0.weight", "1.0.bias"]
    norm = nn.Sequential(compiled(nn.BatchNorm1d(2)))
    with pytest.raises(ValueError, match="A compiled BatchNorm1d can't be replaced"):
        convert_sync_batch_norm(norm)


@pytest.mark.slow
def test_the_default_backend_gives_the_uncompiled_numbers(tmp_path: Path, monkeypatch):
    """The default backend, which needs a C++ compiler."""
    # inductor sets this variable; monkeypatch restores it
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")
    try:
        torch.compile(nn.Linear(2, 2))(torch.ones(1, 2))
    except Exception as error:  # noqa: BLE001 - anything that this machine may lack
        pytest.skip(f"torch.compile doesn't work here: {error!r:.80}")
    first, second = EmaPlugin(0.9), EmaPlugin(0.9)
    model: Any = torch.compile(tiny_model())
    trainer = train(trainer_of(model, first))
    train(trainer_of(tiny_model(), second))
    trainer.save_checkpoint(tmp_path / "model.pt")
    tiny_model().load_state_dict(torch.load(tmp_path / "model.pt")["model_state_dict"])
    for name, value in second.ema_model.module.state_dict().items():
        assert torch.allclose(first.ema_model.module.state_dict()[name], value, atol=1e-4)
