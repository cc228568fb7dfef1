"""timm's models by name."""

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from pa_core import Trainer
from pa_core.errors import PluginNotFoundError
from pa_models import TimmPlugin
from pa_models.timm_models import TimmModels


def test_a_timm_model_is_built_and_trained_by_its_name():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 160, 160, generator=generator)
    trainer = Trainer(
        "timm/test_vit",
        nn.CrossEntropyLoss(),
        lambda parameters: SGD(parameters, lr=0.01),
        callbacks=(),
        plugins=[TimmPlugin],
    )
    assert type(trainer.model).__module__.startswith("timm.models")
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train(TensorDataset(images, torch.arange(4)), num_epochs=1, per_device_batch_size=4)
    after = list(trainer.get_model().parameters())
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_the_registry_accepts_the_arguments_of_create_model():
    models = TimmModels()
    assert models["timm/resnet18"](num_classes=5)(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert "timm/test_vit" in list(models)
    assert len(models) == len(list(models)) > 500
    with pytest.raises(KeyError):
        models["timm/resnet19"]


def test_an_unknown_model_raises_with_the_closest_name():
    with pytest.raises(PluginNotFoundError, match="timm/resnet1"):
        Trainer("timm/resnet19", None, SGD, callbacks=(), plugins=[TimmPlugin])
