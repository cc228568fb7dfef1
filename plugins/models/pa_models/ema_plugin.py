"""The plugin ``ema``: a moving average of the weights, evaluated as well as the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from pa_core import hookimpl
from pa_core.callbacks import CallbackHandler, SaveBestModelCallback
from pa_core.plugin import CallbackSettings, ConfigurableCallback
from pa_models.ema import ModelEma
from pa_models.wrappers import unwrap_model

if TYPE_CHECKING:
    from torch import nn

    from pa_core import Trainer


class EmaSettings(CallbackSettings):
    """The table ``[tool.pa-core.ema]``."""

    decay: float = Field(
        0.9999, ge=0, lt=1, description="The factor of the old average per optimizer update."
    )
    warmup: bool = Field(
        True, description="Whether to limit the decay of update t to (1 + t) / (10 + t)."
    )
    update_every: int = Field(
        1,
        ge=1,
        description="Optimizer updates per update of the average; the decay stays per optimizer "
        "update.",
    )
    evaluate: bool = Field(True, description="Whether every evaluation also evaluates the average.")
    name: str = Field(
        "ema", min_length=1, description="Prefix of its metrics, as in ema_eval_loss_epoch."
    )


class EmaPlugin(ConfigurableCallback):
    """Keeps a moving average of the weights, and evaluates it as well as the model.

    The average is updated after each optimizer update, on the device. Each call of ``train`` starts
    a new one; a resumed run continues the saved one. It is kept after the run, so that
    ``trainer.evaluate(…)`` evaluates it, too.

    Args:
        decay: the factor of the old average per optimizer update.
        warmup: whether to limit the decay of the ``t``-th update to ``(1 + t) / (10 + t)``.
        update_every: optimizer updates per update of the average. The decay is applied once per
            optimizer update, so that the average spans as many updates as with 1.
        evaluate: whether every evaluation also evaluates the average.
        name: the name of the average: the prefix of its metrics, and the value for ``model`` in
            `SaveBestModelCallback`.

    Attributes:
        ema_model: the `ModelEma`, None before the first run; ``ema_model.module`` is the model with
            the averaged weights.
    """

    Settings = EmaSettings
    follows_weights: ClassVar[tuple[str, ...]] = ("ema",)

    def __init__(
        self,
        decay: float = 0.9999,
        warmup: bool = True,
        update_every: int = 1,
        evaluate: bool = True,
        name: str = "ema",
    ) -> None:
        self.decay, self.warmup, self.update_every = decay, warmup, update_every
        self.evaluate, self.name = evaluate, name
        self.ema_model: Any = None
        self._is_main = True
        self._takes_number = True
        self._loaded: Mapping[str, Any] | None = None

    def create_ema(self, model: nn.Module) -> Any:
        """Create the average of a model."""
        return ModelEma(model, decay=self.decay, warmup=self.warmup)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start from the current weights; a resumed run restores its average after this."""
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        if trainer.sharded_by is not None:
            raise ValueError(
                "A moving average needs the whole model on each process, but "
                f"{trainer.sharded_by} shards it: disable the average"
            )
        self._is_main = trainer.is_main_process
        self.ema_model = self.create_ema(trainer.get_model(keep_torch_compile=False))
        if isinstance(self.ema_model, ModelEma):
            self.ema_model._remember_numbers()
        parameters = inspect.signature(self.ema_model.update).parameters
        self._takes_number = "num_updates" in parameters

    @hookimpl(tryfirst=True)
    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Update the average with the new weights."""
        if trainer.updates % self.update_every:
            return
        model = unwrap_model(trainer.model)  # much faster than get_model
        if self._takes_number:
            self.ema_model.update(model, num_updates=self.update_every)
        else:  # your own class, as in pytorch-accelerated
            with torch.no_grad():
                for _ in range(self.update_every):
                    self.ema_model.update(model)

    @hookimpl
    def register_eval_models(self, trainer: Trainer) -> Mapping[str, nn.Module]:
        """The model with the averaged weights, under the plugin's name."""
        if not self.evaluate or self.ema_model is None:
            return {}
        # Running statistics differ between processes.
        module = self.ema_model.module
        weights = module.state_dict()
        trainer.broadcast(weights[name] for name, _ in module.named_buffers() if name in weights)
        return {self.name: module}

    # -- State: saved once, not once per process, since a model may be large ----------------------

    def state_dict(self) -> dict[str, Any]:
        """The average; empty on other processes than the main one."""
        if self.ema_model is None or not self._is_main:
            return {}
        return {"ema": dict(self.ema_model.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the state until `on_load_training_state`, when the model is restored, too."""
        self._loaded = state

    def on_load_training_state(self, trainer: Trainer, **kwargs: Any) -> None:
        """Restore the average, or start from the restored weights if the state has none."""
        state, self._loaded = self._loaded, None
        self._start(trainer)
        if state and "ema" in state and self._is_main:
            self.ema_model.load_state_dict(state["ema"])
        whole = self.ema_model.state_dict()
        trainer.broadcast(part for part in whole.values() if isinstance(part, torch.Tensor))
        rest = {name: part for name, part in whole.items() if not isinstance(part, torch.Tensor)}
        self.ema_model.load_state_dict(whole | trainer.gather_objects(rest)[0])


class ModelEmaCallback(EmaPlugin):
    """Keeps a moving average of the weights, evaluates it, and saves the best one.

    The prefix of its metrics is ``ema_model_``. `EmaPlugin` and `SaveBestModelCallback` together do
    the same as two separate plugins.

    Args:
        decay: the factor of the old average per optimizer update (not per epoch).
        evaluate_during_training: whether every evaluation also evaluates the average, and the best
            one is saved; otherwise the average is saved after each epoch.
        save_path: the file, written by ``trainer.save_checkpoint`` without the optimizer.
        watch_metric: the metric that determines the best average.
        greater_is_better: whether a greater value of it is better.
        model_ema: creates the average, such as a subclass of `ModelEma`; called with the model and
            ``decay``. The result needs ``update(model)``, which is called for each optimizer
            update, ``module``, ``state_dict`` and ``load_state_dict``.
        callbacks: called only in evaluations of the average. The trainer's callbacks are called
            there anyway, so one whose class the trainer already has is ignored.
        warmup: whether to limit the decay of the ``t``-th update to ``(1 + t) / (10 + t)``; for
            `ModelEma`.
        update_every: optimizer updates per update of the average. An ``update`` without the
            argument ``num_updates`` is then called that many times in a row.
    """

    def __init__(
        self,
        decay: float = 0.9999,
        evaluate_during_training: bool = True,
        save_path: str | Path = "ema_model.pt",
        watch_metric: str = "ema_model_eval_loss_epoch",
        greater_is_better: bool = False,
        model_ema: Callable[..., Any] = ModelEma,
        callbacks: Iterable[Any] = (),
        *,
        warmup: bool = True,
        update_every: int = 1,
    ) -> None:
        super().__init__(decay, warmup, update_every, evaluate_during_training, "ema_model")
        self.save_path = save_path
        self.evaluate_during_training = evaluate_during_training
        self.model_ema_cls = model_ema
        self.callback_handler = CallbackHandler(callbacks)
        self.saver = SaveBestModelCallback(
            save_path,
            watch_metric,
            greater_is_better,
            reset_on_train=False,
            save_optimizer=False,
            save_scheduler=False,
            load_saved_checkpoint=False,
            model=self.name,
        )

    # The attributes of the callback of pytorch-accelerated, which is a SaveBestModelCallback.

    @property
    def watch_metric(self) -> str:
        """The metric that determines the best average."""
        return self.saver.watch_metric

    @property
    def greater_is_better(self) -> bool:
        """Whether a greater value of it is better."""
        return self.saver.greater_is_better

    @property
    def best_metric(self) -> float | None:
        """The best value so far."""
        return self.saver.best_metric

    @property
    def best_metric_epoch(self) -> int | None:
        """The epoch of the best value."""
        return self.saver.best_metric_epoch

    def create_ema(self, model: nn.Module) -> Any:
        """Create the average of a model."""
        if self.model_ema_cls is ModelEma:
            return super().create_ema(model)
        return self.model_ema_cls(model, decay=self.decay)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start from the current weights."""
        if self.evaluate and trainer.eval_dataset is None:
            raise ValueError(
                "ModelEmaCallback saves the average that evaluates best, which needs an "
                "eval_dataset: pass one to train(), or use evaluate_during_training=False"
            )
        super().on_training_run_start(trainer)
        trainer_classes = {type(plugin) for plugin in trainer.plugins.by_name.values()}
        for name, callback in self.callback_handler.plugins.by_name.items():
            if type(callback) in trainer_classes:
                self.callback_handler.plugins.unregister(name)

    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Call the callbacks if the average is evaluated."""
        self._call("on_eval_epoch_start", trainer, kwargs)

    def on_eval_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Call the callbacks if the average is evaluated."""
        self._call("on_eval_step_start", trainer, kwargs)

    def on_eval_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Call the callbacks if the average is evaluated."""
        self._call("on_eval_step_end", trainer, kwargs)

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Call the callbacks if the average is evaluated."""
        self._call("on_eval_epoch_end", trainer, kwargs)

    def _call(self, event: str, trainer: Trainer, arguments: Mapping[str, Any]) -> None:
        if self.ema_model is not None and trainer.model is self.ema_model.module:
            self.callback_handler.call_event(event, trainer, **arguments)

    @property
    def watched_metrics(self) -> tuple[str, ...]:
        """The metric that determines the best average, if averages are evaluated."""
        return self.saver.watched_metrics if self.evaluate else ()

    @hookimpl(trylast=True)
    def on_watched_metric(self, trainer: Trainer, metric: str, value: float, **kwargs: Any) -> None:
        """Save the average if it is the best so far."""
        if self.evaluate:
            self.saver.on_watched_metric(trainer, metric, value)

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the average after each epoch if averages are not evaluated."""
        if not self.evaluate:
            trainer.save_checkpoint(
                self.save_path,
                save_optimizer=False,
                save_scheduler=False,
                model=self.ema_model.module,
            )

    def state_dict(self) -> dict[str, Any]:
        """The average, on the main process, and the state of the best metric."""
        return {**super().state_dict(), "best": self.saver.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the average until `on_load_training_state`, and restore the best metric."""
        super().load_state_dict(state)
        self.saver.load_state_dict(state["best"])
