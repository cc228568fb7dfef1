"""Nothing in a state or in settings is executed: forgeries are refused, under an audit hook.

Each payload is loaded in a new process, which reports every event that could mean that
something was run. The states are forged by someone who knows how to hash.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pa_core import Trainer
from pa_core.checkpoint import storage
from pa_core.checkpoint.restore import TrainingState
from pa_core.checkpoint.storage import newest_intact_state
from pa_core.errors import CheckpointError, PaCoreError, TrainingStateError
from pa_core.settings.build import build_plugins
from pa_core.settings.table import read_settings
from tests.fake_plugins import site_in
from tests.faults.tiny_states import folder_in_memory, make_states, train, trainer_with_states

DANGEROUS = (
    *("exec", "compile", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork"),
    *("subprocess.Popen", "socket.", "ctypes.", "shutil.", "webbrowser.", "marshal.", "code."),
    *("builtins.input", "cpython.run_", "import", "os.startfile", "urllib."),
)
MOST_SECONDS, MOST_MEMORY = 10, 512 * 2**20


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def in_a_guarded_child(load: Callable[[], object]) -> dict[str, Any]:
    """Call `load` in a fork of this process; return its exception and the dangerous events."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads
        child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            signal.alarm(MOST_SECONDS)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, used + MOST_MEMORY))
            events: list[str] = []

            def note(event: str, arguments: tuple[Any, ...]) -> None:
                if event.startswith(DANGEROUS):
                    events.append(f"{event}{arguments!r:.200}")

            sys.addaudithook(note)
            error = None
            try:
                load()
            except BaseException as caught:  # noqa: BLE001 - to be returned
                error = [type(caught).__name__, str(caught), isinstance(caught, PaCoreError)]
            seen = list(events)
            os.write(writer, json.dumps({"error": error, "events": seen}).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def good():
    with folder_in_memory() as memory:
        state = make_states(memory / "states")[0]
        TrainingState(state, 0)  # so that everything loading needs is imported
        yield state


@pytest.fixture
def forged(good, tmp_path):
    state = tmp_path / "state"
    shutil.copytree(good, state)
    return state


def hash_again(state: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None):
    """Rewrite the manifest to match the files, after a change of the manifest."""
    manifest = json.loads((state / "manifest.json").read_bytes())
    for name in manifest["files"]:
        content = (state / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"size": len(content), "sha256": digest}
    change(manifest)
    write_manifest(state, manifest)


def write_manifest(state: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("sha256", None)
    manifest["sha256"] = hashlib.sha256(storage.json_bytes(manifest)).hexdigest()
    (state / "manifest.json").write_bytes(storage.json_bytes(manifest))


def assert_refused(state: Path, load: Callable[[], object] | None = None) -> None:
    started = time.monotonic()
    found = in_a_guarded_child(load or (lambda: TrainingState(state, 0)))
    assert found["events"] == []
    assert found["error"] is not None, "it was loaded"
    assert found["error"][0] == "TrainingStateError", found["error"]
    assert time.monotonic() - started < MOST_SECONDS


def test_the_guard_notices_what_is_executed(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "canary"))
    found = in_a_guarded_child(lambda: pickle.loads(bomb))  # noqa: S301 - that is the point
    assert [event.partition("(")[0] for event in found["events"]] == [
        *("pickle.find_class", "os.system"),
    ]
    assert (tmp_path / "canary").exists()
    for code in ("import this", "eval('1')", "__import__('antigravity')"):
        assert in_a_guarded_child(lambda code=code: exec(code))["events"]  # noqa: S102


def test_a_good_state_is_loaded_and_executes_nothing(good):
    assert in_a_guarded_child(lambda: TrainingState(good, 0)) == {"error": None, "events": []}


def torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


FILES = [
    *("model.safetensors", "state.safetensors", "process-00000.safetensors"),
    *("state.json", "process-00000.json", "manifest.json"),
]


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_instead_of_a_file_is_refused(forged, tmp_path, name):
    canary = tmp_path / "canary"
    for payload in (
        pickle.dumps(Bomb(canary)),
        pickle.dumps(Bomb(canary), protocol=0),
        torch_file({"weight": Bomb(canary)}),
        torch_file({"weight": torch.zeros(2)}),
    ):
        (forged / name).write_bytes(payload)
        if name != "manifest.json":
            hash_again(forged)
        assert_refused(forged)
        assert not canary.exists()


def header(text: bytes, *, length: int | None = None, data: bytes = b"") -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: str, start: int, end: int, dtype: str = "F32") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}'


