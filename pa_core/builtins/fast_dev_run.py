"""Try out every part of a run in seconds, keeping none of the files that it saves."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.hookspecs import hookimpl
from pa_core.plugin import ConfigurableCallback

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

_PATH_ATTRIBUTES = ("save_dir", "save_path", "logging_dir")
"""Attributes and settings in which plugins keep the paths they write to."""


class FastDevRunCallback(ConfigurableCallback):
    """Limits a run to one epoch of one update, and each evaluation to one batch.

    All the hooks of a full run are called, and the learning-rate scheduler is built for the length
    of the full run. Whatever the trainer and its plugins save goes to a temporary folder, which
    exists as long as this callback.

    A trainer adds this callback if the environment variable ``PA_CORE_FAST_DEV_RUN`` is 1.
    """

    @hookimpl(tryfirst=True)
    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        created = None
        if trainer.is_main_process:
            created = tempfile.mkdtemp(prefix="pa-core-fast-dev-run-")
            self._removal = weakref.finalize(self, shutil.rmtree, created, ignore_errors=True)
        # Every process writes its files of a training state into the same folder.
        folder = Path(trainer.gather_objects(created)[0])
        for name, plugin in trainer.plugins.by_name.items():
            for holder in (plugin, getattr(plugin, "settings", None)):
                for attribute in _PATH_ATTRIBUTES:
                    path = getattr(holder, attribute, None)
                    if isinstance(path, str | Path):
                        redirected = folder / name.replace(":", "-") / Path(path).name
                        setattr(holder, attribute, redirected)
        _redirect_files(trainer, folder)
        trainer.print("Fast dev run: one epoch of one update; saved files are temporary")

    @hookimpl(tryfirst=True)
    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # Not earlier, so that the run length and the scheduler are those of the full run.
        steps = trainer.run_config.gradient_accumulation_steps
        trainer.train_batch_limit = _smaller(trainer.train_batch_limit, steps)
        trainer.eval_batch_limit = _smaller(trainer.eval_batch_limit, 1)

    @hookimpl(tryfirst=True)
    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.eval_batch_limit = _smaller(trainer.eval_batch_limit, 1)

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.control.stop("The fast dev run is complete")


def _smaller(limit: int | None, other: int) -> int:
    return other if limit is None else min(limit, other)


def _redirect_files(trainer: Trainer, folder: Path) -> None:
    """Redirect what the script saves and loads through the trainer's methods into a folder."""
    for kind in ("checkpoint", "training_state"):
        for action in ("save", "load"):
            name = f"{action}_{kind}"
            redirected = _redirected(getattr(trainer, name), folder, saves=action == "save")
            setattr(trainer, name, redirected)


def _redirected(method: Callable[..., Any], folder: Path, *, saves: bool) -> Callable[..., Any]:
    """The method with its first argument, a path, moved into a folder."""
    signature = inspect.signature(method)
    path_argument = next(iter(signature.parameters))

    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        path = Path(given.arguments[path_argument]).resolve()
        if not path.is_relative_to(folder):
            inside = (folder / "by-hand").joinpath(*path.parts[1:])
            # Files of earlier runs are loaded from where they are.
            if saves or inside.exists():
                given.arguments[path_argument] = inside
        return method(*given.args, **given.kwargs)

    return call
