"""Save training states while a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pa_core.builtins.base import BuiltinCallback, BuiltinSettings, has_finite_weights
from pa_core.checkpoint.storage import remove_leftovers
from pa_core.control import SaveRequest
from pa_core.durations import Duration, Every
from pa_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class SaveTrainingStateSettings(BuiltinSettings):
    """Settings of the built-in plugin `checkpoint`."""

    save_dir: Path = Field(Path("training_states"), description="The folder of the states.")
    save_every_n_epochs: int | None = Field(None, ge=1, description="Epochs between two states.")
    save_every_n_steps: int | None = Field(
        None, ge=1, description="Optimizer updates between two states."
    )
    save_at_end: bool = Field(True, description="Whether to save a state at the end of the run.")
    max_checkpoints: int | None = Field(
        None, ge=1, description="How many intact states to keep; older ones are removed."
    )
    every: Duration | None = Field(
        None, description='Time or distance between two states, such as "15 minutes".'
    )
    on_save_error: Literal["warn", "stop"] = Field(
        "warn",
        description="Whether a run goes on where a state can't be written, as on a full disk.",
    )
    in_background: bool = Field(
        True, description="Whether training goes on while a state is written, from a copy of it."
    )


class SaveTrainingStateCallback(BuiltinCallback):
    """Saves the whole state of training, so that a run can go on where it was interrupted.

    States are folders in `save_dir`, named after the place in the run: ``epoch_0003``,
    ``update_00000120``, ``final``. ``Trainer.train(resume_from="auto")`` takes the newest intact
    one. A state whose weights aren't finite is of no use, and isn't saved.

    When there are more than `max_checkpoints` states of such names, the oldest are removed, after
    a newer one was saved. Only intact states count, so a damaged one never pushes out a good one.

    Args:
        save_dir: the folder; one for each run, as states of an earlier run count too.
        save_every_n_epochs: epochs between two states; None for none after epochs.
        save_every_n_steps: optimizer updates between two states; None for none within epochs.
        save_at_end: save a state at the end of the run.
        max_checkpoints: how many to keep; None for all.
        every: a duration between two states, such as ``"15 minutes"``; None for none.
        on_save_error: ``"warn"`` goes on where a state can't be written, as on a full disk;
            ``"stop"`` raises. Earlier states stay as they are in any case.
        in_background: training stands still only while the state is copied into the host's memory;
            it is written meanwhile, one at a time, and the run's end waits for it. Where less than
            twice the state's size is free, or with False, training waits for the disk.

    Raises:
        ValueError: for a number below 1, or a duration that can't be read.
    """

    Settings = SaveTrainingStateSettings
    changes_training = False
    saves_training_states = True  # `resume_from="auto"` looks for this, and takes `save_dir`

    def __init__(
        self,
        save_dir: str | Path = "training_states",
        save_every_n_epochs: int | None = None,
        save_every_n_steps: int | None = None,
        save_at_end: bool = True,
        max_checkpoints: int | None = None,
        every: Duration | str | None = None,
        on_save_error: Literal["warn", "stop"] = "warn",
        in_background: bool = True,
    ) -> None:
        for name, number in (
            ("save_every_n_epochs", save_every_n_epochs),
            ("save_every_n_steps", save_every_n_steps),
            ("max_checkpoints", max_checkpoints),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be 1 or more, or None, not {number}")
        self.save_dir = Path(save_dir)
        self.save_every_n_epochs = save_every_n_epochs
        self.save_every_n_steps = save_every_n_steps
        self.save_at_end = save_at_end
        self.max_checkpoints = max_checkpoints
        self.every = None if every is None else Duration.parse(every)
        self.on_save_error = on_save_error
        self.in_background = in_background
        self._every = self._begin()
        self._updates = 0

    def _begin(self) -> Every | None:
        return None if self.every is None else Every(self.every)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.is_main_process:
            remove_leftovers(self.save_dir)
        self._every = self._begin()  # a resumed run gets its state after this event
        self._updates = trainer.updates

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.updates == self._updates:
            return  # gradients are still accumulating
        self._updates = trainer.updates
        steps = self.save_every_n_steps
        every, name = self._every, f"update_{self._updates:08d}"
        if steps is not None and self._updates % steps == 0:
            self._ask(trainer, name)
        if every is not None and every.due(trainer.progress):
            self._ask(trainer, name, everywhere=every.is_counted)

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        epoch, epochs = trainer.run_history.current_epoch, self.save_every_n_epochs
        if epochs is not None and epoch % epochs == 0:
            self._ask(trainer, f"epoch_{epoch:04d}")

    # First, so that the state is that of the run's last update, whatever others then load.
    @hookimpl(tryfirst=True)
    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        # Whoever has paused a run has saved it.
        is_over = not trainer.position.is_paused
        if self.save_at_end and is_over and has_finite_weights(trainer):
            # (not in the background: there is nothing left to do meanwhile)
            request = SaveRequest(self.on_save_error == "stop", keep=self.max_checkpoints)
            trainer._saver.save(self.save_dir / "final", request, {})

    def _ask(self, trainer: Trainer, name: str, *, everywhere: bool = True) -> None:
        # Where clocks decide, the main process asks for all.
        if (everywhere or trainer.is_main_process) and has_finite_weights(trainer):
            trainer.control.save(
                self.save_dir / name,
                everywhere=everywhere,
                must=self.on_save_error == "stop",
                in_background=self.in_background,
                keep=self.max_checkpoints,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"every": self._every.state_dict() if self._every is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._every is not None and state["every"] is not None:
            self._every.load_state_dict(state["every"])