SAFETENSORS = {
    "a header of 2^63 bytes": header(b"{}", length=2**63),
    "a header of 100 MB that isn't there": header(b"{}", length=100 * 2**20),
    "no header": b"",
    "half a length": b"\x08\0",
    "a header that is no JSON": header(b"pickle me"),
    "a header that is no UTF-8": header(b'{"\xff":1}'),
    "a deep header": header(b'{"a":' + b"[" * 100_000),
    "a shape that overflows": header(
        f'{{"a":{entry("[4294967296,4294967296,4]", 0, 16)}}}'.encode(), data=bytes(16)
    ),
    "a negative shape": header(f'{{"a":{entry("[-1]", 0, 4)}}}'.encode(), data=bytes(4)),
    "a huge number": header(f'{{"a":{entry("[1e400]", 0, 4)}}}'.encode(), data=bytes(4)),
    "tensors that overlap": header(
        f'{{"a":{entry("[2]", 0, 8)},"b":{entry("[2]", 4, 12)}}}'.encode(), data=bytes(12)
    ),
    "a hole": header(
        f'{{"a":{entry("[1]", 0, 4)},"b":{entry("[1]", 8, 12)}}}'.encode(), data=bytes(12)
    ),
    "data beyond the end": header(f'{{"a":{entry("[9]", 0, 36)}}}'.encode(), data=bytes(4)),
    "an unknown type": header(f'{{"a":{entry("[1]", 0, 4, "OBJ")}}}'.encode(), data=bytes(4)),
    "a tensor twice": header(
        f'{{"a":{entry("[1]", 0, 4)},"a":{entry("[1]", 0, 4)}}}'.encode(), data=bytes(4)
    ),
}
TENSOR_FILES = ["state.safetensors", "process-00000.safetensors"]


@pytest.mark.parametrize("payload", SAFETENSORS)
def test_a_forged_file_of_tensors_is_refused(forged, payload):
    for name in TENSOR_FILES:
        (forged / name).write_bytes(SAFETENSORS[payload])
        hash_again(forged)
        assert_refused(forged)


JSONS = {
    "deep lists": b"[" * 1_000_000,
    "deep and closed": b'{"position":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "1e400": b'{"position": 1e400}',
    "NaN": b'{"position": NaN}',
    "a number of a million digits": b'{"position": ' + b"9" * 1_000_000 + b"}",
    "a key twice": b'{"position": 1, "position": 2}',
    "no UTF-8": b'{"position": "\xff\xfe\xfa"}',
    "nothing": b"",
    "a list": b"[]",
    "Python": b"__import__('os').system('true')",
    "a yaml tag": b"!!python/object/apply:os.system ['true']",
    "tensors that aren't there": b'{"position": {"$tensor": "../../etc/passwd"}}',
    "keys that can't be": b'{"optimizer": {"$items": [[{}, 1]]}}',
}


@pytest.mark.parametrize("payload", JSONS)
def test_a_forged_file_of_json_is_refused(forged, payload):
    for name in ("state.json", "process-00000.json"):
        shutil.copy(forged / name, forged.parent / name)
        (forged / name).write_bytes(JSONS[payload])
        hash_again(forged)
        assert_refused(forged)
        shutil.copy(forged.parent / name, forged / name)
    (forged / "manifest.json").write_bytes(JSONS[payload])
    assert_refused(forged)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../secret",
            "/etc/hostname",
            "words/../../secret",
            "words/./list.txt",
            "words//list.txt",
        ),
        *("", ".", "..", "a\0b", "..\\secret", "manifest.json", "words/list.txt/", "C:\\secret"),
    ],
)
def test_a_manifest_that_points_outside_is_refused(forged, name):
    (forged.parent / "secret").write_bytes(b"secret")
    digest = hashlib.sha256(b"secret").hexdigest()

    def change(manifest):
        manifest["files"][name] = {"size": 6, "sha256": digest}

    hash_again(forged, change)
    assert_refused(forged)
    with pytest.raises(TrainingStateError, match="not a path inside the state"):
        storage.read_manifest(forged)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.update(files={"state.json": "os.system"}),
        lambda manifest: manifest["files"]["state.json"].update(size=True),
        lambda manifest: manifest["files"]["state.json"].update(size=-1),
        lambda manifest: manifest["files"]["state.json"].update(size=10**4000),
        lambda manifest: manifest["files"]["state.json"].update(path="/etc/passwd"),
        lambda manifest: manifest["files"]["state.json"].pop("sha256"),
        lambda manifest: manifest.update(format=2),
        lambda manifest: manifest.update(format="__import__('os')"),
        lambda manifest: manifest.update(run=[]),
        lambda manifest: manifest.update(plugins="checkpoint"),
        lambda manifest: manifest["plugins"].update(checkpoint=["settings"]),
        lambda manifest: manifest["plugins"].update(checkpoint={"settings": {}}),
        lambda manifest: manifest["run"].update(num_processes=10**9),
        lambda manifest: manifest["run"].update(num_processes="1"),
        lambda manifest: manifest.update(padding="x" * (17 * 2**20)),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(forged, change):
    hash_again(forged, change)
    assert_refused(forged)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_only_regular_files_are_opened(forged, make, name):
    (forged / name).unlink()
    make(forged / name)
    assert_refused(forged)
    assert_refused(forged, lambda: newest_intact_state(forged.parent))


