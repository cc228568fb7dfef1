"""Freezing by layer group and by name, and discriminative learning rates."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from pa_core import Trainer
from pa_models import ModelFreezer, discriminative_param_groups, freeze_batch_norm
from tests.helpers import tiny_data


class Net(nn.Module):
    """Four layer groups, with a nested one that has a batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8)
        inner = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
        self.block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), inner)
        self.act = nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.act(self.block(self.stem(x))))


class Transformer(nn.Module):
    """Owns parameters, and has a module with both parameters and children."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if not value.requires_grad}


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules() if name}


def test_by_default_all_layer_groups_but_the_last_are_frozen_except_batch_norms():
    model = Net()
    freezer = ModelFreezer(model)
    freezer.freeze()
    assert frozen_names(model) == {"stem.weight", "stem.bias", "block.0.weight", "block.0.bias"}
    assert [group.is_frozen for group in freezer.get_layer_groups()] == [True, True, False, False]
    assert [group.layer_group_idx for group in freezer.get_layer_groups()] == [
        *((0, -4), (1, -3), (2, -2), (3, -1))
    ]
    assert freezer.get_layer_groups()[1].module is model.block
    assert freezer.get_trainable_parameters() == [
        *model.block[1].parameters(),
        *model.head.parameters(),
    ]


def test_layers_are_flat_and_in_order():
    model = Net()
    layers = ModelFreezer(model).get_layers()
    block = [model.block[0], model.block[1], *model.block[2].children()]
    assert [layer.module for layer in layers] == [model.stem, *block, model.act, model.head]
    assert [layer.layer_group_idx[0] for layer in layers] == [0, 1, 1, 1, 1, 2, 3]
    assert not any(layer.is_frozen for layer in layers)


def test_unfreezing_returns_the_changed_parameters_for_add_param_group():
    model = Net()
    freezer = ModelFreezer(model)
    freezer.freeze()
    optimizer = torch.optim.SGD(freezer.get_trainable_parameters(), lr=0.1)
    groups = freezer.unfreeze()
    assert {index: len(group["params"]) for index, group in groups.items()} == {0: 2, 1: 2}
    for group in groups.values():
        optimizer.add_param_group(group)
    assert not frozen_names(model)
    assert freezer.unfreeze() == {}


@pytest.mark.parametrize(("first", "last"), [(1, 2), (2, 1), (-3, -2), (-2, 1)])
def test_indices_are_inclusive_in_any_order_and_count_from_either_end(first, last):
    model = Net()
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze(first, last)
    assert frozen_names(model) == {name for name, _ in model.named_parameters() if "block" in name}
    assert list(freezer.unfreeze(first, last)) == [1]


@pytest.mark.parametrize("index", [4, -5])
def test_an_index_out_of_range_raises_with_the_groups(index):
    message = f"Layer group {index} doesn't exist: Net has 4, -4 to 3: stem, bl"
    with pytest.raises(IndexError, match=message):
        ModelFreezer(Net()).freeze(0, index)


def test_freezing_in_evaluation_mode_freezes_and_unfreezing_without_it_unfreezes():  # A5
    model = Net()
    freezer = ModelFreezer(model)
    freezer.freeze(set_modules_as_eval=True)
    assert {"stem.weight", "block.0.weight"} <= frozen_names(model)
    assert not model.stem.training
    freezer.unfreeze(set_modules_as_training=False)
    assert not frozen_names(model)
    assert not model.stem.training
    assert model.train().stem.training


def test_parameters_of_modules_with_children_and_of_the_model_itself_are_frozen():  # A6
    model = Transformer()
    freezer = ModelFreezer(model)
    freezer.freeze()
    assert {"token", "attention.in_proj_weight", "attention.out_proj.weight"} <= frozen_names(model)
    assert "head.weight" not in frozen_names(model)
    assert freezer.get_layers()[0].module is model
    assert len(freezer.unfreeze()[0]["params"]) == len(list(model.parameters())) - 2
    assert not frozen_names(model)


def test_a_freezer_first_unfreezes_everything(capsys):
    model = Net()
    first = ModelFreezer(model, freeze_batch_norms=True, verbose=False)
    first.freeze(set_modules_as_eval=True)
    freeze_batch_norm(model)
    second = ModelFreezer(model)
    assert frozen_names(model) == {"block.1.weight", "block.1.bias"}  # by `freeze_batch_norm`
    assert "Unfroze 128 frozen parameters of Net. 155 of 171 parameters" in capsys.readouterr().out
    assert not model.stem.training
    assert model.train().stem.training
    second.freeze(to_index=0)
    assert [group.is_frozen for group in second.get_layer_groups()] == [True, True, False, False]
    assert frozen_names(model) == {"stem.weight", "stem.bias", "block.1.weight", "block.1.bias"}
    ModelFreezer(model, keep_frozen=True)
    assert "stem.weight" in frozen_names(model)


def test_integer_parameters_stay_as_they_are():
    model = Net()
    model.head.scale = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    ModelFreezer(model).unfreeze()
    assert frozen_names(model) == {"head.scale"}


def test_what_is_frozen_and_unfrozen_is_printed(capsys):
    freezer = ModelFreezer(Net(), freeze_batch_norms=True)
    freezer.freeze()
    freezer.unfreeze_named("block.0")
    assert capsys.readouterr().out.splitlines() == [
        "Froze stem, block, act of Net. 27 of 171 parameters are trained, in head",
        "Unfroze block.0 of Net. 99 of 171 parameters are trained, in block, head",
    ]


def test_a_freezer_that_leaves_nothing_to_train_warns():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.warns(UserWarning, match="nothing is left to train: 1 has no parameters"):
        ModelFreezer(model).freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelFreezer(model).freeze(to_index=-1)  # everything was asked for
        ModelFreezer(model).freeze_named("*")


def test_evaluation_mode_is_kept_in_train_until_unfrozen():
    model = Net()
    freezer = ModelFreezer(model)
    freezer.freeze(set_modules_as_eval=True)
    model.train()
    trains = {name for name, mode in modes(model).items() if mode}
    assert trains == {"block.1", "head"}  # batch norms aren't frozen here
    freezer.unfreeze()
    assert all(modes(model).values())
    assert not any(modes(model.eval()).values())


def test_frozen_groups_stay_in_evaluation_mode_in_a_run():
    model = Net()
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze(set_modules_as_eval=True)
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5),
        callbacks=(),
        plugins=(),
    )
    trainer.train(tiny_data(), 2, eval_dataset=tiny_data(), per_device_batch_size=16)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"head.weight", "head.bias"}


def test_persistent_modes_are_copied_and_pickled():
    model = Net()
    ModelFreezer(model).freeze(set_modules_as_eval=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        other.train()
        assert not other.stem.training
        ModelFreezer(other).unfreeze()
        assert other.stem.training
        assert not model.stem.training


def test_batch_norms_are_frozen_with_their_statistics():
    model = Net()
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze()
    model.train()(torch.randn(16, 6))
    assert torch.equal(model.block[1].running_mean, torch.zeros(8))
    assert {"block.1.weight", "block.1.bias"} <= frozen_names(model)
    assert modes(model)["block.2.1"]  # dropout stays in training mode
    freezer.unfreeze()
    model(torch.randn(16, 6))
    assert not torch.equal(model.block[1].running_mean, torch.zeros(8))


def test_layers_and_parameters_are_selected_by_name():
    model = Net()
    freezer = ModelFreezer(model)
    freezer.freeze_named("block.[02]", "*.bias", set_modules_as_eval=True)
    frozen = {"stem.bias", "block.0.weight", "block.0.bias", "head.bias"}
    assert frozen_names(model) == frozen
    model.train()
    eval_modules = [name for name, mode in modes(model).items() if not mode]
    assert eval_modules == ["block.0", "block.2", "block.2.0", "block.2.1"]
    assert freezer.get_layers()[0].is_frozen is False  # its weight is trained
    assert len(freezer.unfreeze_named("block", "head.bias")) == 3
    assert frozen_names(model) == {"stem.bias"}
    assert all(modes(model).values())


def test_batch_norms_by_name_need_a_freezer_that_freezes_them():
    model = Net()
    with pytest.raises(ValueError, match=r"'block.1' selects batch norms only.*freeze_batch_norms"):
        ModelFreezer(model).freeze_named("block.1")
    ModelFreezer(model, freeze_batch_norms=True).freeze_named("block.1")
    assert frozen_names(model) == {"block.1.weight", "block.1.bias"}


def test_an_unknown_name_raises_with_the_closest_name():
    with pytest.raises(ValueError, match=r"no module or parameter 'blok'. Did you mean 'block'\?"):
        ModelFreezer(Net()).freeze_named("head", "blok")


def test_a_model_without_modules_has_no_layer_groups():
    with pytest.raises(ValueError, match="Linear has no child modules"):
        ModelFreezer(nn.Linear(2, 2))


def test_a_compiled_model_is_seen_through():
    model = Net()
    ModelFreezer(torch.compile(model, backend="eager")).freeze()
    assert "stem.weight" in frozen_names(model)


def test_a_timm_vision_transformer_is_frozen_wholly():
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=2, num_heads=2, num_classes=3
    )
    ModelFreezer(model).freeze()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"head.weight", "head.bias"}


# -- Learning rates by layer group ----------------------------------------------------------------


def test_learning_rates_are_spread_geometrically_over_the_groups_that_have_parameters():
    model = Net()
    groups = discriminative_param_groups(model, lr=(1e-4, 1e-2))
    assert [group["name"] for group in groups] == ["stem", "block", "head"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-3, 1e-2])
    held = [id(p) for group in torch.optim.AdamW(groups).param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_one_rate_means_all_and_a_slice_without_start_the_last():
    def rates(lr):
        return [group["lr"] for group in discriminative_param_groups(Net(), lr)]

    assert rates(0.5) == [0.5, 0.5, 0.5]
    assert rates(slice(1.0)) == [0.1, 0.1, 1.0]


@pytest.mark.parametrize("lr", [0.0, -1, slice(None), (0.0, 1.0), (1e-3, "x"), slice(-1, 1)])
def test_a_rate_that_is_none_is_told(lr):
    with pytest.raises(ValueError, match="must be a positive number"):
        discriminative_param_groups(Net(), lr)


def test_tied_parameters_and_those_of_the_model_are_in_one_group_each():
    class Tied(Transformer):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 2)
            self.out.weight = self.head.weight

    model = Tied()
    groups = discriminative_param_groups(model, lr=(1e-4, 1e-2))
    assert [len(group["params"]) for group in groups] == [5, 1, 2]
    torch.optim.SGD(groups)
    assert any(parameter is model.token for parameter in groups[0]["params"])


class LanguageModel(nn.Module):
    """A body with embeddings, and a head that is tied to them."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(4, 4), nn.Linear(4, 4)
        self.body = nn.ModuleDict({"tokens": nn.Embedding(5, 4), "layers": nn.Sequential(*layers)})
        self.head = nn.Linear(4, 5)
        self.head.weight = self.body["tokens"].weight  # type: ignore[assignment]


