"""Evaluate and train with metrics on whatever processes there are, and write what came out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from pa_core import Trainer
from pa_metrics import MetricsPlugin

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def data(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 6, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (samples,), generator=generator))


def outcome() -> dict[str, object]:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    plugin = MetricsPlugin(
        metrics={
            "accuracy": {"average": "micro"},
            "auroc": {},  # keeps all predictions
            "confusion_matrix": {},
            "each": {
                "class": "ClasswiseWrapper",
                "metric": {"class": "f1_score", "average": "none"},
            },
            "recall": {"average": "macro"},
        },
        on=["train", "eval"],
        task="multiclass",
        num_classes=3,
    )
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=(),
        plugins=[plugin],
        accelerator={"cpu": True},
    )
    trainer.train(data(29), 2, eval_dataset=data(11), per_device_batch_size=8 // PROCESSES)
    history = trainer.run_history
    found: dict[str, object] = {
        name: history.get_metric_values(name) for name in sorted(history.get_metric_names())
    }
    for samples in (1, 2, 3, 13):  # fewer than there are processes, and more
        found[f"of {samples}"] = trainer.evaluate(data(samples), per_device_batch_size=2)
    return found


if __name__ == "__main__":
    found = outcome()
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[1]).write_text(json.dumps(found))
