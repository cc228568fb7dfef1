"""The plugin's table in the settings, and the package that each service needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pa_core.plugin import LocalPath, UpdateDuration, check_file_name, mask_secrets

if TYPE_CHECKING:
    from pa_core.durations import Duration

Topic = Literal["learning_rates", "gradient_norm", "throughput", "memory", "config"]
ServiceName = Literal[
    "csv", "jsonl", "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "swanlab", "trackio"
]


class TrackingSettings(BaseModel):
    """The table ``[tool.pa-core.tracking]``."""

    model_config = ConfigDict(extra="forbid")

    service: ServiceName = Field("csv", description="The tracking service or file format.")
    project: str = Field(
        "pa-core", min_length=1, description="The project (or experiment) that groups runs."
    )
    run_name: str | None = Field(
        None, min_length=1, description="The run's name; by default the time at which it starts."
    )
    logging_dir: LocalPath = Field(
        Path("runs"), description="The folder for everything written on this machine."
    )
    every: UpdateDuration | None = Field(
        None,
        description="Also send within epochs: a number of updates, or a duration such as "
        '"1 minute".',
    )
    log: list[Topic] = Field(
        ["learning_rates", "gradient_norm", "throughput", "memory", "config"],
        description="What to send in addition to the run history's metrics.",
    )
    tags: list[str] = Field([], description="Tags of the run.")
    offline: bool | None = Field(
        None,
        description="Whether to keep the run on this machine. By default true, unless the "
        "service's own environment variable is set.",
    )
    options: dict[str, Any] = Field(
        {}, description="More arguments for starting the service, such as `entity` of W&B."
    )
    on_error: Literal["warn", "stop"] = Field(
        "warn", description="What an error of the service does: warn once, or stop the run."
    )

    @field_validator("project", "run_name")
    @classmethod
    def _names_are_no_paths(cls, value: str | None) -> str | None:
        return None if value is None else check_file_name(value)

    @field_validator("options")
    @classmethod
    def _secrets_stay_out(cls, value: dict[str, Any]) -> dict[str, Any]:
        masked = mask_secrets(value)
        secrets = [name for name in value if masked[name] != value[name]]
        if secrets:
            raise ValueError(
                f"{', '.join(secrets)}: secrets don't belong in settings. Set the environment "
                "variable that the service reads, such as WANDB_API_KEY"
            )
        return value


class TrackingOptions(TypedDict, total=False):
    """The options of `TrackingPlugin`: the keys of its table, for type checkers."""

    service: ServiceName
    project: str
    run_name: str | None
    logging_dir: str | Path
    every: int | str | Duration | None
    log: Sequence[Topic]
    tags: Sequence[str]
    offline: bool | None
    options: Mapping[str, Any]
    on_error: Literal["warn", "stop"]


PACKAGES: Mapping[str, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "aim": ("aim", "aim"),
    "swanlab": ("swanlab", "swanlab"),
    "trackio": ("trackio", "trackio"),
}
"""By service: the module to import and the package that provides it."""


def check_package(service: str) -> None:
    """Check that the service's package is installed.

    Raises:
        ImportError: if it isn't, with the command that installs it.
    """
    if service not in PACKAGES:
        return
    module, package = PACKAGES[service]
    if find_spec(module) is None:
        raise ImportError(
            f"The tracking service {service!r} needs the package {package}: pip install {package}"
        )
