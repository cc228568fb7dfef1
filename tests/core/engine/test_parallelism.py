"""Ways of parallel training in which processes share samples are refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import ParallelismConfig
from torch import nn

from pa_core import Trainer
from pa_core.engine.parallelism import check_supported, check_whole


def trainer_of(accelerator: Any, model: nn.Module | None = None) -> Trainer:
    return Trainer(
        model or nn.Linear(2, 1),
        nn.MSELoss(),
        torch.optim.SGD,
        callbacks=(),
        plugins=(),
        accelerator=accelerator,
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [("tp", "tensor parallelism"), ("cp", "context parallelism"), ("sp", "sequence parallelism")],
)
def test_sizes_above_1_are_refused_wherever_they_stand(name, words, monkeypatch):
    config = ParallelismConfig(**{f"{name}_size": 2})
    with pytest.raises(ValueError, match=f"ParallelismConfig: {name}_size is 2, but {words}"):
        trainer_of({"parallelism_config": config})
    ready = Accelerator(cpu=True)
    monkeypatch.setattr(ready.state, "parallelism_config", config, raising=False)
    with pytest.raises(ValueError, match=f"ParallelismConfig: {name}_size is 2, but {words}"):
        trainer_of(ready)
    monkeypatch.undo()
    variable = f"PARALLELISM_CONFIG_{name.upper()}_SIZE"
    monkeypatch.setenv(variable, "4")
    with pytest.raises(ValueError, match=f"{variable} is 4, but {words} is not supported"):
        trainer_of(None)
    monkeypatch.setenv(variable, "1")
    trainer_of(None)
    trainer_of({"parallelism_config": ParallelismConfig()})


def test_hybrid_sharding_is_refused(monkeypatch):
    config = ParallelismConfig(dp_replicate_size=2, dp_shard_size=4)
    with pytest.raises(ValueError, match="dp_shard_size is 4, but hybrid sharding"):
        trainer_of({"parallelism_config": config})
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")
    with pytest.raises(ValueError, match="REPLICATE_SIZE is 2 and PARALLELISM_CONFIG_DP_SHARD"):
        trainer_of(None)


def test_megatron_is_refused(monkeypatch):
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.MEGATRON_LM)
    with pytest.raises(ValueError, match="Megatron-LM is not supported"):
        check_supported(accelerator)
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(ValueError, match="Megatron-LM is not supported"):
        trainer_of(None)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"sequence_parallel_size": 2}, "DeepSpeed: sequence_parallel_size is 2"),
        ({"tensor_parallel": {"autotp_size": 4}}, "DeepSpeed: tensor_parallel.autotp_size is 4"),
        ({"tensor_parallel": {"tp": {"tp_size": 2}}}, "DeepSpeed: tensor_parallel.tp.tp_size is 2"),
    ],
)
def test_what_deepspeed_splits_otherwise_is_refused(config, words):
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        deepspeed_plugin=SimpleNamespace(deepspeed_config=config),
    )
    with pytest.raises(ValueError, match=words):
        check_supported(accelerator)
    config.clear()
    config["sequence_parallel_size"] = "auto"
    check_supported(accelerator)


def test_a_model_that_is_split_already_is_refused():
    model: Any = nn.Linear(2, 1)
    model.weight.device_mesh = SimpleNamespace(size=lambda: 2)
    with pytest.raises(ValueError, match="weight is a DTensor .* already split"):
        trainer_of(None, model)
    check_whole(model, "FSDP")
    model.weight.device_mesh = SimpleNamespace(size=lambda: 1)
    trainer_of(None, model)
