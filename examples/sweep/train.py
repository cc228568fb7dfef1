"""Search for settings with Optuna, which prunes trials that fall behind.

    pip install optuna
    python train.py               # scikit-learn's 1,797 digits, in seconds
    python train.py --trials 50

Each trial is a Trainer with its own settings; no file is read or changed.
"""

import argparse

import optuna
import torch
from sklearn import datasets
from torch import nn, optim
from torch.utils.data import TensorDataset, random_split

from pa_core import Trainer, TrainerCallback


class Pruning(TrainerCallback):
    """Reports each evaluation loss to a trial, and stops the run if the trial is pruned."""

    watched_metrics = ("eval_loss_epoch",)

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_watched_metric(self, trainer: Trainer, metric: str, value: float) -> None:
        if metric in self.watched_metrics:
            self.trial.report(value, step=trainer.run_history.current_epoch)
            if self.trial.should_prune():
                trainer.control.stop("pruned")


def objective(trial: optuna.Trial) -> float:
    """Train with the settings that a trial suggests; returns the loss on held-out digits."""
    learning_rate = trial.suggest_float("learning_rate", 1e-4, 0.1, log=True)
    settings = {
        "plugins": ["schedulers"],
        "schedulers": {"name": "cosine", "warmup": trial.suggest_int("warmup", 0, 100, step=10)},
        "trainer": {"seed": 7},
        "train": {
            "num_epochs": 8,
            "per_device_batch_size": trial.suggest_int("batch_size", 16, 64),
        },
    }
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train_set, held_out = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = optim.AdamW(model.parameters(), lr=learning_rate)
    callbacks = [Pruning(trial)]
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, settings=settings)
    trainer.train(train_set, eval_dataset=held_out)
    if trainer.stop_reason == "pruned":
        raise optuna.TrialPruned
    return trainer.run_history.get_latest_metric("eval_loss_epoch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=12)
    arguments = parser.parse_args()
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
    )
    study.optimize(objective, n_trials=arguments.trials)
    pruned = len(study.get_trials(states=[optuna.trial.TrialState.PRUNED]))
    print(f"{pruned} of {arguments.trials} trials were pruned")
    print(f"Lowest loss: {study.best_value:.4f}, with {study.best_params}")


if __name__ == "__main__":
    main()
