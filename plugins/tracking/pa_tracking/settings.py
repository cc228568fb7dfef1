"""The plugin's table in the settings, and what each service needs installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pa_core.builtins.base import UpdateDuration
from pa_core.settings.validation import is_secret

Topic = Literal["learning_rates", "gradient_norm", "throughput", "memory", "config"]
ServiceName = Literal[
    "csv", "jsonl", "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "swanlab", "trackio"
]


class TrackingSettings(BaseModel):
    """The table ``[tool.pa-core.tracking]``."""

    model_config = ConfigDict(extra="forbid")

    service: ServiceName = Field("csv", description="Where the run is sent, or the kind of file.")
    project: str = Field(
        "pa-core", min_length=1, description="The project, or experiment, that runs are kept in."
    )
    run_name: str | None = Field(
        None, min_length=1, description="The run's name; by default the time at which it starts."
    )
    logging_dir: Path = Field(
        Path("runs"), description="The folder for all that is written on this machine."
    )
    every: UpdateDuration | None = Field(
        None, description='Send within epochs too: a number of updates, or "1 minute", say.'
    )
    log: list[Topic] = Field(
        ["learning_rates", "gradient_norm", "throughput", "memory", "config"],
        description="What is sent beside the run history's metrics.",
    )
    tags: list[str] = Field([], description="Words to find the run by.")
    offline: bool | None = Field(
        None,
        description="Whether nothing leaves this machine; by default so, unless the service's own "
        "environment variable says otherwise.",
    )
    options: dict[str, Any] = Field(
        {}, description="More arguments of the service's own start, such as `entity` of W&B."
    )
    on_error: Literal["warn", "stop"] = Field(
        "warn", description="What follows an error of the service: one warning, or the run's end."
    )

    @field_validator("project", "run_name")
    @classmethod
    def _names_are_no_paths(cls, value: str | None) -> str | None:
        if value is not None and (set(value) & set('/\\:*?"<>|') or value in (".", "..")):
            raise ValueError(f"expected a name that can name a folder, and got {value!r}")
        return value

    @field_validator("options")
    @classmethod
    def _secrets_stay_out(cls, value: dict[str, Any]) -> dict[str, Any]:
        secrets = [name for name in value if is_secret(name)]
        if secrets:
            raise ValueError(
                f"{', '.join(secrets)}: keys don't belong into settings. Put them into the "
                "environment variable that the service reads, such as WANDB_API_KEY"
            )
        return value


PACKAGES: Mapping[str, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "aim": ("aim", "aim"),
    "swanlab": ("swanlab", "swanlab"),
    "trackio": ("trackio", "trackio"),
}
"""By service: the module to import, and the package that has it."""


def check_package(service: str) -> None:
    """See that the service's package is installed.

    Raises:
        ImportError: with the command that installs it.
    """
    if service not in PACKAGES:
        return
    module, package = PACKAGES[service]
    if find_spec(module) is None:
        raise ImportError(
            f"The tracking service {service!r} needs the package {package}: pip install {package}"
        )
