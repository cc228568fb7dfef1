"""Print the progress of a run, line by line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pa_core.plugin import ConfigurableCallback

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class PrintProgressCallback(ConfigurableCallback):
    """Prints a line when a run starts and ends, and when an epoch starts."""

    changes_training = False

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.print("\nTraining starts")

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        epoch, epochs = trainer.run_history.current_epoch, trainer.run_config.num_epochs
        before = epoch - int(trainer.progress.epochs) - 1  # epochs of earlier runs
        total = f" of {before + epochs}" if epochs is not None else ""
        trainer.print(f"\nEpoch {epoch}{total}: training")

    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        name = f" on {trainer.eval_name}" if trainer.eval_name is not None else ""
        if trainer.in_run:
            trainer.print(f"\nEpoch {trainer.run_history.current_epoch}: evaluation{name}")
        elif name:  # on_evaluation_run_start has printed the rest
            trainer.print(f"\nEvaluation{name}")

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        updates = "1 update" if trainer.updates == 1 else f"{trainer.updates} updates"
        trainer.print(f"\nTraining finished after {updates}")

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.print("\nEvaluation starts")

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.print("\nEvaluation finished")
