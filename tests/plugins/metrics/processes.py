"""Train and evaluate with metrics on one or more processes, and write the values to a file.

``python processes.py FILE [STATES]``; also resumes from the training states in STATES.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import ClasswiseWrapper, Running

from pa_core import Trainer, TrainerCallback
from pa_core.errors import SettingsError
from pa_metrics import MetricsPlugin

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
RANK = os.environ.get("RANK", "0")
METRICS = {
    "accuracy": {"average": "micro"},
    "auroc": {},  # keeps all predictions
    "confusion_matrix": {},
    "each": {
        "class": "ClasswiseWrapper",
        "metric": {"class": "f1_score", "average": "none"},
    },
    "precision": {"average": "macro"},  # in a compute group with recall
    "recall": {"average": "macro"},
}


class Saves(TrainerCallback):
    """Saves within the second epoch and after its last batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_step_end(self, trainer, *, step, **kwargs):
        if step in (1, 3) and trainer.run_history.current_epoch == 2:
            trainer.control.save(self.folder / f"after_{step}")


def data(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 6, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (samples,), generator=generator))


def trainer_with(plugin: MetricsPlugin, callbacks=(), model: nn.Module | None = None) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(6, 3) if model is None else model
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=callbacks,
        plugins=[plugin],
        accelerator={"cpu": True},
    )


def new_plugin() -> MetricsPlugin:
    return MetricsPlugin(metrics=METRICS, on=["train", "eval"], task="multiclass", num_classes=3)


def history_of(trainer: Trainer) -> dict[str, list[object]]:
    history = trainer.run_history
    return {
        name: list(history.get_metric_values(name)) for name in sorted(history.get_metric_names())
    }


def trained(callbacks=(), **options) -> Trainer:
    """A trainer after training; the last batch of an epoch has one sample instead of eight."""
    trainer = trainer_with(new_plugin(), callbacks)
    batch_size = 8 // PROCESSES
    trainer.train(data(25), 2, eval_dataset=data(11), per_device_batch_size=batch_size, **options)
    return trainer


def evaluated() -> dict[str, object]:
    """Results of evaluations with fewer samples than processes, and with more."""
    found: dict[str, object] = {}
    for samples in (1, 2, 3, 13):
        trainer = trainer_with(new_plugin())  # new metrics, never updated
        found[f"of {samples}"] = trainer.evaluate(data(samples), per_device_batch_size=2)
        found[f"{samples} once more"] = trainer.evaluate(data(1), per_device_batch_size=2)
    trainer = trainer_with(new_plugin())
    found["of a loader"] = trainer.evaluate(DataLoader(data(3), batch_size=3))
    return found


def in_unlike_groups() -> dict[str, float]:
    """Metrics that agree on the first batch of one process and differ on another's."""
    target = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    is_first = torch.tensor([True, False, True, True, False, True, False, True])
    best = torch.where(is_first, target, (target + 1) % 3)
    scores = nn.functional.one_hot(target, 3) + 2.0 * nn.functional.one_hot(best, 3)
    model = nn.Linear(3, 3, bias=False)
    nn.init.eye_(model.weight)
    plugin = MetricsPlugin(
        metrics={"top1": {"class": "accuracy"}, "top2": {"class": "accuracy", "top_k": 2}},
        task="multiclass",
        num_classes=3,
        average="macro",
    )
    trainer = trainer_with(plugin, model=model)
    return trainer.evaluate(TensorDataset(scores, target), per_device_batch_size=1)


def refusal_of_windows() -> str | None:
    running = ClasswiseWrapper(Running(MulticlassAccuracy(3, average=None), window=3))
    try:
        trainer_with(MetricsPlugin.of({"running": running})).evaluate(data(4))
    except SettingsError as error:
        return str(error)
    return None


if __name__ == "__main__":
    file = Path(sys.argv[1])
    found = {
        "trained": history_of(trained([Saves(file.with_suffix(".states"))])),
        "evaluated": evaluated(),
        "in unlike groups": in_unlike_groups(),
        "refused": refusal_of_windows(),
    }
    if len(sys.argv) > 2:
        warnings.simplefilter("ignore")  # about another number of processes
        for step in (1, 3):
            state = Path(sys.argv[2], f"after_{step}")
            found[f"resumed after {step}"] = history_of(trained(resume_from=state))
    file.with_suffix(f".{RANK}.json").write_text(json.dumps(found))
