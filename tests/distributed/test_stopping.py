"""If one process ends, all end soon, and the cause is shown.

Killed processes are tested in ``tests/faults/test_elastic.py``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from tests.distributed.launch import environment, torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = """
    import os
    import sys
    import torch
    from pathlib import Path
    from torch import nn
    from torch.utils.data import Dataset
    from pa_core import Trainer, TrainerCallback
    from tests.helpers import tiny_data, tiny_model

    rank = os.environ["RANK"]

    class Data(Dataset):
        def __init__(self):
            self.data = tiny_data(64)

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            if rank == "1" and Path("broken").exists():
                raise ZeroDivisionError("the first cause")
            return self.data[index]

    class WritesItsPid(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 3:
                Path(f"beside-{rank}").write_text(str(os.getpid()))
                os.rename(f"beside-{rank}", f"pid-{rank}")

    class CallsACollective(TrainerCallback):
        runs_on = "main"

        def on_train_step_start(self, trainer):
            if Path("asked").exists():
                trainer.gather(torch.ones(1))

    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugins = [WritesItsPid, CallsACollective]
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=plugins)
    trainer.train(Data(), 10**6, per_device_batch_size=4)
"""


def interrupt_the_launcher(folder: Path, launcher: int, pids: list[int]) -> None:
    os.kill(launcher, signal.SIGINT)  # as Ctrl-C; torchrun starts new sessions


def interrupt_one(folder: Path, launcher: int, pids: list[int]) -> None:
    os.kill(pids[1], signal.SIGINT)


def break_the_data_of_one(folder: Path, launcher: int, pids: list[int]) -> None:
    (folder / "broken").touch()


def let_a_main_process_plugin_call_a_collective(
    folder: Path, launcher: int, pids: list[int]
) -> None:
    (folder / "asked").touch()


@pytest.mark.parametrize(
    ("happens", "cause"),
    [
        (interrupt_the_launcher, "SIGINT"),
        (interrupt_one, "KeyboardInterrupt"),
        (break_the_data_of_one, "ZeroDivisionError: the first cause"),
        (
            let_a_main_process_plugin_call_a_collective,
            "'CallsACollective' runs on the main process only",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_all_end_within_thirty_seconds(
    happens: Callable[[Path, int, list[int]], None], cause: str, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(dedent(SCRIPT))
    launcher = subprocess.Popen(
        [sys.executable, *torchrun(2), "train.py"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(),
    )
    pids: list[int] = []
    try:
        files = [tmp_path / f"pid-{rank}" for rank in range(2)]
        wait_for(lambda: all(file.exists() for file in files), 120)
        pids = [int(file.read_text()) for file in files]
        happens(tmp_path, launcher.pid, pids)
        _, shown = launcher.communicate(timeout=30)
        assert launcher.returncode != 0
        assert cause in shown
        wait_for(lambda: not any(map(is_alive, pids)), 1)
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)
        launcher.terminate()
        launcher.communicate(timeout=60)


def wait_for(happened: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process is running; a zombie isn't."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
