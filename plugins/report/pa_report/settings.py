"""The plugin's table in the settings."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pa_core.builtins.base import UpdateDuration


class ReportSettings(BaseModel):
    """The table ``[tool.pa-core.report]``."""

    model_config = ConfigDict(extra="forbid")

    folder: Path = Field(Path("reports"), description="The folder for reports.")
    name: str | None = Field(
        None,
        min_length=1,
        description="The file's name without `.html`, which a new run of that name replaces; "
        "by default the time at which the run starts.",
    )
    title: str | None = Field(
        None, min_length=1, description="The page's title; by default the file's name."
    )
    every: UpdateDuration | None = Field(
        None,
        description="Record the training loss within epochs too: a number of updates, or "
        '"1%", say.',
    )

    @field_validator("name")
    @classmethod
    def _is_no_path(cls, value: str | None) -> str | None:
        if value is not None and (set(value) & set('/\\:*?"<>|') or value in (".", "..")):
            raise ValueError(f"expected a name that can name a file, and got {value!r}")
        return value