def test_a_tied_parameter_belongs_to_the_last_layer_group(capsys):
    model = LanguageModel()
    layers = {f"body.layers.{n}.{kind}" for n in "01" for kind in ("weight", "bias")}
    freezer = ModelFreezer(model)
    freezer.freeze()
    assert frozen_names(model) == layers
    assert [group.is_frozen for group in freezer.get_layer_groups()] == [True, False]
    assert capsys.readouterr().out == (
        "Froze body of LanguageModel. 25 of 65 parameters are trained, in head (head.weight is "
        "tied to body.tokens.weight)\n"
    )
    freezer.freeze(-1, -1)
    assert list(freezer.unfreeze(0, 0)) == [0]
    assert frozen_names(model) == {"body.tokens.weight", "head.bias"}
    assert freezer.unfreeze(-1, -1)[1]["params"] == list(model.head.parameters())
    freezer.freeze_named("head")
    with pytest.warns(
        UserWarning, match=r"'body' holds them all \(head.weight is tied to body.tok"
    ):
        freezer.freeze_named("body")
    shared = nn.Sequential(model.body["tokens"], model.body["layers"], model.head)
    freezer = ModelFreezer(shared)
    for change in (freezer.freeze, freezer.unfreeze):
        with pytest.warns(UserWarning, match=r"those of 0 are tied and belong to 2 \(2.weight is"):
            change(0, 0)
    assert not frozen_names(shared)


