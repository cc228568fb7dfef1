"""The conformance suite, and tests of ``webhook``."""

import json
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pa_core import Trainer, hookimpl
from pa_core.testing import PluginConformance, tiny_data, tiny_model

from pa_webhook import WebhookPlugin

RunTiny = Callable[..., Any]


@dataclass
class Channel:
    """The URL that a test posts to, and the messages that arrived."""

    address: str
    folder: Path
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def url(self, kind: str = "ok") -> str:
        return f"{self.address}/{kind}/{self.name}"

    @property
    def posts(self) -> list[dict[str, Any]]:
        file = self.folder / self.name
        lines = file.read_text().splitlines() if file.exists() else []
        assert all(line.startswith("application/json ") for line in lines)
        return [json.loads(line.partition(" ")[2]) for line in lines]

    @property
    def texts(self) -> list[str]:
        return [post["text"] for post in self.posts]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("posts")
    script = Path(__file__).with_name("server.py")
    command = [sys.executable, str(script), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}", folder
        process.kill()


@pytest.fixture
def channel(server: tuple[str, Path]) -> Channel:
    return Channel(*server)


def webhook(channel: Channel, kind: str = "ok", **settings: Any) -> WebhookPlugin:
    return WebhookPlugin(WebhookPlugin.Settings(url=channel.url(kind), **settings))


class TestWebhookPlugin(PluginConformance):
    plugin = WebhookPlugin

    @pytest.fixture(autouse=True)
    def posts_to_a_server(self, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PA_WEBHOOK_URL", channel.url())
        self.channel = channel

    def test_works_on_two_processes(self) -> None:
        super().test_works_on_two_processes()
        starts = [text for text in self.channel.texts if "started" in text]
        assert starts == [
            "Training: started: Sequential, 2 epochs, 2 x cpu",  # by one of the two processes
            "Training: started: Sequential, 2 epochs, 1 x cpu",
        ]


def test_it_posts_the_start_every_second_epoch_and_the_end(
    channel: Channel, run_tiny: RunTiny
) -> None:
    run_tiny(webhook(channel, every=2, run_name="Run 7"), epochs=4)
    start, second, fourth, end = channel.texts
    assert start == "Run 7: started: Sequential, 4 epochs, 1 x cpu"
    assert second.startswith("Run 7: epoch 2: train_loss_epoch 0.")
    assert fourth.startswith("Run 7: epoch 4: train_loss_epoch 0.")
    assert ", eval_loss_epoch 0." in fourth
    assert end.startswith("Run 7: finished after 24 updates: train_loss_epoch 0.")


def test_a_resumed_run_says_so(channel: Channel, run_tiny: RunTiny) -> None:
    run_tiny(epochs=1).save_training_state("state")
    run_tiny(webhook(channel), epochs=2, resume_from="state")
    assert channel.texts[0].startswith("Training: resumed at update 6: Sequential")


def test_the_key_and_the_maximum_length(channel: Channel, run_tiny: RunTiny) -> None:
    run_tiny(webhook(channel, text_key="content", run_name="x" * 3000), epochs=1)
    assert [set(post) for post in channel.posts] == [{"content"}] * 3
    assert [len(post["content"]) for post in channel.posts] == [2000] * 3


class Ends:
    """Ends a run in its second epoch, by a request or an exception."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    @hookimpl
    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.updates == 8 and self.error is not None:
            raise self.error
        if trainer.updates == 8:
            trainer.control.stop("enough")


def test_the_reason_of_an_early_stop_is_posted(channel: Channel, run_tiny: RunTiny) -> None:
    run_tiny(webhook(channel), Ends())
    assert channel.texts[-1].startswith("Training: stopped (enough) after 8 updates: train_loss")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no luck"), "Training: failed at update 8: ValueError: no luck"),
        (KeyboardInterrupt(), "Training: interrupted at update 8"),
    ],
)
def test_a_failure_is_posted_and_propagates(
    channel: Channel, run_tiny: RunTiny, error: BaseException, text: str
) -> None:
    with pytest.raises(type(error)):
        run_tiny(webhook(channel), Ends(error))
    assert [text.split(":")[1].strip() for text in channel.texts[:2]] == ["started", "epoch 1"]
    assert channel.texts[2:] == [text]


class FullDisk:
    """Requests a training state that can't be written."""

    @hookimpl
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        trainer.control.save("states/epoch", must=False, everywhere=True)

    @hookimpl
    def on_save_training_state(self) -> None:
        raise OSError("no space left")


def test_a_training_state_that_is_not_saved_is_posted(channel: Channel, run_tiny: RunTiny) -> None:
    with pytest.warns(UserWarning, match="No training state was saved"):
        run_tiny(webhook(channel), FullDisk(), epochs=1)
    assert channel.texts[1] == "Training: epoch was not saved at update 6: OSError: no space left"


# -- Servers that are slow, unavailable or wrong --------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "why", "arrived"),
    [
        ("fail", "the server responded 500 Internal Server Error", 4),
        ("moved", "the server responded 302 Found", 4),
        ("slow", "no response within 0.2 s|timed out", 1),
    ],
)
def test_a_failing_server_is_one_warning_and_the_run_is_unchanged(
    channel: Channel, run_tiny: RunTiny, kind: str, why: str, arrived: int
) -> None:
    with pytest.warns(UserWarning, match="lost . messages; the last error was: ") as caught:
        trainer = run_tiny(webhook(channel, kind, timeout=0.2 if kind == "slow" else 5.0))
    assert trainer.updates == 12
    (warning,) = caught
    assert any(part in str(warning.message) for part in why.split("|"))
    assert len(channel.posts) >= arrived
    assert channel.name not in str(warning.message)


