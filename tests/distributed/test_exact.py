"""One, two and three processes give the same numbers, and end together."""

from __future__ import annotations

import subprocess
import sys
import time
from textwrap import dedent

import pytest

from tests.distributed.launch import environment, flat, outcome_of, torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return outcome_of(tmp_path_factory.mktemp("exact") / "one", "exact.py")


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_numbers_of_one(alone, processes, tmp_path):
    together = outcome_of(tmp_path / "several", "exact.py", processes)
    assert alone.keys() - together.keys() <= {name for name in alone if name.startswith("gathered")}
    for name, value in together.items():
        assert flat(value) == pytest.approx(flat(alone[name]), abs=1e-6), name


def test_an_exception_on_one_process_ends_all_within_thirty_seconds_with_its_cause(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        dedent(
            """
            import os, time
            import torch
            from torch import nn
            from pa_core import Trainer, TrainerCallback
            from tests.helpers import tiny_data, tiny_model

            class Fails(TrainerCallback):
                def on_train_step_end(self, trainer):
                    if os.environ["RANK"] == "1" and trainer.updates == 3:
                        open("failed", "w").write(str(time.time()))
                        raise ZeroDivisionError("the first cause")

            model = tiny_model()
            trainer = Trainer(
                model,
                nn.CrossEntropyLoss(),
                torch.optim.SGD(model.parameters(), lr=0.1),
                callbacks=[Fails],
                accelerator={"cpu": True},
            )
            trainer.train(tiny_data(64), 1000, per_device_batch_size=4)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, *torchrun(2), str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env=environment(),
    )
    assert done.returncode != 0
    assert "the first cause" in done.stderr
    assert "plugin 'Fails'" in done.stderr
    assert time.time() - float((tmp_path / "failed").read_text()) < 30
