"""Plugins that watch metrics, in one job from settings, against the same job by hand.

Two evaluation datasets × the model and its moving average × loss and accuracy are recorded within
epochs and at their ends. A scheduler, the best model and early stopping each watch one of them.
"""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback

SETTINGS = """
[tool.pa-core]
plugins = [
    "early_stopping", "save_best_model", "schedulers", "metrics", "ema", "step_evaluation",
]
[tool.pa-core.ema]
decay = 0.8
[tool.pa-core.metrics]
task = "multiclass"
num_classes = 3
on = ["train", "eval"]
[tool.pa-core.schedulers]
name = "reduce_lr_on_plateau"
watch_metric = "day_accuracy"
greater_is_better = true
factor = 0.5
patience = 1
[tool.pa-core.step_evaluation]
eval_every_n_steps = 4
[tool.pa-core.save_best_model]
watch_metric = "ema_night_accuracy"
greater_is_better = true
model = "ema"
save_path = "best.pt"
[tool.pa-core.early_stopping]
watch_metric = "night_intermediate_eval_loss"
early_stopping_patience = 3
early_stopping_threshold = 0.01
"""
BATCH, EPOCHS, LR = 6, 30, 0.5


def datasets():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(80, 4, generator=generator)
    y = (x @ torch.randn(4, 3, generator=generator)).argmax(1)
    y[::5] = (y[::5] + 1) % 3  # wrong labels, so that the losses rise again
    train, day, night = (
        TensorDataset(x[s], y[s]) for s in (slice(30), slice(30, 57), slice(57, 80))
    )
    return train, {"day": day, "night": night}


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


class ByHand:
    """The job in plain PyTorch: what is recorded, and the three decisions."""

    def __init__(self) -> None:
        (self.data, self.sets), self.net = datasets(), network()
        self.ema, self.lr, self.updates = copy.deepcopy(self.net), LR, 0
        self.recorded = defaultdict(list)
        self.best, self.best_weights = -1.0, None
        self.lowest, self.waited = float("inf"), 0
        self.highest, self.bad = -float("inf"), 0
        self.rates = []

    def run(self) -> None:
        for _ in range(EPOCHS):
            for start in range(0, len(self.data), BATCH):
                self.update(*self.data[start : start + BATCH])
                if self.updates % 4 == 0 and self.evaluate("intermediate_eval_loss"):
                    return
            self.evaluate("eval_loss_epoch")

    def update(self, x, y) -> None:
        self.rates.append(self.lr)
        parameters = list(self.net.parameters())
        gradients = torch.autograd.grad(functional.cross_entropy(self.net(x), y), parameters)
        self.updates += 1
        decay = min(0.8, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= self.lr * gradient
            for mean, parameter in zip(self.ema.parameters(), parameters, strict=True):
                mean += (1 - decay) * (parameter - mean)

    @torch.no_grad()
    def evaluate(self, loss_name: str) -> bool:
        """Record an evaluation, and return whether the run stops."""
        for model, net in (("", self.net), ("ema_", self.ema)):
            for name, data in self.sets.items():
                x, y = data.tensors
                logits = net(x)
                self.recorded[f"{model}{name}_{loss_name}"].append(
                    functional.cross_entropy(logits, y).item()
                )
                accuracy = (logits.argmax(1) == y).float().mean().item()
                self.recorded[f"{model}{name}_accuracy"].append(accuracy)
        of_best, of_rate = (self.recorded[n][-1] for n in ("ema_night_accuracy", "day_accuracy"))
        if of_best > self.best + 1e-6:
            self.best, self.best_weights = of_best, copy.deepcopy(self.ema.state_dict())
        if of_rate > self.highest * 1.0001 or self.highest < 0:  # torch's relative threshold
            self.highest, self.bad = of_rate, 0
        else:
            self.bad += 1
            if self.bad > 1:
                self.lr, self.bad = self.lr * 0.5, 0
        if loss_name.startswith("intermediate"):
            loss = self.recorded[f"night_{loss_name}"][-1]
            if loss < self.lowest - 0.01:
                self.lowest, self.waited = loss, 0
            else:
                self.waited += 1
        return self.waited >= 3


class Watch(TrainerCallback):
    """Keeps the learning rate of each update, and saves a training state on request."""

    def __init__(self, save_at: int | None = None) -> None:
        self.rates, self.save_at = {}, save_at

    def on_optimizer_step_start(self, trainer):
        self.rates[trainer.updates] = trainer.optimizer.param_groups[0]["lr"]

    def on_optimizer_step_end(self, trainer):
        if trainer.updates == self.save_at:
            trainer.control.save("state", everywhere=True)


def run(watch: Watch, **arguments) -> Trainer:
    net, (data, sets) = network(), datasets()
    trainer = Trainer(
        net,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(net.parameters(), lr=LR),
        callbacks=[watch],
        settings="settings.toml",
        accelerator={"cpu": True},
    )
    trainer.train(
        data,
        EPOCHS,
        eval_dataset=sets,
        per_device_batch_size=BATCH // trainer.num_processes,
        train_dataloader_kwargs={"shuffle": False},
        **arguments,
    )
    return trainer


def check(trainer: Trainer, watch: Watch, right: ByHand) -> None:
    history = trainer.run_history
    for name, values in right.recorded.items():
        assert history.get_metric_values(name) == pytest.approx(values, rel=1e-5), name
    assert trainer.updates == right.updates
    assert [watch.rates[update] for update in sorted(watch.rates)] == right.rates
    assert "night_intermediate_eval_loss has not improved" in trainer.stop_reason
    model = trainer.get_model()
    for name, weight in right.best_weights.items():  # the best average is loaded at the end
        torch.testing.assert_close(model.state_dict()[name].cpu(), weight, rtol=1e-5, atol=1e-6)
    result = trainer.evaluate()
    assert result["night_accuracy"] == pytest.approx(right.best)


def test_all_watchers_in_one_job_decide_as_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.toml").write_text(SETTINGS)
    right = ByHand()
    right.run()
    assert 20 < right.updates < 140  # every decision is made
    assert len(set(right.rates)) > 2
    whole, resumed = Watch(save_at=8), Watch()
    check(run(whole), whole, right)
    trainer = run(resumed, resume_from="state")  # saved at an update with an evaluation
    resumed.rates = whole.rates | resumed.rates
    check(trainer, resumed, right)
