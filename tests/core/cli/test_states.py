"""`pa states` says what is in a folder of states, and removes what is too much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pa_core.checkpoint import atomic_io
from pa_core.checkpoint.storage import StateWriter
from tests.core.cli.test_app import Shell

ROOT = Path(__file__).parents[3]


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def write(folder: Path, name: str, update: int = 1) -> Path:
    with StateWriter(folder / name) as writer:
        writer.write_json("state.json", {"update": update})
        writer.write("model.safetensors", os.urandom(5000))
        writer.commit(
            {
                "saved_at": 1.7e9,
                "resume": "exact",
                "position": {"epoch": 2, "updates": update},
                "plugins": {"checkpoint": {}, "metrics": {}},
            }
        )
    return folder / name


@pytest.fixture
def folder(shell):
    folder = shell.folder / "states"
    for number in (1, 2, 3, 4):
        write(folder, f"update_{number:08d}", number)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_states_are_listed_newest_first_with_what_they_are(shell, folder):
    header, *rows = shell.out("states", "states").splitlines()
    assert header.split() == ["intact", "state", "epoch", "update", *header.split()[4:]]
    assert [row.split()[:4] for row in rows] == [
        ["yes", f"update_{number:08d}", "2", str(number)] for number in (4, 3, 2, 1)
    ]
    assert all("exact" in row and "checkpoint, metrics" in row and "days" in row for row in rows)
    found = json.loads(shell.out("states", "states/update_00000003", "--json"))
    (row,) = found["states"]
    assert row["size"] == sum(
        path.stat().st_size for path in (folder / "update_00000003").iterdir()
    )
    assert (row["epoch"], row["update"], row["intact"]) == (2, 3, True)


def test_a_manifest_of_anyone_controls_no_terminal(shell):
    with StateWriter(shell.folder / "states" / "sent") as writer:
        writer.write_json("state.json", {})
        position = {"epoch": ["\x1b[2J"], "updates": {}}
        plugins = {"\x1b]0;title\x07": 1, "[red]": 2}
        writer.commit({"resume": 5, "saved_at": "now", "position": position, "plugins": plugins})
    _, row = shell.out("states", "states").splitlines()
    assert row.split()[:4] == ["yes", "sent", "?", "?"]
    assert row.endswith(r"\x1b]0;title\x07, [red]")


def test_sizes_are_looked_at_and_every_byte_where_that_is_asked_for(shell, folder):
    (folder / "update_00000001" / "state.json").unlink()
    flip(folder / "update_00000002" / "model.safetensors")
    flip(folder / "update_00000004" / "manifest.json")
    rows = {
        row["name"]: row for row in json.loads(shell.out("states", "states", "--json"))["states"]
    }
    assert [row["intact"] for row in rows.values()] == [True, True, False, False]
    assert list(rows)[-1] == "update_00000004"  # nobody knows how old it is
    assert rows["update_00000004"]["epoch"] is None
    rows = {
        row["name"]: row
        for row in json.loads(shell.out("states", "states", "--json", "--verify"))["states"]
    }
    assert [name for name, row in rows.items() if row["intact"]] == ["update_00000003"]
    assert "model.safetensors is damaged" in rows["update_00000002"]["problems"][0]
    assert "state.json is missing" in shell.out("states", "states")


def test_the_exit_code_says_that_nothing_is_intact(shell):
    assert "Folder not found" in shell.error("states", "nowhere")
    folder = shell.folder / "states"
    folder.mkdir()
    assert "No state in states is intact" in shell.error("states", "states")
    (write(folder, "final") / "state.json").unlink()
    assert "No state in states is intact" in shell.error("states", "states")


def test_old_states_and_leftovers_are_removed_and_damaged_ones_do_not_count(shell, folder):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (folder / f".tmp-final-{atomic_io._HOST}-{gone.pid}-1-00000000").mkdir()
    (folder / "notes.txt").write_text("mine")
    flip(folder / "update_00000004" / "model.safetensors")
    shell.out("states", "states", "--prune", "--keep", "2", "--yes")
    assert names(folder) == [
        *("notes.txt", "update_00000002", "update_00000003", "update_00000004"),
    ]
    found = json.loads(shell.out("states", "states", "--prune", "--keep", "1", "--yes", "--json"))
    assert found["removed"] == ["states/update_00000002"]
    flip(folder / "update_00000003" / "model.safetensors")
    shell.run("states", "states", "--prune", "--keep", "1", "--yes")
    assert "update_00000003" in names(folder)  # nothing newer is better


@pytest.mark.parametrize("answer", ["y\n", "n\n", ""])
def test_it_asks_before_it_removes(shell, folder, answer):
    result = subprocess.run(
        [sys.executable, "-m", "pa_core", "states", "states", "--prune", "--keep", "3"],
        cwd=shell.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=answer,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "To be removed: states/update_00000001" in result.stdout
    assert len(names(folder)) == (3 if answer == "y\n" else 4)


def test_options_that_make_no_sense_alone_are_told(shell, folder):
    assert "--prune needs --keep" in shell.error("states", "states", "--prune")
    assert "--keep needs --prune" in shell.error("states", "states", "--keep", "2")
    assert len(names(folder)) == 4


def test_listing_states_imports_no_torch(folder):
    code = (
        "import sys\nfrom pa_core.cli.app import app\n"
        f"app(['states', {str(folder)!r}, '--verify'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'numpy', 'accelerate') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
