"""Layer-wise learning-rate decay: equal to timm's for its models, and for any other model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pa_models import layer_depths, param_groups_layer_decay


def rates(groups, model) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_the_depths_of_timms_models(name):
    import timm
    from timm.optim import param_groups_layer_decay as of_timm

    model = timm.create_model(name)
    ours = rates(param_groups_layer_decay(model, 1.0, 0.05, 0.5), model)
    assert ours.keys() == dict(model.named_parameters()).keys()
    if name == "test_vit":
        groups = of_timm(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
        theirs = rates([group | {"lr": group["lr_scale"]} for group in groups], model)
        for each in (ours, theirs):  # timm assigns the last norm to the last block
            del each["norm.weight"], each["norm.bias"]
        assert ours == theirs
    assert max(rate for rate, _ in ours.values()) == 1.0
    head = [name for name in ours if name.startswith(("head", "fc"))]
    assert {ours[name][0] for name in head} == {1.0}


def test_a_transformers_model_decays_from_its_head_to_its_embeddings():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=3, vocab_size=20, **sizes))
    found = rates(param_groups_layer_decay(model, 1.0, 0.1, 0.5), model)
    assert found["bert.embeddings.word_embeddings.weight"] == (0.5**4, 0.1)
    assert found["bert.encoder.layer.2.output.dense.weight"] == (0.5, 0.1)
    assert found["bert.encoder.layer.0.output.LayerNorm.weight"] == (0.5**3, 0.0)
    assert found["classifier.weight"] == (1.0, 0.1)


def test_an_nn_sequential_has_a_layer_for_each_module_with_parameters(capsys):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 1))
    assert set(layer_depths(model).values()) == {0, 1, 2}
    groups = param_groups_layer_decay(model, 0.1, layer_decay=0.1)
    assert capsys.readouterr().out.splitlines()[:2] == [
        "Layers of Sequential:",
        "  layer 0   9 parameters  lr 0.001",
    ]
    torch.optim.AdamW(groups).step()
    assert [group["name"] for group in groups][:2] == ["layer_0_no_decay", "layer_0_decay"]
    assert groups[0]["lr"] == pytest.approx(0.001)
    assert groups[-1]["lr"] == 0.1


def test_frozen_parameters_are_excluded_and_invalid_arguments_rejected():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    assert len(rates(param_groups_layer_decay(model, 0.1), model)) == 2
    with pytest.raises(ValueError, match="above 0 and at most 1, got 2"):
        param_groups_layer_decay(model, 0.1, layer_decay=2)
    with pytest.raises(ValueError, match="no trainable parameters"):
        param_groups_layer_decay(model.requires_grad_(False), 0.1)
