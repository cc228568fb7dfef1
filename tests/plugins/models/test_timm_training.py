"""timm's optimizers, mixing and soft targets in real runs of small timm models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from pa_core.errors import SettingsError
from pa_models import TimmPlugin, create_transforms
from tests.helpers import assert_identical, weights_of

CLASSES = 4


class Net(nn.Module):
    """A small classifier with num_classes, like timm's models."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES)
        )

    def forward(self, x):
        return self.layers(x)


def images(samples: int = 22) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.rand(samples, 3, 8, 8, generator=generator), torch.arange(samples) % CLASSES
    )


def trainer_with(plugin, *callbacks, model=None, loss=None) -> Trainer:
    model = model or Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, loss, optimizer, callbacks=callbacks, plugins=[plugin])


class Watch(TrainerCallback):
    def on_training_run_start(self, trainer):
        self.outputs, self.batches, self.epochs = [], [], []

    def on_train_step_end(self, trainer, batch, batch_output):
        self.outputs.append(batch_output)
        self.batches.append([part.clone() for part in batch])
        self.epochs.append(trainer.run_history.current_epoch)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("mix", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_training_uses_mixed_images_and_evaluation_plain_ones(mode, mix):
    watch = Watch()
    trainer = trainer_with(TimmPlugin(**mix, mix_mode=mode, label_smoothing=0.1), watch)
    data = images(21)  # batches of 8, and one of 5: an odd number
    trainer.train(data, 1, eval_dataset=data, per_device_batch_size=8)
    seen = torch.cat([inputs for inputs, _ in watch.batches])
    assert seen.sum() == pytest.approx(float(data.tensors[0].sum()), rel=1e-5)  # not in place
    for output in watch.outputs:
        soft = output["soft_targets"]
        assert torch.allclose(soft.sum(1), torch.ones(len(soft)))
        expected = functional.cross_entropy(output["model_outputs"], soft)
        assert torch.allclose(output["loss"], expected)
    assert any((output["soft_targets"] > 0.03).sum(1).max() > 1 for output in watch.outputs)
    x, y = data.tensors
    plain = functional.cross_entropy(trainer.model.eval()(x), y).item()
    assert trainer.run_history.get_latest_metric("eval_loss_epoch") == pytest.approx(
        plain, abs=1e-5
    )


def test_mixing_ends_at_mixup_off_epoch_and_targets_stay_smoothed():
    watch = Watch()
    plugin = TimmPlugin(mixup=1.0, mixup_off_epoch=2, label_smoothing=0.2)
    trainer_with(plugin, watch).train(images(), 2, per_device_batch_size=8)
    for epoch, output in zip(watch.epochs, watch.outputs, strict=True):
        largest = output["soft_targets"].max(1).values
        assert torch.allclose(largest, torch.full_like(largest, 0.85)) == (epoch == 2)


def test_label_smoothing_equals_that_of_torch_and_bce_treats_classes_independently():
    watch = Watch()
    trainer = trainer_with(TimmPlugin(label_smoothing=0.1), watch)
    trainer.train(images(21), 1, per_device_batch_size=8)
    unsmoothed = 0.0
    for (_, classes), output in zip(watch.batches, watch.outputs, strict=True):
        expected = functional.cross_entropy(output["model_outputs"], classes, label_smoothing=0.1)
        assert torch.allclose(output["loss"], expected)
        plain = functional.cross_entropy(output["model_outputs"], classes, reduction="sum")
        unsmoothed += plain.item() / 21
    latest = trainer.run_history.get_latest_metric
    assert latest("train_unsmoothed_loss") == pytest.approx(unsmoothed, rel=1e-5)
    both = 0.9 * latest("train_unsmoothed_loss") + 0.1 * latest("train_uniform_loss")
    assert both == pytest.approx(latest("train_loss_epoch"), rel=1e-6)
    trainer_with(TimmPlugin(bce=True), watch).train(images(), 1)
    for (_, classes), output in zip(watch.batches, watch.outputs, strict=True):
        expected = functional.binary_cross_entropy_with_logits(
            output["model_outputs"], functional.one_hot(classes, CLASSES).float()
        )
        assert torch.allclose(output["loss"], expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_resumed_within_an_epoch_mixes_the_same(tmp_path, accumulation):
    def run(folder, **options):
        save = SaveTrainingStateCallback(folder, save_every_n_steps=1, save_at_end=False)
        trainer = trainer_with(TimmPlugin(mixup=0.4, cutmix=1.0, mix_mode="elem"), save)
        trainer.train(
            images(),
            2,
            per_device_batch_size=4,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        return weights_of(trainer)

    whole = run(tmp_path / "whole")
    for update in (2, 4):
        resumed = run(tmp_path, resume_from=tmp_path / "whole" / f"update_{update:08d}")
        assert_identical(resumed, whole)


def test_evaluation_uses_the_loss_function_of_the_trainer():
    trainer = trainer_with(
        TimmPlugin(mixup=0.4), loss=lambda outputs, target: outputs.sum() * 0 + 7
    )
    trainer.train(images(), 1, eval_dataset=images())
    assert trainer.run_history.get_latest_metric("eval_loss_epoch") == 7
    assert trainer.run_history.get_latest_metric("train_loss_epoch") != 7


def test_settings_alone_define_model_optimizer_and_loss(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        """
        [tool.pa-core]
        plugins = ["timm"]

        [tool.pa-core.timm]
        model_options = { num_classes = 4 }
        optimizer = "adamw"
        lr = 0.001
        weight_decay = 0.05
        layer_decay = 0.5
        mixup = 0.2
        label_smoothing = 0.1
        """
    )
    trainer = Trainer("timm/test_vit", None, None, callbacks=(), settings=file)
    assert trainer.model.num_classes == 4
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert max(rates.values()) == 0.001
    assert rates["layer_0_decay"] == pytest.approx(0.001 * 0.5 ** (len(set(rates.values())) - 1))
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(4, 3, 160, 160, generator=generator), torch.arange(4))
    trainer.train(data, 1, eval_dataset=data, per_device_batch_size=2)
    assert trainer.run_history.get_latest_metric("eval_loss_epoch") > 0


def test_without_layer_decay_biases_and_norms_have_no_weight_decay():
    plugin = TimmPlugin(
        optimizer="sgd", lr=0.1, weight_decay=0.5, optimizer_options={"nesterov": False}
    )
    trainer = Trainer(Net(), None, None, callbacks=(), plugins=[plugin])
    decays = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in trainer.model.named_parameters():
        assert decays[id(parameter)] == (0.5 if parameter.ndim > 1 else 0), name


def test_transforms_follow_the_data_configuration_of_the_model():
    import timm
    from PIL import Image

    model = timm.create_model("test_resnet")
    train, evaluation = create_transforms(model, re_prob=0.5)
    assert any(type(step).__name__ == "RandomErasing" for step in train.transforms)
    picture = Image.new("RGB", (200, 180))
    size = model.pretrained_cfg["input_size"][-2:]
    assert train(picture).shape[1:] == evaluation(picture).shape[1:] == torch.Size(size)
    with pytest.raises(ValueError, match="Net has no data configuration"):
        create_transforms(Net())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamww"}, "no optimizer 'adamww'. Did you mean 'adamw'"),
        ({"optimizer": "adamw", "layer_decay": 0.5}, "layer_decay: requires lr"),
    ],
)
def test_invalid_optimizer_settings_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(Net(), None, None, callbacks=(), plugins=[TimmPlugin(**options)])


def test_inconsistent_settings_are_rejected(tmp_path):
    for wrong, message in [
        ({"lr": 0.1}, "lr: requires optimizer"),
        ({"mixup_off_epoch": 3}, "requires mixup or cutmix"),
    ]:
        with pytest.raises(ValueError, match=message):
            TimmPlugin(**wrong)
    file = tmp_path / "pyproject.toml"
    file.write_text('[tool.pa-core]\nplugins = ["timm"]\n[tool.pa-core.timm]\nmixupp = 0.2\n')
    with pytest.raises(SettingsError, match="'mixupp'.*'mixup'"):
        Trainer(Net(), None, None, settings=file)


def test_classes_out_of_range_raise_on_the_first_batch():
    data = TensorDataset(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 7, 2]))
    with pytest.raises(ValueError, match="have class 7, but the model has 4 classes: set num_cl"):
        trainer_with(TimmPlugin(mixup=0.2)).train(data, 1)
    unknown = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(ValueError, match="need the number of classes"):
        trainer_with(TimmPlugin(mixup=0.2), model=unknown).train(images(), 1)
