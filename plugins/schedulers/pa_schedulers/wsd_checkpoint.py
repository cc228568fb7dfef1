"""Save the states before and after the decays of a WSD schedule, and go on from one."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core import hookimpl
from pa_core.builtins.base import BuiltinCallback, BuiltinSettings
from pa_core.checkpoint.restore import TrainingState

if TYPE_CHECKING:
    from pa_core import Trainer
    from pa_schedulers.wsd import WSDLrScheduler

PRE_DECAY, POST_DECAY = "wsd_pre_decay", "wsd_post_decay"


class WSDCheckpointSettings(BuiltinSettings):
    """The table ``[tool.pa-core.wsd_checkpoint]``."""

    save_dir: Path = Field(Path("checkpoints"), description="The folder of the checkpoints.")
    save_optimizer: bool = Field(
        True, description="Whether the files after a decay hold the optimizer's state."
    )
    save_scheduler: bool = Field(
        True, description="Whether the files after a decay hold the schedule's state."
    )
    initial_checkpoint: Path | None = Field(
        None, description="A checkpoint of another run to go on from."
    )


class WSDCheckpointCallback(BuiltinCallback):
    """Saves before and after each decay of a `WSDLrScheduler`, and goes on from such a checkpoint.

    Before a decay a whole training state is saved, the folder ``checkpoint_<step>_wsd_pre_decay``,
    since training may go on from there as if there had been no decay (WSD). After it the model is
    saved as one file, ``checkpoint_<step>_wsd_post_decay.pt``, to be used, or to go on from with
    the decay's progress (WSD-S). ``<step>`` is a number of updates.

    To go on, give `initial_checkpoint`, and a schedule with `is_continuation_from_checkpoint`.
    Weights, optimizer, gradient scaler and peaks are taken from the checkpoint; the run's length,
    position and history are its own. (An interrupted run goes on with
    ``train(resume_from=…)`` instead, where `initial_checkpoint` is not read again.)

    Args:
        save_dir: folder of the checkpoints.
        save_optimizer: whether the files after a decay hold the optimizer's state.
        save_scheduler: whether they hold the schedule's state.
        initial_checkpoint: a checkpoint to go on from: a folder or a ``.pt`` file.
    """

    Settings = WSDCheckpointSettings

    def __init__(
        self,
        save_dir: str | Path = "checkpoints",
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        initial_checkpoint: str | Path | None = None,
    ) -> None:
        self.save_dir = Path(save_dir)
        self.save_optimizer = save_optimizer
        self.save_scheduler = save_scheduler
        self.initial_checkpoint = None if initial_checkpoint is None else Path(initial_checkpoint)
        self.last_checkpoint_step: int | None = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Go on from the initial checkpoint, if there is one."""
        self._schedule(trainer)  # told now, and not in the middle of the run
        self.last_checkpoint_step = None  # a resumed run gets its state after this event
        if self.initial_checkpoint is not None and trainer.updates == 0:
            self._go_on_from(trainer, self.initial_checkpoint)

    def _schedule(self, trainer: Trainer) -> WSDLrScheduler:
        for schedule in getattr(trainer.scheduler, "schedules", [trainer.scheduler]):
            if hasattr(schedule, "get_checkpoint_steps"):
                return schedule
        raise ValueError(
            "WSDCheckpointCallback needs a schedule with get_checkpoint_steps(), such as "
            f"WSDLrScheduler, and the run's is {type(trainer.scheduler).__name__}"
        )

    def _go_on_from(self, trainer: Trainer, checkpoint: Path) -> None:
        if not checkpoint.exists():
            raise FileNotFoundError(f"There is no checkpoint to go on from at {checkpoint}")
        fresh, history = trainer.scheduler.state_dict(), trainer.run_history
        position = dict(vars(trainer.position))
        records = history.state_dict() if hasattr(history, "state_dict") else None
        if checkpoint.is_dir():
            # Not the plugins' state, which tells of the other run's course. (The part that is
            # read here is the same for all processes.)
            TrainingState(checkpoint, rank=0).restore_training(trainer)
            vars(trainer.position).update(position)
            if records is not None and hasattr(history, "load_state_dict"):
                history.load_state_dict(records)
        else:
            trainer.load_checkpoint(checkpoint)
        schedule = self._schedule(trainer)
        saved = schedule.state_dict()
        trainer.scheduler.load_state_dict(fresh)
        schedule.continue_from(saved)
        trainer.print(f"Going on from {checkpoint}")

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save where a decay begins or ends."""
        schedule = self._schedule(trainer)
        step = schedule.get_current_step()
        if step in (0, self.last_checkpoint_step):
            return  # before the first update, or gradients are still accumulating
        info = schedule.get_phase_info(step)
        if step == info["pre_decay_step"] and info["decay_steps"]:
            self.last_checkpoint_step = step
            trainer.print(f"The decay begins after {step} updates: saving the state before it")
            trainer.save_training_state(
                self.save_dir / f"checkpoint_{step}_{PRE_DECAY}",
                self._describe(trainer, step, PRE_DECAY),
            )
        elif step == info["period_end"]:
            self._save_post_decay(trainer, step)

    @hookimpl(trylast=True)
    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save after the last decay, where that wasn't done."""
        # Updates that the gradient scaler has left out were none for the schedule: then the run
        # ends a little before its last period does.
        total = self._schedule(trainer).get_checkpoint_steps()[-1]
        is_complete = trainer.stop_reason is None and trainer.updates == trainer.num_updates
        if is_complete and trainer.updates == total != self.last_checkpoint_step:
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
        trainer.print(f"Saved the model after the decay, at {step} updates")

    def _describe(self, trainer: Trainer, step: int, kind: str) -> dict[str, Any]:
        schedule = self._schedule(trainer)
        return {
            "step": step,
            "checkpoint_type": kind,
            "total_steps": schedule.total_steps,
            "decay_fraction": schedule.decay_phase_ratio,
            "timestamp": datetime.now(UTC).isoformat(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The step of the latest checkpoint."""
        return {"last_checkpoint_step": self.last_checkpoint_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.last_checkpoint_step = state["last_checkpoint_step"]
