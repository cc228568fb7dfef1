"""Tracking services through accelerate's trackers.

accelerate's classes start a run, log to it and close it. This module adds the run's identity, so
that a resumed run continues at the service, the offline modes, and the final status.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from pa_tracking.conversion import (
    flatten,
    hyperparameters,
    numbers_in,
    shared_charts,
    tag_of,
)
from pa_tracking.service import Place, Service, Status

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TrackerService(Service):
    """A service that logs through one of accelerate's trackers, created in `start`."""

    mode_variable: ClassVar[str | None] = None
    """The service's own environment variable for its online or offline mode."""

    def start(self, config: Mapping[str, Any] | None) -> None:
        tracker_class = LOGGER_TYPE_TO_CLASS[self.run.service]
        self.tracker = tracker_class(**self._arguments(config), **self.settings.options)
        self.tracker.start()
        self._last_update = -1
        if config is not None:
            self._describe(config)

    def log(
        self, values: Mapping[str, Any], place: Place, tags: Mapping[str, str] | None = None
    ) -> None:
        numbers = numbers_in(values)
        if place.update != self._last_update:  # once per update
            numbers |= {"epoch": place.epoch, "samples": place.samples, "seconds": place.seconds}
            self._last_update = place.update
        self._log_numbers(numbers, place.update)

    def log_images(self, name: str, images: Sequence[NDArray[Any]], update: int) -> None:
        self.tracker.log_images({name: list(images)}, step=update)

    def finish(self, status: Status) -> None:
        self.tracker.finish()

    def _arguments(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """The arguments for accelerate's tracker."""
        return {"run_name": self.run.project}

    def _describe(self, config: Mapping[str, Any]) -> None:
        self.tracker.store_init_configuration(_columns(config))

    def _log_numbers(self, numbers: dict[str, float], update: int) -> None:
        self.tracker.log(numbers, step=update)

    def _mode(self, **arguments: tuple[Any, Any]) -> dict[str, Any]:
        """Choose each argument's offline value (first) or online value (second).

        Returns nothing if the settings leave the choice to the service's own variable and it is
        set.
        """
        offline = self.settings.offline
        if offline is None and os.environ.get(self.mode_variable or ""):
            return {}
        return {name: values[offline is False] for name, values in arguments.items()}

    @property
    def _folder(self) -> str:
        self.settings.logging_dir.mkdir(parents=True, exist_ok=True)
        return str(self.settings.logging_dir.resolve())


class TensorBoard(TrackerService):
    """Event files in ``LOGGING_DIR/PROJECT/RUN_NAME``.

    Metrics are grouped by tags such as ``train/loss_epoch`` and ``eval/loss_epoch``. Those that
    differ only in their group share a chart of the custom scalars.
    """

    def start(self, config: Mapping[str, Any] | None) -> None:
        self._known: set[str] = set()
        self._charts: dict[str, list[str]] = {}
        if config is not None:
            name, number = self.run.name, 1
            parent = self.settings.logging_dir / self.run.project
            while (parent / self.run.name).exists():  # TensorBoard would merge two runs' curves
                number += 1
                self.run.name = f"{name}-{number}"
            self.run.id = self.run.name
        super().start(config)

    def log(
        self, values: Mapping[str, Any], place: Place, tags: Mapping[str, str] | None = None
    ) -> None:
        known = tags or {}
        tagged = {known.get(name) or tag_of(name): value for name, value in values.items()}
        super().log(tagged, place, tags)
        new = numbers_in(tagged).keys() - self._known
        if new:
            self._known |= new
            charts = shared_charts(self._known)
            if charts != self._charts:
                self._charts = charts
                layout = {name: ["Multiline", of_chart] for name, of_chart in charts.items()}
                self.tracker.writer.add_custom_scalars({"train and eval": layout})

    def finish(self, status: Status) -> None:
        if status == "finished":
            from torch.utils.tensorboard.summary import hparams

            _, _, session_end = hparams({}, {})
            self.tracker.writer.file_writer.add_summary(session_end)
        super().finish(status)

    def _arguments(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        folder = self.settings.logging_dir / self.run.project
        return {"run_name": self.run.name, "logging_dir": str(folder)}

    def _describe(self, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        writer = self.tracker.writer
        # Without the experiment's own summary, TensorBoard shows the columns of all runs, and the
        # last value of each of their metrics. accelerate would write to a second run, named after
        # the time.
        _, session, _ = hparams(hyperparameters(config), {})
        writer.file_writer.add_summary(session)
        rows = "".join(f"| {name} | {value} |\n" for name, value in flatten(config).items())
        writer.add_text("config", f"| setting | value |\n|---|---|\n{rows}", 0)
        if self.settings.tags:
            writer.add_text("tags", ", ".join(self.settings.tags), 0)

    def log_images(self, name: str, images: Sequence[NDArray[Any]], update: int) -> None:
        import numpy as np

        self.tracker.log_images({name: np.stack(images)}, step=update, dataformats="NHWC")


class WandB(TrackerService):
    """Weights & Biases; the metric ``update`` is the x-axis, so that rows may come in any order."""

    mode_variable = "WANDB_MODE"

    def start(self, config: Mapping[str, Any] | None) -> None:
        super().start(config)
        self.tracker.run.define_metric("update")
        self.tracker.run.define_metric("*", step_metric="update")

    def _arguments(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "run_name": self.run.project,
            "name": self.run.name,
            "id": self.run.id,
            "resume": "allow",
            "dir": self._folder,
            "tags": self.settings.tags,
            **({"config": _columns(config)} if config is not None else {}),
            **self._mode(mode=("offline", "online")),
        }

    def _describe(self, config: Mapping[str, Any]) -> None:
        """Nothing: the config is passed at the start; some accelerate versions would resend it."""

    def _log_numbers(self, numbers: dict[str, float], update: int) -> None:
        self.tracker.log({"update": update, **numbers})

    def log_images(self, name: str, images: Sequence[NDArray[Any]], update: int) -> None:
        import wandb

        self.tracker.log({"update": update, name: [wandb.Image(image) for image in images]})

    def finish(self, status: Status) -> None:
        self.tracker.run.finish(exit_code={"finished": 0, "failed": 1, "killed": 130}[status])


class MLflow(TrackerService):
    """MLflow, with a local database or the server that MLflow itself is set to.

    The database is ``LOGGING_DIR/mlflow/mlflow.db``. It is a folder of files instead if it was one
    already, or if the package that MLflow needs for databases is missing, as with mlflow-skinny.
    """

    def start(self, config: Mapping[str, Any] | None) -> None:
        import mlflow

        self._variables: dict[str, str | None] = {}
        self._is_local = self.settings.offline or (
            self.settings.offline is None and not mlflow.is_tracking_uri_set()
        )
        if self._is_local:
            self._set("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI"))
            if self._has_files:
                # Newer versions refuse them unless this variable allows it.
                allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "true")
                self._set("MLFLOW_ALLOW_FILE_STORE", allowed)
            self._uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
            mlflow.set_tracking_uri(self._local_uri)
        try:
            super().start(config)
        except BaseException:
            self._restore()
            raise
        self.run.id = self.tracker.tracker.info.run_id

    def _arguments(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        if config is None:
            return {"experiment_name": self.run.project, "run_id": self.run.id}
        tags = dict.fromkeys(self.settings.tags, "true")
        has_database = self._is_local and not self._has_files
        artifacts = self._local_folder / "artifacts" / self.run.project
        return {
            "experiment_name": self.run.project,
            "run_name": self.run.name,
            **({"tags": tags} if tags else {}),
            **({"logging_dir": artifacts.as_uri()} if has_database else {}),
        }

    @property
    def _local_folder(self) -> Path:
        return self.settings.logging_dir.resolve() / "mlflow"

    @cached_property
    def _has_files(self) -> bool:
        is_there = next(self._local_folder.glob("*/meta.yaml"), None) is not None
        return is_there or not (find_spec("sqlalchemy") and find_spec("alembic"))

    @property
    def _local_uri(self) -> str | Path:
        if self._has_files:
            return self._local_folder
        self._local_folder.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{(self._local_folder / 'mlflow.db').as_posix()}"

    def _describe(self, config: Mapping[str, Any]) -> None:
        import mlflow

        values = {_mlflow_name(k): v for k, v in hyperparameters(config).items()}
        self.tracker.store_init_configuration(values)
        if config:
            mlflow.log_dict(json.loads(json.dumps(config, default=str)), "description.json")

    def _log_numbers(self, numbers: dict[str, float], update: int) -> None:
        self.tracker.log({_mlflow_name(k): v for k, v in numbers.items()}, step=update)

    def log_images(self, name: str, images: Sequence[NDArray[Any]], update: int) -> None:
        import mlflow

        for number, image in enumerate(images):
            which = f"-{number}" if len(images) > 1 else ""
            file = f"images/{_mlflow_name(name)}-{update:06d}{which}.png"
            mlflow.log_image(image, file)

    def finish(self, status: Status) -> None:
        import mlflow

        try:
            mlflow.end_run(status=status.upper())
        finally:
            self._restore()

    def _set(self, variable: str, value: str | None) -> None:
        self._variables[variable] = os.environ.get(variable)
        if value is not None:
            os.environ[variable] = value

    def _restore(self) -> None:
        """Restore MLflow's own settings."""
        if not self._is_local:
            return
        import mlflow

        mlflow.set_tracking_uri(self._uri)  # type: ignore[arg-type] # None is its initial value
        for variable, value in self._variables.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value


class Comet(TrackerService):
    """Comet."""

    mode_variable = "COMET_START_ONLINE"

    def _arguments(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        import comet_ml

        return {
            "run_name": self.run.project,
            "experiment_key": self.run.id,
            "mode": "create" if config is not None else "get",
            **self._mode(online=(False, True)),
            "experiment_config": comet_ml.ExperimentConfig(
                name=self.run.name, tags=self.settings.tags, offline_directory=self._folder
            ),
        }

    def log_images(self, name: str, images: Sequence[NDArray[Any]], update: int) -> None:
        for image in images:
            self.tracker.writer.log_image(image, name=name, step=update)

    def finish(self, status: Status) -> None:
        self.tracker.writer.log_other("status", status)
        self.tracker.finish()


class Aim(TrackerService):
    """Aim, with a repository in the logging folder."""

    def start(self, config: Mapping[str, Any] | None) -> None:
        super().start(config)
        self.run.id = self.tracker.writer.hash
        if config is not None:
            for tag in self.settings.tags:
                self.tracker.writer.add_tag(tag)

    def _arguments(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        known = {"run_hash": self.run.id} if config is None else {}
        arguments = {"experiment": self.run.project, "logging_dir": self._folder}
        return {"run_name": self.run.name, **arguments, **known}

    def log_images(self, name: str, images: Sequence[NDArray[Any]], update: int) -> None:
        for image in images:
            self.tracker.log_images({name: image}, step=update)


class SwanLab(TrackerService):
    """SwanLab."""

    mode_variable = "SWANLAB_MODE"

    def _arguments(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "run_name": self.run.project,
            "experiment_name": self.run.name,
            "id": self.run.id[:21],  # the length that SwanLab requires
            "resume": "allow",
            "logdir": self._folder,
            "tags": self.settings.tags,
            **self._mode(mode=("offline", "cloud")),
        }

    def finish(self, status: Status) -> None:
        state = {"finished": "success", "failed": "crashed", "killed": "aborted"}[status]
        self.tracker.run.finish(state=state, error=None if status == "finished" else status)


class Trackio(TrackerService):
    """Trackio, which stores projects on this machine and identifies runs by name."""

    def _arguments(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        # The name alone might be taken, and Trackio would append to that run.
        return {
            "run_name": self.run.project,
            "name": f"{self.run.name}-{self.run.id[:6]}",
            "resume": "allow",
            **({"config": _columns(config)} if config is not None else {}),
        }

    def _describe(self, config: Mapping[str, Any]) -> None:
        """Nothing: the config is passed at the start."""

    def _log_numbers(self, numbers: dict[str, float], update: int) -> None:
        # The tracker in the oldest supported accelerate drops the step.
        self.tracker.run.log(numbers, step=update)

    def log_images(self, name: str, images: Sequence[NDArray[Any]], update: int) -> None:
        import trackio

        self.tracker.run.log({name: [trackio.Image(image) for image in images]}, step=update)


TRACKERS: Mapping[str, type[TrackerService]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "comet_ml": Comet,
    "aim": Aim,
    "swanlab": SwanLab,
    "trackio": Trackio,
}


def _columns(config: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters, followed by the whole description of the run under one name."""
    described = flatten({"description": config}) if config else {}
    return {**hyperparameters(config), **described}


def _mlflow_name(name: str) -> str:
    """Replace the characters that MLflow doesn't allow in names."""
    return re.sub(r"[^\w\-./ ]", "_", name)