def test_an_unavailable_server_is_one_warning_per_run(run_tiny: RunTiny) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # without listening
        port = taken.getsockname()[1]
        plugin = WebhookPlugin(WebhookPlugin.Settings(url=f"http://127.0.0.1:{port}/hush"))
        with pytest.warns(UserWarning, match="refused") as caught:
            run_tiny(plugin)
            run_tiny(plugin)
    assert len(caught) == 2
    assert not any("hush" in str(warning.message) for warning in caught)


# -- The URL, which is a secret -------------------------------------------------------------------


def test_settings_override_the_variable_and_a_missing_url_is_a_warning(
    channel: Channel, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = WebhookPlugin(WebhookPlugin.Settings(url_variable="HOOK"))
    with pytest.warns(UserWarning, match="environment variable HOOK"):
        run_tiny(plugin)
    monkeypatch.setenv("HOOK", "hooks.example.com/hush")
    with pytest.warns(UserWarning, match="HOOK must be a URL that begins") as caught:
        run_tiny(plugin)
    assert "hush" not in str(caught[0].message)
    monkeypatch.setenv("HOOK", channel.url())
    run_tiny(plugin)
    assert len(channel.posts) == 4
    monkeypatch.setenv("HOOK", "http://127.0.0.1:9/hush")
    run_tiny(webhook(channel, url_variable="HOOK"))
    assert len(channel.posts) == 8


def test_the_url_is_in_no_training_state_and_no_output(
    channel: Channel, isolated_settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    isolated_settings.write_text(
        f'[tool.pa-core]\nplugins = ["webhook"]\n[tool.pa-core.webhook]\nurl = "{channel.url()}"\n'
    )
    trainer = Trainer(tiny_model(), torch.nn.CrossEntropyLoss(), torch.optim.SGD, callbacks=())
    trainer.train(tiny_data(8), 1)
    trainer.save_training_state("state")
    print(trainer.explain(), trainer, vars(trainer.plugins.by_name["webhook"]))
    printed, state = capsys.readouterr().out, [*map(_content, Path("state").iterdir())]
    assert len(channel.posts) == 3
    assert " 1. webhook " in printed
    assert any("**********" in text for text in state)
    assert not any(channel.name in text for text in (printed, *state))


def test_the_error_of_a_wrong_url_does_not_show_it(isolated_settings: Path) -> None:
    isolated_settings.write_text(
        '[tool.pa-core]\nplugins = ["webhook"]\n[tool.pa-core.webhook]\nurl = "ftp://hush"\n'
    )
    with pytest.raises(ValueError, match="url: expected a URL that begins") as caught:
        Trainer(tiny_model(), None, None, callbacks=())
    assert "hush" not in str(caught.value)


def _content(file: Path) -> str:
    return file.read_text(errors="replace")
