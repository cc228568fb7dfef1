"""Tensors of subclasses, such as quantised weights or low-bit optimizer states, are saved."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import TensorDataset

from pa_core import Trainer
from pa_core.callbacks import SaveBestModelCallback, SaveTrainingStateCallback
from pa_core.checkpoint.codec import decode, decode_weights, encode, encode_weights
from pa_core.checkpoint.fingerprint import describe
from pa_core.checkpoint.safetensors_io import read_tensors, tensor_bytes
from pa_core.errors import TrainingStateError
from pa_models import EmaPlugin
from tests.helpers import assert_identical

ATEN = torch.ops.aten


class Packed(Tensor):
    """A float tensor as 8-bit codes and a scale; it knows few operations."""

    codes: Tensor
    scale: Tensor
    context: Any = ("packed", torch.float32, float("inf"))

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=torch.float32, device=codes.device
        )

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, tensor: Tensor) -> Any:
        scale = tensor.detach().abs().amax().clamp(min=1e-12) / 127
        return cls((tensor.detach() / scale).round().to(torch.int8), scale)

    def whole(self) -> Tensor:
        return self.codes.float() * self.scale

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], self.context

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Any:
        assert context == cls.context
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (ATEN.detach.default, ATEN.alias.default):
            return cls(args[0].codes, args[0].scale)
        if func in (ATEN.clone.default, ATEN._to_copy.default):
            return cls(args[0].codes.clone(), args[0].scale.clone())
        if func is ATEN.copy_.default:
            target, source = args[:2]
            target.codes.copy_(source.codes)
            target.scale.copy_(source.scale)
            return target
        raise NotImplementedError(f"Packed: {func}")


class WithEnum(Packed):
    context = Enum("Mode", "FAST")(1)


class WithTensor(Packed):
    context = (torch.ones(2),)


class Labelled(Tensor):
    """A subclass with its own storage."""


class Momentum8bit(torch.optim.Optimizer):
    kind: type[Packed] = Packed

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = p.grad + (0.9 * state["momentum"].whole() if "momentum" in state else 0)
                p.sub_(momentum, alpha=group["lr"])
                state["momentum"] = self.kind.of(momentum)


class Quantised(nn.Module):
    """A model with frozen quantised weights of one shape, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = torch.randn(4, 4), torch.randn(4, 4)
        self.first = nn.Parameter(Packed.of(first), requires_grad=False)
        self.second = nn.Parameter(Packed.of(second), requires_grad=False)
        self.tied = self.first
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for weight in (self.first, self.second, self.tied):
            x = (x @ weight.whole()).tanh()
        return self.head(x)


def data() -> TensorDataset:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True))


def train(*callbacks: Any, model: nn.Module | None = None, **arguments: Any) -> Trainer:
    model = Quantised() if model is None else model
    trainer = Trainer(
        model, nn.MSELoss(), Momentum8bit(model.parameters()), callbacks=callbacks, plugins=()
    )
    trainer.train(data(), 2, eval_dataset=data(), per_device_batch_size=8, **arguments)
    return trainer


def whole(trainer: Trainer) -> dict[str, Tensor]:
    """All weights and the optimizer's state, as plain tensors."""
    found = {}
    values = [*trainer.get_model().state_dict().items()]
    for number, state in enumerate(trainer.optimizer.state.values()):
        values += [(f"{number} {name}", value) for name, value in state.items()]
    for name, value in values:
        if isinstance(value, Packed):
            found |= {f"{name}.codes": value.codes.clone(), f"{name}.scale": value.scale.clone()}
        else:
            found[name] = value.clone()
    assert "0 momentum.codes" in found
    assert "first.codes" in found
    return found


def test_frozen_quantised_weights_are_copied_by_an_average():
    average = EmaPlugin(0.9)
    trainer = train(average)
    assert trainer.run_history.get_latest_metric("ema_eval_loss_epoch") > 0
    module = average.ema_model.module
    assert torch.equal(module.first.codes, trainer.get_model().first.codes)
    assert not torch.equal(module.head.weight, trainer.get_model().head.weight)