def test_names_in_a_state_are_never_imported_or_called(forged, tmp_path, monkeypatch):
    with site_in(tmp_path / "site", monkeypatch) as site:
        site.module("pa_evil", f"open({str(tmp_path / 'canary')!r}, 'w')")
        site.install("pa-evil", evil="pa_evil:Plugin")
        text = (forged / "process-00000.json").read_text()
        for name in ("evil", "pa_evil:Plugin", "pa_evil.py", "os.system", "__class__"):
            process = json.loads(text)
            process["plugins"][name] = {"class": "pa_evil.Plugin", "func": "os.system"}
            process["plugins"]["Writes"] = {"words": ["$callable", "pa_evil:Plugin"]}
            (forged / "process-00000.json").write_text(json.dumps(process))
            hash_again(
                forged,
                lambda manifest, name=name: manifest["plugins"].update(
                    {name: manifest["plugins"]["Writes"] | {"target": "pa_evil:Plugin"}}
                ),
            )

            def load() -> None:
                trainer = trainer_with_states(tmp_path / "new")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    trainer.load_training_state(forged)

            found = in_a_guarded_child(load)
            assert found == {"error": None, "events": []}
    assert not (tmp_path / "canary").exists()


def test_a_checkpoint_file_is_never_unpickled(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"model_state_dict": Bomb(canary)}, tmp_path / "model.pt")
    trainer = trainer_with_states(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"model\.pt isn't a checkpoint file"):
        trainer.load_checkpoint(tmp_path / "model.pt")
    assert not canary.exists()


SETTINGS = {
    "a module's function": 'plugins = ["os:system"]',
    "a dotted name": 'plugins = ["os.system"]',
    "an expression": "plugins = [\"__import__('os').system('true')\"]",
    "an installed module that is no plugin": 'plugins = ["pa_evil"]',
    "an installed plugin's target": 'plugins = ["pa_evil:Plugin"]',
    "a table of what isn't enabled": "[tool.pa-core.evil]\nx = 1",
    "a file that isn't listed": 'plugins = ["evil"]\n[tool.pa-core."evil.py"]\nx = 1',
    "an expression as a value": 'plugins = ["early_stopping"]\n[tool.pa-core.early_stopping]\n'
    "early_stopping_patience = \"__import__('os').system('true')\"",
    "an expression as a duration": 'plugins = ["checkpoint"]\n[tool.pa-core.checkpoint]\n'
    "every = \"eval('1') epochs\"",
    "no TOML": "plugins = [open('canary', 'w')]",
}


@pytest.mark.parametrize("text", SETTINGS)
def test_settings_cannot_run_code(tmp_path, monkeypatch, text):
    canary = tmp_path / "canary"
    with site_in(tmp_path / "site", monkeypatch) as site:
        site.module("pa_evil", f"open({str(canary)!r}, 'w')")
        site.install("pa-other", other="pa_evil:Plugin")
        (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
        file = tmp_path / "pyproject.toml"
        file.write_text("[tool.pa-core]\n" + SETTINGS[text])
        with pytest.raises(PaCoreError):
            build_plugins(read_settings(file))
        assert "pa_evil" not in sys.modules
    assert not canary.exists()


def test_what_is_installed_and_not_enabled_is_not_imported_by_a_run(tmp_path, monkeypatch):
    with site_in(tmp_path / "site", monkeypatch) as site:
        site.module("pa_idle", f"open({str(tmp_path / 'canary')!r}, 'w')")
        site.install("pa-idle", idle="pa_idle:Plugin")
        site.module(
            "pa_used",
            """
            from pa_core import TrainerCallback

            class Plugin(TrainerCallback):
                def on_init_end(self, trainer):
                    pass
            """,
        )
        site.install("pa-used", used="pa_used:Plugin")
        file = tmp_path / "pyproject.toml"
        file.write_text("[tool.pa-core]\nplugins = ['used']\ndisable = ['progress_bar']\n")
        model = torch.nn.Linear(6, 3)
        trainer = Trainer(
            model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters()), settings=file
        )
        train(trainer, 2)
        assert "pa_used" in sys.modules
        assert "pa_idle" not in sys.modules
    assert not (tmp_path / "canary").exists()
