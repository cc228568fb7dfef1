"""Whatever part of a model is compiled, states and files are those of the plain model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin, compile_regions
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from pa_core import Trainer
from pa_core.callbacks import SaveBestModelCallback
from pa_core.checkpoint.fingerprint import describe, describe_parts
from pa_core.engine.wrappers import (
    clean_name,
    clean_state_dict,
    load_clean_state_dict,
    named_modules,
    named_parameters,
    unwrap,
)
from tests.helpers import assert_identical, tiny_data

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by dynamo


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)


def with_part(model: Net) -> nn.Module:
    model.stem = compiled(model.stem)
    return model


def nested(model: Net) -> nn.Module:
    model.stem[0] = compiled(model.stem[0])
    model.stem = compiled(model.stem)
    model.blocks[1] = compiled(model.blocks[1])
    return model


def in_place(model: Net) -> nn.Module:
    model.stem.compile(backend="eager")
    return model


WAYS: dict[str, Callable[[Net], nn.Module]] = {
    "a part": with_part,
    "nested parts": nested,
    "a part in place": in_place,
    "the whole": compiled,
    "the whole with parts": lambda model: compiled(nested(model)),
    "regions": lambda model: compile_regions(model, backend="eager"),
}


def plain(model: Net) -> nn.Module:
    return model


def trainer_of(way: Callable[[Net], nn.Module], *callbacks: Any, **arguments: Any) -> Trainer:
    model = way(Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    loss = nn.CrossEntropyLoss()
    return Trainer(model, loss, optimizer, callbacks=callbacks, plugins=(), **arguments)


def train(trainer: Trainer, epochs: int, **arguments: Any) -> Trainer:
    trainer.train(
        tiny_data(),
        epochs,
        eval_dataset=tiny_data(11),
        per_device_batch_size=11,
        strict=True,
        **arguments,
    )
    return trainer


def weights_of(trainer: Trainer) -> dict[str, Any]:
    model = trainer.get_model(keep_torch_compile=False)
    return {name: value.clone() for name, value in clean_state_dict(model).items()}


@pytest.fixture(scope="module")
def whole_run() -> dict[str, Any]:
    return weights_of(train(trainer_of(plain), 3))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_run_resumes_whichever_parts_are_compiled(way, whole_run, tmp_path: Path):
    first = train(trainer_of(way), 2)
    first.save_training_state(tmp_path / "state")
    state = json.loads((tmp_path / "state" / "state.json").read_text())
    assert state["parameters"] == [[name for name, _ in Net().named_parameters()]]

    resumed = train(trainer_of(plain), 3, resume_from=tmp_path / "state")
    assert_identical(weights_of(resumed), whole_run)
    plain_first = train(trainer_of(plain), 2)
    plain_first.save_training_state(tmp_path / "plain")
    plain_first.save_checkpoint(tmp_path / "plain.pt")
    resumed = train(trainer_of(way), 3, resume_from=tmp_path / "plain")
    assert_identical(weights_of(resumed), whole_run)
    resumed.load_checkpoint(tmp_path / "plain.pt")
    assert_identical(weights_of(resumed), weights_of(plain_first))


@pytest.mark.parametrize("regional", [False, True])
def test_files_of_a_model_that_accelerate_compiles_are_those_of_the_plain_one(
    regional, whole_run, tmp_path: Path
):
    best = SaveBestModelCallback(str(tmp_path / "best.pt"), load_saved_checkpoint=False)
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=regional)
    way = plain if regional else with_part  # accelerate can't compile regions of a compiled part
    trainer = train(trainer_of(way, best, accelerator={"dynamo_plugin": plugin}), 3)
    trainer.save_checkpoint(tmp_path / "model.pt")
    for name in ("best.pt", "model.pt"):
        saved = torch.load(tmp_path / name, weights_only=True)["model_state_dict"]
        assert list(saved) == list(Net().state_dict())
        assert saved._metadata.keys() == Net().state_dict()._metadata.keys()
    assert_identical(dict(saved), whole_run)


def test_names_are_those_without_wrappers():
    model = nn.Sequential(nn.DataParallel(compiled(nn.Linear(2, 2))), nn.Linear(2, 2))
    model.add_module("kept", checkpoint_wrapper(compiled(nn.Linear(2, 1))))
    expected = ["0.weight", "0.bias", "1.weight", "1.bias", "kept.weight", "kept.bias"]
    assert list(clean_state_dict(model)) == expected
    assert [name for name, _ in named_parameters(model)] == expected
    assert [name for name, _ in named_modules(model)] == ["", "0", "1", "kept"]
    load_clean_state_dict(model, dict(clean_state_dict(model)))
    assert (
        clean_name(nn.ModuleDict({"module": nn.Linear(1, 1)}), "module.weight") == "module.weight"
    )


def test_a_file_with_the_names_of_wrappers_is_loaded():
    model, saved = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    weights = {f"module._orig_mod.0.{name}": value for name, value in saved.state_dict().items()}
    load_clean_state_dict(model, weights)
    assert_identical(model[0].state_dict(), saved.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        load_clean_state_dict(model, {"module.0.weight": saved.weight})


def test_two_entries_that_would_have_one_name_are_refused():
    model = nn.Module()
    model.part = compiled(nn.Linear(2, 2))
    model.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({"part.weight": torch.ones(1)})
    )
    with pytest.raises(ValueError, match=r"part._orig_mod.weight of Module would have the name"):
        clean_state_dict(model)


def test_unwrapping_leaves_the_wrapped_model_as_it_is():
    model = nn.Linear(2, 2)
    distributed = nn.DataParallel(model)
    outer = compiled(distributed)
    assert unwrap(outer, keep_torch_compile=True) is model
    assert outer._orig_mod is distributed
    inner = compiled(model)
    assert unwrap(nn.DataParallel(inner), keep_torch_compile=True) is inner


def test_a_compiled_loss_is_described_like_the_plain_one():
    weights = torch.tensor([1.0, 2.0])
    module = nn.CrossEntropyLoss(weights, label_smoothing=0.1)
    function = partial(nn.functional.mse_loss, reduction="sum")
    nested = nn.Sequential(nn.L1Loss(reduction="sum"))
    for loss in (module, function, nested, nn.functional.mse_loss, lambda x, y: 0.5 * (x - y)):
        assert describe(compiled(loss)) == describe(loss)
        assert describe_parts(compiled(loss)) == describe_parts(loss)
    assert describe_parts(nn.Sequential(compiled(nested[0]))) == describe_parts(nested)
