"""Checkpoint code is imported when a run saves or resumes, or enables a plugin that does."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import torch
from pa_core import Trainer
from tests.helpers import tiny_data, tiny_model

def new_trainer(plugins):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, torch.nn.CrossEntropyLoss(), optimizer, plugins=plugins)

def print_imported():
    print("imported:", *sorted(n for n in sys.modules if n.startswith("pa_core.checkpoint.")))

"""
SAVING = {f"pa_core.checkpoint.{name}" for name in ("background", "safetensors_io", "save")}


def imported_by(code: str) -> list[set[str]]:
    """The checkpoint modules imported at each call of `print_imported`."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT + code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    return [set(line[1:]) for line in lines if line and line[0] == "imported:"]


def test_a_run_that_saves_nothing_imports_only_the_fingerprint(tmp_path):
    plain, saved = imported_by(
        "trainer = new_trainer(())\n"
        "trainer.train(tiny_data(8), 1, eval_dataset=tiny_data(4))\n"
        "print_imported()\n"
        f"trainer.save_training_state({str(tmp_path / 'state')!r})\n"
        "print_imported()\n"
    )
    assert plain == {"pa_core.checkpoint.fingerprint"}
    assert saved >= SAVING


def test_enabling_checkpoint_imports_what_saving_needs():
    (imported,) = imported_by("new_trainer(['checkpoint'])\nprint_imported()\n")
    assert imported >= SAVING
