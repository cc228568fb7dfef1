"""Go once through everything that a run does, in seconds, and leave nothing behind."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.builtins.base import BuiltinCallback
from pa_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

_PLACES = ("save_dir", "save_path", "logging_dir")
"""Where plugins keep the path that they write to."""


class FastDevRunCallback(BuiltinCallback):
    """Makes a run of one update, one batch of each evaluation and one epoch.

    Everything is called that a whole run calls, at its length as it is: the schedule is that of the
    whole run. What the trainer and its plugins save goes to a temporary folder, which is removed.

    The folder is there as long as this is.

    A trainer adds this by itself where the environment variable ``PA_CORE_FAST_DEV_RUN`` is 1.
    """

    @hookimpl(tryfirst=True)
    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        mine = None
        if trainer.is_main_process:
            mine = tempfile.mkdtemp(prefix="pa-core-fast-dev-run-")
            self._removal = weakref.finalize(self, shutil.rmtree, mine, ignore_errors=True)
        # Of a state, each process writes a part: all of them into the same folder.
        folder = Path(trainer._engine.gather_objects(mine)[0])
        for name, plugin in trainer.plugins.by_name.items():
            for holder in (plugin, getattr(plugin, "settings", None)):
                for place in _PLACES:
                    path = getattr(holder, place, None)
                    if isinstance(path, str | Path):
                        own = folder / name.replace(":", "-") / Path(path).name
                        setattr(holder, place, own)
        _Redirected(trainer, folder).put_in_place()
        trainer.print("A fast dev run: one update, one epoch, and nothing is kept")

    @hookimpl(tryfirst=True)
    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # Only here, so that sizes and schedule are those of the whole run.
        steps = trainer.run_config.gradient_accumulation_steps
        trainer.train_batch_limit = _least(trainer.train_batch_limit, steps)
        trainer.eval_batch_limit = _least(trainer.eval_batch_limit, 1)

    @hookimpl(tryfirst=True)
    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.eval_batch_limit = _least(trainer.eval_batch_limit, 1)

    @hookimpl(trylast=True)
    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.control.stop("The fast dev run is done")


def _least(limit: int | None, other: int) -> int:
    return other if limit is None else min(limit, other)


class _Redirected:
    """A trainer's methods that save and load, on paths in another folder."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self._folder = folder / "by-hand"
        self._methods = {
            name: getattr(trainer, name)
            for name in (
                *("save_checkpoint", "load_checkpoint"),
                *("save_training_state", "load_training_state"),
            )
        }
        self._trainer = trainer

    def put_in_place(self) -> None:
        for name in self._methods:
            setattr(self._trainer, name, self._redirect(name))

    def _redirect(self, name: str) -> Any:
        method, saves = self._methods[name], name.startswith("save_")
        signature = inspect.signature(method)
        first = next(iter(signature.parameters))

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            elsewhere = self._elsewhere(Path(given.arguments[first]))
            # What an earlier run has saved is loaded from where it is.
            if saves or elsewhere.exists():
                given.arguments[first] = elsewhere
            return method(*given.args, **given.kwargs)

        return call

    def _elsewhere(self, path: Path) -> Path:
        path = path.resolve()
        if path.is_relative_to(self._folder.parent):
            return path
        return self._folder.joinpath(*path.parts[1:])
