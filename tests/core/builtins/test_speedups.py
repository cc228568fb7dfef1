"""speedups: each option takes effect, and changes results by rounding at most."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pa_core import Trainer
from pa_core.callbacks import SpeedupsCallback
from tests.helpers import largest_difference, tiny_data, tiny_model, weights_of


def images(samples: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(samples, 3, 8, 8, generator=generator), torch.arange(samples) % 3
    )


def convolutions() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )


def trained(model: nn.Module, data, *callbacks, optimizer=torch.optim.AdamW, **options) -> Trainer:
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer(model.parameters(), lr=0.01),
        callbacks=callbacks,
        plugins=(),
    )
    trainer.train(data, 2, per_device_batch_size=8, **options)
    return trainer


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
def test_a_fused_optimizer_gives_the_same_weights(optimizer):
    fused = trained(
        tiny_model(), tiny_data(), SpeedupsCallback(fused_optimizer=True), optimizer=optimizer
    )
    plain = trained(tiny_model(), tiny_data(), optimizer=optimizer)
    assert all(group["fused"] for group in fused.optimizer.param_groups)
    assert largest_difference(weights_of(fused), weights_of(plain)) < 1e-6


def test_an_optimizer_without_a_fused_implementation_is_an_error():
    with pytest.raises(ValueError, match="RMSprop has no fused implementation"):
        trained(
            tiny_model(),
            tiny_data(),
            SpeedupsCallback(fused_optimizer=True),
            optimizer=torch.optim.RMSprop,
        )


def test_channels_last_changes_the_memory_format_and_not_the_results():
    trainer = trained(convolutions(), images(), SpeedupsCallback(channels_last=True))
    weight = trainer.get_model()[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    plain = weights_of(trained(convolutions(), images()))
    assert largest_difference(weights_of(trainer), plain) < 1e-5


def test_tf32_is_allowed_only_during_a_run():
    seen = []

    class KeepsPrecision(SpeedupsCallback):
        def on_train_step_end(self, trainer):
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))

    torch.backends.cudnn.allow_tf32 = False
    try:
        trained(tiny_model(), tiny_data(8), KeepsPrecision(tf32=True))
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = True
    assert set(seen) == {("high", True)}
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_compiled_model_trains_the_same_and_its_checkpoint_loads_uncompiled(tmp_path):
    compiled = SpeedupsCallback(compile=True, compile_options={"backend": "aot_eager"})
    trainer = trained(tiny_model(), tiny_data(), compiled, eval_dataset=tiny_data(8))
    assert isinstance(trainer.model, torch._dynamo.OptimizedModule)
    plain = trained(tiny_model(), tiny_data(), eval_dataset=tiny_data(8))
    weights = trainer.get_model(keep_torch_compile=False).state_dict()
    assert largest_difference(weights, weights_of(plain)) < 1e-6
    trainer.save_checkpoint(tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    tiny_model().load_state_dict(content["model_state_dict"])


def test_it_can_be_enabled_in_the_settings(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        '[tool.pa-core]\nplugins = ["speedups"]\n[tool.pa-core.speedups]\nfused_optimizer = true\n'
    )
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    Trainer(model, nn.CrossEntropyLoss(), optimizer, settings=file)
    assert optimizer.param_groups[0]["fused"]
