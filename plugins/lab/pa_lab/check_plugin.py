"""The plugin that ``pa check`` adds to a script's run: describes the run and finds problems."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core import TrainerCallback, hookimpl
from pa_core.errors import nearest
from pa_core.plugin import describe_loop, readable_size
from pa_lab.check import REPORT_VARIABLE

if TYPE_CHECKING:
    from pa_core import Trainer

_LENGTHS = ("total_steps", "T_max", "num_updates")
"""Attributes in which learning-rate schedulers keep the number of updates they were built for."""


class CheckPlugin(TrainerCallback):
    """Describes a run, and tries to save and load its training state at the end.

    Args:
        file: the file for the report, as JSON; rewritten whenever something is added. By default,
            the one that the environment variable ``PA_LAB_CHECK_REPORT`` names.

    Raises:
        ValueError: if neither names a file.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        file = file or os.environ.get(REPORT_VARIABLE)
        if not file:
            raise ValueError(f"set {REPORT_VARIABLE} to the file for the report, as pa check does")
        self.file = Path(file)
        self.report: dict[str, Any] = {"problems": []}

    def _write(self) -> None:
        self.file.write_text(json.dumps(self.report), encoding="utf-8")

    @hookimpl(tryfirst=True)
    def on_init_end(self, trainer: Trainer) -> None:
        # Before fast_dev_run redirects the paths: where the real run would save.
        plugins: dict[str, Any] = trainer.plugins.by_name
        self._save_dirs = [
            (Path(plugin.save_dir), getattr(plugin, "max_checkpoints", None) or 1)
            for plugin in plugins.values()
            if getattr(plugin, "saves_training_states", False)
        ]

    @hookimpl(trylast=True)
    def on_training_run_start(self, trainer: Trainer) -> None:
        config = trainer.run_config
        model, scheduler = trainer.get_model(), trainer.scheduler
        parameters = list(model.parameters())
        plugins = trainer.plugins.by_name
        self.report["run"] = {
            "model": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "optimizer": type(trainer.optimizer).__name__,
            "scheduler": scheduler and type(scheduler).__name__,
            "device": str(trainer.device),
            "processes": config.num_processes,
            "mixed precision": config.mixed_precision,
            "epochs": config.num_epochs,
            "updates": trainer.num_updates,
            "updates per epoch": config.num_update_steps_per_epoch,
            "samples per update": config.train_total_batch_size,
            "plugins": [name for name in plugins if not self._is_temporary(trainer, name)],
            "settings": trainer.settings.file and str(trainer.settings.file),
        }
        self.report["explained"] = explained = describe_loop(
            trainer.plugins, trainer_class=type(trainer), settings_file=trainer.settings.file
        )
        for step in explained["loop"]:
            found = step.get("implementations", ())
            step["implementations"] = [
                one for one in found if not self._is_temporary(trainer, one["plugin"])
            ]
        self._check_scheduler(scheduler, trainer.num_updates)
        self._write()

    def _is_temporary(self, trainer: Trainer, name: str) -> bool:
        """Whether a plugin takes part only because the run is checked."""
        return name.endswith(":environment") or trainer.plugins.by_name.get(name) is self

    def _check_scheduler(self, scheduler: Any, updates: int | None) -> None:
        for name in _LENGTHS:
            length = getattr(scheduler, name, None)
            if isinstance(length, int) and updates is not None and length != updates:
                self.report["problems"].append(
                    f"The scheduler {type(scheduler).__name__} was built for {length} updates "
                    f"({name}), but the run has {updates}. A scheduler given by name, or made with "
                    "TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH, gets the run's length"
                )

    @hookimpl(tryfirst=True)
    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        recorded = set(trainer.run_history.get_metric_names())
        for metric, names in trainer.plugins.watchers().items():
            # An evaluation within an epoch may come later than the one update of this run.
            if metric in recorded or metric.endswith("intermediate_eval_loss"):
                continue
            self.report["problems"].append(
                f"{' and '.join(names)} {'watch' if names[1:] else 'watches'} {metric!r}, which an "
                f"epoch doesn't record.{nearest(metric, recorded)} It records "
                f"{', '.join(sorted(recorded))}"
            )
        self._write()

    @hookimpl(trylast=True)
    def on_training_run_end(self, trainer: Trainer) -> None:
        kind = type(trainer)  # whose methods aren't redirected by fast_dev_run
        with tempfile.TemporaryDirectory(prefix="pa-lab-check-") as folder:
            state = Path(folder, "state")
            kind.save_training_state(trainer, state)
            size = sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
            kind.load_training_state(trainer, state)
        self.report["state bytes"] = size
        for save_dir, kept in self._save_dirs:
            # While a new state is written, all kept ones are still there.
            self._check_space(save_dir, size * (kept + 1))
        self._write()

    def _check_space(self, save_dir: Path, needed: int) -> None:
        folder = save_dir.resolve()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < needed:
            self.report["problems"].append(
                f"{save_dir}: the training states kept there need {readable_size(needed)}, but "
                f"only {readable_size(free)} are free"
            )
