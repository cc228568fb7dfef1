"""A plugin that is a module."""

from pa_core import hookimpl


@hookimpl
def on_train_epoch_end(trainer):
    trainer.run_history.update_metric("learning_rate", trainer.optimizer.param_groups[0]["lr"])