@pytest.mark.parametrize("in_background", [True, False])
def test_a_run_with_low_bit_tensors_resumes_bit_for_bit(in_background, tmp_path: Path):
    saves = SaveTrainingStateCallback(
        tmp_path / "states", save_every_n_steps=2, in_background=in_background
    )
    expected = whole(train(saves))
    other = SaveTrainingStateCallback(tmp_path / "other", save_every_n_steps=2)
    for name in ("update_00000002", "update_00000004"):
        resumed = train(other, resume_from=tmp_path / "states" / name)
        assert_identical(whole(resumed), expected)
    state = json.loads((tmp_path / "states" / "update_00000004" / "state.json").read_text())
    assert state["weights"]["aliases"] == {"tied": "first"}
    saved = state["optimizer"]["state"]["$items"][0][1]["momentum"]["$subclass"]
    assert saved["class"] == f"{__name__}.Packed"
    assert saved["size"] == [1, 4]


def test_a_checkpoint_file_holds_the_tensors_as_they_are(tmp_path: Path):
    best = SaveBestModelCallback(str(tmp_path / "best.pt"))
    trainer = train(best)
    trainer.save_checkpoint(tmp_path / "model.pt")
    expected = whole(trainer)
    model = Quantised()
    nn.init.zeros_(model.head.weight)
    other = Trainer(model, nn.MSELoss(), Momentum8bit(model.parameters()), callbacks=(), plugins=())
    other.load_checkpoint(tmp_path / "model.pt")
    assert_identical(whole(other), expected)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (WithEnum, "__tensor_flatten__ of .*WithEnum returns, context can't be saved: Mode"),
        (WithTensor, "__tensor_flatten__ of .*WithTensor returns a context that holds tensors"),
    ],
)
def test_what_cannot_be_saved_is_refused_after_the_first_update(kind, words, tmp_path, monkeypatch):
    monkeypatch.setattr(Momentum8bit, "kind", kind)
    saves = SaveTrainingStateCallback(tmp_path / "states", save_every_n_steps=3)
    with pytest.raises(TrainingStateError, match=f"optimizer.weight.momentum can't .*{words}"):
        train(saves, model=nn.Linear(4, 1))
    assert not list((tmp_path / "states").glob("*/manifest.json"))
    train(model=nn.Linear(4, 1))  # nothing is saved


def test_a_subclass_that_cannot_be_rebuilt_is_refused():
    with pytest.raises(TrainingStateError, match=r"x can't be saved: .*Labelled is a subclass"):
        encode(torch.ones(2).as_subclass(Labelled), {}, "x")


def round_trip(value: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    described = json.loads(json.dumps(encode(value, tensors, "x")))
    return decode(described, read_tensors(tensor_bytes(tensors)))


def test_nested_subclasses_are_rebuilt():
    inner = TwoTensor(torch.arange(6.0).view(2, 3), torch.ones(2, 3))
    outer = TwoTensor(inner, TwoTensor(torch.zeros(2, 3), torch.full((2, 3), 5.0)))
    found = round_trip({"a": [outer]})["a"][0]
    assert type(found) is type(found.a) is TwoTensor
    assert torch.equal(found.a.a, inner.a)
    assert torch.equal(found.b.b, outer.b.b)
    assert round_trip(torch.bfloat16) is torch.bfloat16


def test_different_wrappers_of_one_shape_are_not_taken_for_one():
    a, b = Packed.of(torch.ones(2, 2)), Packed.of(torch.eye(2))
    tensors, rest = encode_weights({"a": a, "b": b, "same": a.detach()})
    assert not tensors
    assert rest["aliases"] == {"same": "a"}
    found = decode_weights(tensors, rest)
    assert found["same"] is found["a"]
    assert torch.equal(found["b"].codes, b.codes)


@pytest.mark.parametrize("name", ["os.system", "nowhere.Packed", "torch.Tensor", "builtins.eval"])
def test_only_loaded_subclasses_are_rebuilt(name):
    tensors: dict[str, Tensor] = {}
    described: Any = encode(Packed.of(torch.ones(2)), tensors, "x")
    described["$subclass"]["class"] = name
    with pytest.raises(TrainingStateError, match=f"the class {name}, which isn't loaded"):
        decode(described, tensors)
    with pytest.raises(TrainingStateError, match="PyTorch has no dtype 'load'"):
        decode({"$dtype": "load"}, {})


def test_a_loss_with_such_a_weight_is_described():
    loss, other = nn.Module(), nn.Module()
    loss.register_buffer("weight", Packed.of(torch.ones(3)))
    other.register_buffer("weight", Packed.of(torch.arange(3.0)))
    assert describe(loss)["weight"] != describe(other)["weight"]
