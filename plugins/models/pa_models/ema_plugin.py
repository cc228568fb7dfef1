"""The plugin ``ema``: a moving average of the weights, evaluated beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from accelerate import DistributedType
from pydantic import BaseModel, ConfigDict, Field

from pa_core import TrainerCallback, hookimpl
from pa_core.callbacks import CallbackHandler, SaveBestModelCallback
from pa_models.ema import ModelEma
from pa_models.selection import bare_model

if TYPE_CHECKING:
    from torch import nn

    from pa_core import Trainer

_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class EmaSettings(BaseModel):
    """The table ``[tool.pa-core.ema]``."""

    model_config = ConfigDict(extra="forbid")

    decay: float = Field(
        0.9999, ge=0, lt=1, description="The share that an optimizer update leaves of the average."
    )
    warmup: bool = Field(
        True, description="Whether the decay of update t is at most (1 + t) / (10 + t)."
    )
    update_every: int = Field(
        1, ge=1, description="Optimizer updates between two of the average; the decay stays theirs."
    )
    evaluate: bool = Field(
        True, description="Whether every evaluation is also done with the average."
    )
    name: str = Field(
        "ema", min_length=1, description="What is recorded of it begins so: ema_eval_loss_epoch."
    )


class EmaPlugin(TrainerCallback):
    """Keeps a moving average of the weights, and has it evaluated beside them.

    The average is taken after each update, on the device, and goes on where it was in a resumed
    run. Each run of ``train`` begins a new one. It outlives the run: ``trainer.evaluate(…)`` is
    done with it as well.

    Args:
        decay: the share that an optimizer update leaves of the average.
        warmup: whether the decay of the ``t``-th update is at most ``(1 + t) / (10 + t)``.
        update_every: optimizer updates between two updates of the average. The decay is taken so
            many times then, so that the average reaches as far back as with 1.
        evaluate: whether every evaluation is also done with the average.
        name: the name that the average is evaluated by: metrics begin with it, and
            `SaveBestModelCallback` takes it as its ``model``.

    Attributes:
        ema_model: the `ModelEma`, from the first run on; ``ema_model.module`` has its weights.
    """

    Settings: ClassVar[type[BaseModel]] = EmaSettings
    follows_weights: ClassVar[tuple[str, ...]] = ("ema",)

    def __init__(
        self,
        decay: float = 0.9999,
        warmup: bool = True,
        update_every: int = 1,
        evaluate: bool = True,
        name: str = "ema",
    ) -> None:
        if update_every < 1:
            raise ValueError(f"update_every must be 1 or more, and not {update_every!r}")
        self.decay, self.warmup, self.update_every = decay, warmup, update_every
        self.evaluate, self.name = evaluate, name
        self.ema_model: Any = None
        self._is_main = True
        self._loaded: Mapping[str, Any] | None = None

    @classmethod
    def from_settings(cls, settings: BaseModel) -> Self:
        """Build the plugin from its table."""
        return cls(**{name: getattr(settings, name) for name in sorted(settings.model_fields_set)})

    def create_ema(self, model: nn.Module) -> Any:
        """Make the average of a model."""
        return ModelEma(model, decay=self.decay, warmup=self.warmup)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin with the present weights; a resumed run's are put in after this."""
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        kind = trainer._accelerator.distributed_type
        if kind not in _WHOLE:
            raise ValueError(
                f"A moving average needs the whole model on each process, and {kind.value} shards "
                "it: leave the average out"
            )
        self._is_main = trainer.is_main_process
        self.ema_model = self.create_ema(trainer.get_model(keep_torch_compile=False))

    @hookimpl(tryfirst=True)
    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Take the updated weights into the average."""
        if trainer.updates % self.update_every:
            return
        model = bare_model(trainer.model)  # a fraction of get_model's time
        if isinstance(self.ema_model, ModelEma):
            self.ema_model.update(model, self.update_every)
        else:
            self.ema_model.update(model)

    @hookimpl
    def register_eval_models(self, trainer: Trainer) -> Mapping[str, nn.Module]:
        """The model with the averaged weights, under the plugin's name."""
        if not self.evaluate or self.ema_model is None:
            return {}
        # Running statistics are each process' own.
        module = self.ema_model.module
        weights = module.state_dict()
        _take_main_process(
            trainer, [weights[name] for name, _ in module.named_buffers() if name in weights]
        )
        return {self.name: module}

    # -- State: once, not once per process, since a model may be large ----------------------------

    def state_dict(self) -> dict[str, Any]:
        """The average, on the main process."""
        if self.ema_model is None or not self._is_main:
            return {}
        return {"ema": dict(self.ema_model.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take note of an average; it is put in once the whole state is back."""
        self._loaded = state

    def on_load_training_state(self, trainer: Trainer, **kwargs: Any) -> None:
        """Go on with the state's average, or with the state's weights where it had none."""
        state, self._loaded = self._loaded, None
        self._begin(trainer)
        if state and "ema" in state and self._is_main:
            self.ema_model.load_state_dict(state["ema"])
        whole = self.ema_model.state_dict()
        _take_main_process(trainer, whole.values())
        rest = {name: part for name, part in whole.items() if not isinstance(part, torch.Tensor)}
        self.ema_model.load_state_dict(whole | trainer._engine.gather_objects(rest)[0])


def _take_main_process(trainer: Trainer, values: Iterable[Any]) -> None:
    """Let the tensors among `values` be those of the main process on all processes."""
    if trainer._engine.num_processes == 1:
        return
    for tensor in values:
        if isinstance(tensor, torch.Tensor):
            sent = tensor.detach().to(trainer.device).contiguous()
            torch.distributed.broadcast(sent, 0)
            tensor.detach().copy_(sent)


class ModelEmaCallback(EmaPlugin):
    """Keeps a moving average of the weights, evaluates it, and saves the best one.

    What it records begins with ``ema_model_``. With `EmaPlugin` and `SaveBestModelCallback`, each
    does its own.

    Args:
        decay: the share that an optimizer update (not: an epoch) leaves of the average.
        evaluate_during_training: whether every evaluation is also done with the average, and the
            best one is saved; otherwise it is saved after each epoch.
        save_path: the file, one of ``trainer.save_checkpoint`` without the optimizer.
        watch_metric: the metric of the best average.
        greater_is_better: whether more of it is better.
        model_ema: makes the average: called with the model and ``decay``. It has ``update(model)``,
            ``module`` and a module's ``state_dict`` and ``load_state_dict``.
        callbacks: called in the evaluations of the average only. Those of the trainer are called
            there anyway; one of a class that the trainer has already is left out.
        warmup: whether the decay of the ``t``-th update is at most ``(1 + t) / (10 + t)``; for
            `ModelEma`.
        update_every: optimizer updates between two updates of the average; for `ModelEma`.
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

    def create_ema(self, model: nn.Module) -> Any:
        """Make the average of a model."""
        if self.model_ema_cls is ModelEma:
            return super().create_ema(model)
        return self.model_ema_cls(model, decay=self.decay)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin with the present weights."""
        if self.evaluate and trainer.eval_dataset is None:
            raise ValueError(
                "ModelEmaCallback saves the average that evaluates best, which needs an "
                "eval_dataset: give train() one, or use evaluate_during_training=False"
            )
        super().on_training_run_start(trainer)
        present = {type(plugin) for plugin in trainer.plugins.by_name.values()}
        for name, callback in self.callback_handler.plugins.by_name.items():
            if type(callback) in present:
                self.callback_handler.plugins.unregister(name)

    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Tell the callbacks of the average's evaluation."""
        self._call("on_eval_epoch_start", trainer, kwargs)

    def on_eval_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Tell the callbacks of the average's evaluation."""
        self._call("on_eval_step_start", trainer, kwargs)

    def on_eval_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Tell the callbacks of the average's evaluation."""
        self._call("on_eval_step_end", trainer, kwargs)

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Tell the callbacks of the average's evaluation."""
        self._call("on_eval_epoch_end", trainer, kwargs)

    def _call(self, event: str, trainer: Trainer, arguments: Mapping[str, Any]) -> None:
        if self.ema_model is not None and trainer.model is self.ema_model.module:
            self.callback_handler.call_event(event, trainer, **arguments)

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the average if it is the best one, or if none is evaluated."""
        if self.evaluate:
            self.saver.on_training_run_epoch_end(trainer)
        else:
            trainer.save_checkpoint(
                self.save_path,
                save_optimizer=False,
                save_scheduler=False,
                model=self.ema_model.module,
            )

    def state_dict(self) -> dict[str, Any]:
        """The average, on the main process, and what was best."""
        return {**super().state_dict(), "best": self.saver.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take note of a state."""
        super().load_state_dict(state)
        self.saver.load_state_dict(state["best"])
