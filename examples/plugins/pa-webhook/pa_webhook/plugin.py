"""The plugin ``webhook``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pa_core import hookimpl
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from pa_webhook.sender import Sender

if TYPE_CHECKING:
    from pa_core import Trainer

MAX_CHARACTERS = 2000  # Discord's limit


class WebhookPlugin:
    """Posts to a webhook when a run starts, ends or fails, and every few epochs.

    The main process posts from a background thread. A slow or unavailable server never slows down
    or ends the run: there is one warning, with the next message or at the end of the run.

    Args:
        settings: the plugin's table.
    """

    runs_on = "main"
    changes_training = False

    class Settings(BaseModel):
        """The table ``[tool.pa-core.webhook]``."""

        model_config = ConfigDict(extra="forbid")

        url: SecretStr | None = Field(
            None, description="The URL to post to; by default the value of `url_variable`."
        )
        url_variable: str = Field(
            "PA_WEBHOOK_URL", min_length=1, description="The environment variable with the URL."
        )
        every: int = Field(1, ge=1, description="The number of epochs between messages.")
        run_name: str = Field("Training", min_length=1, description="The run's name in messages.")
        text_key: str = Field(
            "text",
            min_length=1,
            description='The key of the text in the JSON; "content" for Discord.',
        )
        timeout: float = Field(
            5.0,
            gt=0,
            description="Seconds to wait for a response, and for remaining messages at the end of "
            "a run.",
        )

        @field_validator("url")
        @classmethod
        def _url_is_one(cls, value: SecretStr | None) -> SecretStr | None:
            if value is not None and not is_url(value.get_secret_value()):
                raise ValueError("expected a URL that begins with https:// or http://")
            return value

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._sender: Sender | None = None
        self._has_warned = False

    # -- Runs -----------------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def run_training(self) -> Generator[None, Any, Any]:
        try:
            return (yield)
        finally:
            self._close()

    @hookimpl
    def on_training_run_start(self, trainer: Trainer) -> None:
        self._has_warned = False
        if self._url() is None:
            self._warn(
                f"posts nothing: set the environment variable {self.settings.url_variable} to its "
                "URL"
            )
        model, config = type(trainer.get_model()).__name__, trainer.run_config
        what = f"resumed at update {trainer.updates}" if trainer.updates else "started"
        length = f"{config.num_epochs} epochs" if config.num_epochs else "no fixed length"
        where = f"{config.num_processes} x {trainer.device.type}"
        self._post(f"{what}: {model}, {length}, {where}")

    @hookimpl(trylast=True)  # after other plugins have recorded their metrics
    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        epoch = trainer.run_history.current_epoch
        if epoch % self.settings.every == 0:
            self._post(f"epoch {epoch}: {_metrics(trainer)}")

    @hookimpl(trylast=True)
    def on_training_run_end(self, trainer: Trainer) -> None:
        reason = trainer.stop_reason
        what = "finished" if reason is None else f"stopped ({reason})"
        self._post(f"{what} after {trainer.updates} updates: {_metrics(trainer)}")

    # -- Errors ---------------------------------------------------------------------------------

    @hookimpl
    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self._post(f"interrupted at update {trainer.updates}")
        else:
            self._post(f"failed at update {trainer.updates}: {_describe(exception)}")
        self._close()  # the run is over: `run_training` may be left already

    @hookimpl
    def on_save_training_state_error(
        self, trainer: Trainer, state_dir: Path, error: Exception
    ) -> None:
        self._post(
            f"{state_dir.name} was not saved at update {trainer.updates}: {_describe(error)}"
        )

    # -- Posting --------------------------------------------------------------------------------

    def _url(self) -> str | None:
        """The URL, if there is one; read when it is needed and not stored."""
        if self.settings.url is not None:
            return self.settings.url.get_secret_value()
        url = os.environ.get(self.settings.url_variable)
        if url and not is_url(url):
            self._warn(
                f"posts nothing: the environment variable {self.settings.url_variable} must be a "
                "URL that begins with https:// or http://"
            )
            return None
        return url or None

    def _post(self, text: str) -> None:
        if self._sender is None:
            url = self._url()
            if url is None:
                return
            self._sender = Sender(url, self.settings.timeout)
        text = f"{self.settings.run_name}: {text}"
        if len(text) > MAX_CHARACTERS:
            text = f"{text[: MAX_CHARACTERS - 1]}…"
        self._sender.post({self.settings.text_key: text})
        self._report_losses(self._sender)

    def _close(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()
            self._report_losses(sender)

    def _report_losses(self, sender: Sender) -> None:
        if sender.error is not None:
            self._warn(f"lost {sender.lost} messages; the last error was: {sender.error}")

    def _warn(self, what: str) -> None:
        """Warn once per run."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"The webhook {what}. Training continues", stacklevel=2)


def is_url(text: str) -> bool:
    """Whether a text is an HTTP or HTTPS URL.

    >>> is_url("https://hooks.example.com/T0/B0/x"), is_url("hooks.example.com"), is_url("file:///x")
    (True, False, False)
    """
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _metrics(trainer: Trainer) -> str:
    """The newest value of each metric that is a single number."""
    history = trainer.run_history
    values = {name: history.get_latest_metric(name) for name in history.get_metric_names()}
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()) or "no metrics"


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
