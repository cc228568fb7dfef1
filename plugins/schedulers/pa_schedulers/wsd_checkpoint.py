"""Checkpoints before and after the decays of a WSD scheduler, and continuation from one."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core import hookimpl
from pa_core.plugin import (
    CallbackSettings,
    ConfigurableCallback,
    LocalPath,
    TrainingState,
    local_path,
)

if TYPE_CHECKING:
    from pa_core import Trainer
    from pa_schedulers.wsd import WSDLrScheduler

PRE_DECAY, POST_DECAY = "wsd_pre_decay", "wsd_post_decay"


class WSDCheckpointSettings(CallbackSettings):
    """The table ``[tool.pa-core.wsd_checkpoint]``."""

    save_dir: LocalPath = Field(Path("checkpoints"), description="The folder of the checkpoints.")
    save_optimizer: bool = Field(
        True, description="Whether the files after a decay contain the optimizer's state."
    )
    save_scheduler: bool = Field(
        True, description="Whether the files after a decay contain the scheduler's state."
    )
    initial_checkpoint: LocalPath | None = Field(
        None, description="A checkpoint of another run to continue from."
    )


class WSDCheckpointCallback(ConfigurableCallback):
    """Saves before and after each decay of a `WSDLrScheduler`; continues from such a checkpoint.

    Before a decay it saves a training state, the folder ``checkpoint_<step>_wsd_pre_decay``, so
    that training can continue from there as if there had been no decay (WSD). After the decay it
    saves the model as one file, ``checkpoint_<step>_wsd_post_decay.pt``, to use, or to continue
    from with the progress of the decay (WSD-S). ``<step>`` is a number of updates.

    To continue, pass `initial_checkpoint`, and a scheduler with `is_continuation_from_checkpoint`.
    Weights, optimizer, gradient scaler and peaks come from the checkpoint; length, position and
    history are the new run's. To resume an interrupted run, use ``train(resume_from=…)`` instead;
    then `initial_checkpoint` isn't read again.

    Args:
        save_dir: the folder of the checkpoints.
        save_optimizer: whether the files after a decay contain the optimizer's state.
        save_scheduler: whether they contain the scheduler's state.
        initial_checkpoint: a checkpoint to continue from: a folder or a ``.pt`` file.

    Attributes:
        last_checkpoint_step: the number of updates at the latest checkpoint of the run.
        checkpoint_steps: those at the checkpoints of the scheduler, from the start of a run on.
        decay_fraction: the scheduler's ``decay_phase_ratio``.
        decay_info: the scheduler's ``get_decay_info()``.
    """

    Settings = WSDCheckpointSettings

    def __init__(
        self,
        save_dir: str | Path = "checkpoints",
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        initial_checkpoint: str | Path | None = None,
    ) -> None:
        self.save_dir = local_path(save_dir)
        self.save_optimizer = save_optimizer
        self.save_scheduler = save_scheduler
        self.initial_checkpoint = (
            None if initial_checkpoint is None else local_path(initial_checkpoint)
        )
        self.last_checkpoint_step: int | None = None
        self.checkpoint_steps: set[int] | None = None
        self.decay_fraction: float | None = None
        self.decay_info: list[dict[str, int]] | None = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Continue from the initial checkpoint, if there is one."""
        scheduler = self._scheduler(trainer)  # raises here if it doesn't fit, not within the run
        self.checkpoint_steps = set(scheduler.get_checkpoint_steps())
        self.decay_fraction = scheduler.decay_phase_ratio
        self.decay_info = scheduler.get_decay_info()
        self.last_checkpoint_step = None  # a resumed run restores it after this event
        if self.initial_checkpoint is not None and trainer.updates == 0:
            self._continue_from(trainer, self.initial_checkpoint)

    def _scheduler(self, trainer: Trainer) -> WSDLrScheduler:
        for scheduler in getattr(trainer.scheduler, "schedulers", [trainer.scheduler]):
            if hasattr(scheduler, "get_checkpoint_steps"):
                return scheduler
        raise ValueError(
            "WSDCheckpointCallback needs a scheduler with get_checkpoint_steps(), such as "
            f"WSDLrScheduler; the run has {type(trainer.scheduler).__name__}"
        )

    def _continue_from(self, trainer: Trainer, checkpoint: Path) -> None:
        if not checkpoint.exists():
            raise FileNotFoundError(f"No checkpoint to continue from at {checkpoint}")
        fresh, history = trainer.scheduler.state_dict(), trainer.run_history
        position = dict(vars(trainer.position))
        records = history.state_dict() if hasattr(history, "state_dict") else None
        if checkpoint.is_dir():
            # Not the plugins' state, which belongs to the other run. What is read here is the same
            # for every rank.
            TrainingState(checkpoint, rank=0).restore_training(trainer)
            vars(trainer.position).update(position)
            if records is not None and hasattr(history, "load_state_dict"):
                history.load_state_dict(records)
        else:
            trainer.load_checkpoint(checkpoint)
        scheduler = self._scheduler(trainer)
        saved = scheduler.state_dict()
        trainer.scheduler.load_state_dict(fresh)
        scheduler.continue_from(saved)
        trainer.print(f"Continuing from {checkpoint}")

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save when a decay starts or ends."""
        scheduler = self._scheduler(trainer)
        step = scheduler.get_current_step()
        if step in (0, self.last_checkpoint_step):
            return  # before the first update, or gradients are still accumulating
        info = scheduler.get_phase_info(step)
        if step == info["pre_decay_step"] and info["decay_steps"]:
            self.last_checkpoint_step = step
            trainer.print(f"Saving the training state before the decay, after {step} updates")
            trainer.save_training_state(
                self.save_dir / f"checkpoint_{step}_{PRE_DECAY}",
                self._describe(trainer, step, PRE_DECAY),
            )
        elif step == info["period_end"]:
            self._save_post_decay(trainer, step)

    @hookimpl(trylast=True)
    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save after the last decay, unless that is done."""
        # The scheduler doesn't count updates that were skipped. Then the run ends before the
        # scheduler's last period does.
        total = self._scheduler(trainer).get_checkpoint_steps()[-1]
        attempts = trainer.position.attempts
        is_complete = trainer.stop_reason is None and attempts == trainer.run_length.num_updates
        if is_complete and attempts == total != self.last_checkpoint_step:
            self._save_post_decay(trainer, total)

    def _save_post_decay(self, trainer: Trainer, step: int) -> None:
        self.last_checkpoint_step = step
        self.save_dir.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(
            self.save_dir / f"checkpoint_{step}_{POST_DECAY}.pt",
            self._describe(trainer, step, POST_DECAY),
            save_optimizer=self.save_optimizer,
            save_scheduler=self.save_scheduler,
        )
        trainer.print(f"Saved the model after the decay, after {step} updates")

    def _describe(self, trainer: Trainer, step: int, kind: str) -> dict[str, Any]:
        scheduler = self._scheduler(trainer)
        return {
            "step": step,
            "checkpoint_type": kind,
            "total_steps": scheduler.total_steps,
            "decay_fraction": scheduler.decay_phase_ratio,
            "timestamp": datetime.now(UTC).isoformat(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The step of the latest checkpoint."""
        return {"last_checkpoint_step": self.last_checkpoint_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.last_checkpoint_step = state["last_checkpoint_step"]
