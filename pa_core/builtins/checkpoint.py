"""Save training states during and after a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pa_core.builtins.base import has_finite_weights

# The rest of it is first used by the first save. Importing it now shows a missing library at once.
from pa_core.checkpoint.background import CHECKPOINT_NAME
from pa_core.checkpoint.storage import read_manifest, remove_leftovers, state_folders, verify
from pa_core.durations import Duration, Every
from pa_core.errors import TrainingStateError
from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback, LocalPath
from pa_core.settings.paths import local_path

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class SaveTrainingStateSettings(CallbackSettings):
    """Settings of the built-in plugin `checkpoint`."""

    save_dir: LocalPath = Field(Path("training_states"), description="The folder for the states.")
    save_every_n_epochs: int | None = Field(None, ge=1, description="Epochs between two states.")
    save_every_n_steps: int | None = Field(
        None, ge=1, description="Optimizer updates between two states."
    )
    save_at_end: bool = Field(True, description="Whether to save a state at the end of the run.")
    max_checkpoints: int | None = Field(
        None, ge=1, description="How many intact states to keep; older ones are removed."
    )
    every: Duration | None = Field(
        None, description='A duration between two states, such as "15 minutes".'
    )
    on_save_error: Literal["warn", "stop"] = Field(
        "warn",
        description="What to do if a state can't be written, as on a full disk: warn or stop.",
    )
    in_background: bool = Field(
        True, description="Whether training continues while a copy of the state is written."
    )


class SaveTrainingStateCallback(ConfigurableCallback):
    """Saves training states, so that an interrupted run can be resumed.

    States are folders in `save_dir`, named after the position in the run: ``epoch_0003``,
    ``update_00000120``, ``final``. ``Trainer.train(resume_from="auto")`` resumes from the newest
    intact one. A state with weights that are NaN or infinite is useless, and isn't saved.

    If there are more than `max_checkpoints` states with such names, the oldest are removed once a
    newer one is saved. Only intact states count, so a damaged one never replaces a good one.

    Args:
        save_dir: the folder; use one for each run, as states of an earlier run count too.
        save_every_n_epochs: epochs between two states; None for none after epochs.
        save_every_n_steps: optimizer updates between two states; None for none within epochs.
        save_at_end: whether to save a state at the end of the run.
        max_checkpoints: how many to keep; None for all.
        every: a duration between two states, such as ``"15 minutes"``; None for none.
        on_save_error: if a state can't be written, as on a full disk, ``"warn"`` continues and
            ``"stop"`` raises the error. Earlier states are unchanged in either case.
        in_background: training is blocked only while the state is copied into host memory; the
            copy is written meanwhile, one at a time, and the end of the run waits for it. With
            False, or if less than twice the state's size is free, training waits for the disk.

    Raises:
        ValueError: for a number below 1, or an invalid duration.
    """

    Settings = SaveTrainingStateSettings
    changes_training = False
    saves_training_states = True  # for `resume_from="auto"`, which uses `save_dir`

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
        self.save_dir = local_path(save_dir)
        self.save_every_n_epochs = save_every_n_epochs
        self.save_every_n_steps = save_every_n_steps
        self.save_at_end = save_at_end
        self.max_checkpoints = max_checkpoints
        self.every = None if every is None else Duration.parse(every)
        self.on_save_error = on_save_error
        self.in_background = in_background
        self._every = self._new_interval()
        self._updates = 0
        self._run_ids: set[str] = set()  # of the runs that this callback has been part of

    def _new_interval(self) -> Every | None:
        return None if self.every is None else Every(self.every)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.is_main_process:
            remove_leftovers(self.save_dir)
            self._warn_of_another_run(trainer)
        self._every = self._new_interval()  # in a resumed run, it is restored after this event
        self._updates = trainer.updates

    def _warn_of_another_run(self, trainer: Trainer) -> None:
        """Warn a run that starts from the beginning of another run's states in its folder."""
        self._run_ids.add(trainer.run_id)
        if trainer.is_resuming:
            return
        for state_dir in state_folders(self.save_dir):
            if CHECKPOINT_NAME.fullmatch(state_dir.name) and self._is_of_another_run(state_dir):
                warnings.warn(
                    f"{self.save_dir} has training states of another run, such as "
                    f"{state_dir.name}. This run replaces those of the same name, and "
                    "resume_from='auto' uses the newest of all. Give each run its own save_dir, or "
                    "remove the old states",
                    stacklevel=2,
                )
                return

    def _is_of_another_run(self, state_dir: Path) -> bool:
        try:
            return read_manifest(state_dir).get("run_id") not in self._run_ids
        except TrainingStateError:
            return False  # it is damaged, so no run resumes from it

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.updates == self._updates:
            return  # gradients are still accumulating
        self._updates = trainer.updates
        steps = self.save_every_n_steps
        every, name = self._every, f"update_{self._updates:08d}"
        if steps is not None and self._updates % steps == 0:
            self._request(trainer, name)
        if every is not None and every.due(trainer.progress):
            self._request(trainer, name, everywhere=every.is_counted)

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        epoch, epochs = trainer.run_history.current_epoch, self.save_every_n_epochs
        if epochs is not None and epoch % epochs == 0:
            self._request(trainer, f"epoch_{epoch:04d}")

    # First, so that the state is that of the last update, even if other plugins then load weights.
    @hookimpl(tryfirst=True)
    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        # A paused run was saved when it was paused.
        is_over = not trainer.position.is_paused
        if trainer.was_finished and self._has_final(trainer):
            return
        if self.save_at_end and is_over and has_finite_weights(trainer):
            # Not in the background: nothing is left to do meanwhile.
            trainer.save_training_state(
                self.save_dir / "final",
                now=True,
                must=self.on_save_error == "stop",
                keep=self.max_checkpoints,
            )

    def _has_final(self, trainer: Trainer) -> bool:
        """Whether the final state of a run that was finished before is there, on every process."""
        found = False
        if trainer.is_main_process and not verify(self.save_dir / "final"):
            manifest, position = read_manifest(self.save_dir / "final"), trainer.position
            saved = manifest["position"]
            found = manifest.get("run_id", trainer.run_id) == trainer.run_id and all(
                saved[name] == getattr(position, name)
                for name in ("epoch", "phase", "batch", "updates", "samples")
            )
        return bool(trainer.gather_objects(found)[0])

    def _request(self, trainer: Trainer, name: str, *, everywhere: bool = True) -> None:
        # If a clock decides, the main process does so for all.
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
