"""What `pa check` finds out in the process of a script: how the run would be, and what fails."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.callbacks import TrainerCallback
from pa_core.checkpoint.listing import readable_size
from pa_core.errors import nearest
from pa_core.hookspecs import hookimpl
from pa_core.plugins.explain import describe_loop

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

_LENGTHS = ("total_steps", "T_max", "num_updates")
"""What schedules call the number of updates that they are for."""


class Rehearsal(TrainerCallback):
    """Writes down what a run is, and tries to save and load it at its end.

    Args:
        file: for the report, as JSON; written whenever there is news.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.report: dict[str, Any] = {"problems": []}

    def _write(self) -> None:
        self.file.write_text(json.dumps(self.report), encoding="utf-8")

    @hookimpl(tryfirst=True)
    def on_init_end(self, trainer: Trainer) -> None:
        # Before paths lead elsewhere: where the run itself would save.
        plugins: dict[str, Any] = trainer.plugins.by_name
        self._save_dirs = [
            (Path(plugin.save_dir), getattr(plugin, "max_checkpoints", None) or 1)
            for plugin in plugins.values()
            if getattr(plugin, "saves_training_states", False)
        ]

    @hookimpl(trylast=True)
    def on_training_run_start(self, trainer: Trainer) -> None:
        config = trainer.run_config
        model, schedule = trainer.get_model(), trainer.scheduler
        parameters = list(model.parameters())
        self.report["run"] = {
            "model": type(model).__name__,
            "parameters": sum(one.numel() for one in parameters),
            "trainable": sum(one.numel() for one in parameters if one.requires_grad),
            "optimizer": type(trainer.optimizer).__name__,
            "schedule": schedule and type(schedule).__name__,
            "device": str(trainer.device),
            "processes": config.num_processes,
            "mixed precision": config.mixed_precision,
            "epochs": config.num_epochs,
            "updates": trainer.num_updates,
            "updates per epoch": config.num_update_steps_per_epoch,
            "samples per update": config.train_total_batch_size,
            "plugins": [name for name in trainer.plugins.by_name if not _is_ours(name)],
            "settings": trainer.settings.file and str(trainer.settings.file),
        }
        self.report["explained"] = explained = describe_loop(
            trainer.plugins, trainer_class=type(trainer), settings_file=trainer.settings.file
        )
        for step in explained["loop"]:
            found = step.get("implementations", ())
            step["implementations"] = [one for one in found if not _is_ours(one["plugin"])]
        self._check_schedule(schedule, trainer.num_updates)
        self._write()

    def _check_schedule(self, schedule: Any, updates: int | None) -> None:
        for name in _LENGTHS:
            length = getattr(schedule, name, None)
            if isinstance(length, int) and updates is not None and length != updates:
                self.report["problems"].append(
                    f"The schedule {type(schedule).__name__} is for {length} updates ({name}), but "
                    f"the run has {updates}. A schedule by its name, or one with "
                    "TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH, has the run's length"
                )

    @hookimpl(tryfirst=True)
    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        recorded = set(trainer.run_history.get_metric_names())
        for name, plugin in trainer.plugins.by_name.items():
            metric = getattr(plugin, "watch_metric", None)
            if isinstance(metric, str) and metric not in recorded:
                self.report["problems"].append(
                    f"{name} watches {metric!r}, which is never recorded."
                    f"{nearest(metric, recorded)} An epoch records {', '.join(sorted(recorded))}"
                )
        self._write()

    @hookimpl(trylast=True)
    def on_training_run_end(self, trainer: Trainer) -> None:
        kind = type(trainer)  # whose methods know nothing of a fast dev run's other places
        with tempfile.TemporaryDirectory(prefix="pa-core-check-") as folder:
            state = Path(folder, "state")
            kind.save_training_state(trainer, state)
            size = sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
            kind.load_training_state(trainer, state)
        self.report["state bytes"] = size
        for save_dir, kept in self._save_dirs:
            # While one more is written, those that are kept are still there.
            self._check_space(save_dir, size * (kept + 1))
        self._write()

    def _check_space(self, save_dir: Path, needed: int) -> None:
        there = save_dir.resolve()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if free < needed:
            self.report["problems"].append(
                f"{save_dir}: the training states to be kept there need {readable_size(needed)}, "
                f"and {readable_size(free)} are free"
            )


def _is_ours(name: str) -> bool:
    """Whether a plugin is there for this run alone."""
    return name.endswith(":environment")