@pytest.mark.parametrize("is_inside", [False, True])
def test_layer_groups_of_a_tied_model_have_learning_rates_of_their_own(is_inside, capsys):
    inner = LanguageModel()
    model = nn.ModuleDict({"model": inner, "drop": nn.Dropout()}) if is_inside else inner
    body, head = discriminative_param_groups(model, lr=slice(1e-4, 1e-2))
    assert (body["lr"], head["lr"]) == pytest.approx((1e-4, 1e-2))
    assert list(map(id, body["params"])) == list(map(id, inner.body["layers"].parameters()))
    assert list(map(id, head["params"])) == list(map(id, inner.head.parameters()))
    prefix = "model." if is_inside else ""
    tie = f" ({prefix}head.weight is tied to {prefix}body.tokens.weight)"
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"  {prefix}body  40 parameters  lr 0.0001",
        f"  {prefix}head  25 parameters  lr 0.01{tie}",
    ]


def test_a_single_layer_group_for_several_rates_warns():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.warns(
        UserWarning, match=r"single layer group with parameters, 0, so all of them h"
    ):
        (group,) = discriminative_param_groups(model, lr=slice(1e-4, 1e-2))
    assert group["lr"] == 1e-2


def test_a_trainer_trains_each_group_at_its_learning_rate():
    model = Net()
    optimizer = torch.optim.SGD(discriminative_param_groups(model, lr=(1e-9, 0.1)))
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
    trainer.train(tiny_data(), 1)
    assert torch.allclose(model.stem.weight, before["stem.weight"], atol=1e-7)
    assert not torch.allclose(model.head.weight, before["head.weight"], atol=1e-3)
