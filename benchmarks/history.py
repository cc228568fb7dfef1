"""Cost of a long run history: what saving it takes from the loop, its size, and the time to resume.

A run saves training states in the background, after a number of records that were made before it.
Runs with few and with many records take turns, so that a slow phase of the machine affects both.

    python benchmarks/history.py --records 200 200000 --rounds 7

README.md in this folder has the details.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from pa_core.checkpoint.storage import verify
from pa_core.durations import Progress
from pa_core.tracking import InMemoryRunHistory

WIDTH, BATCH, STEPS, SAVE_EVERY = 256, 32, 500, 100
METRICS = ("train_loss", "learning_rate", "gradient_norm", "eval_loss")


class Clock(TrainerCallback):
    """Records when each step ends, and when the first batch is there, where it can end the run."""

    def __init__(self, *, is_ending: bool = False) -> None:
        self.is_ending = is_ending

    def on_training_run_start(self, trainer: Trainer) -> None:
        self.ends: list[float] = []

    def on_train_step_start(self, trainer: Trainer) -> None:
        if not self.ends:
            self.first_batch = time.perf_counter()
            if self.is_ending:
                raise KeyboardInterrupt

    def on_train_step_end(self, trainer: Trainer) -> None:
        self.ends.append(time.perf_counter())

    def longest_gaps(self) -> list[float]:
        """The longest time between two steps from each save to the next, but for the first.

        The first save uses new memory for its copy, and the later ones use the same again.
        """
        gaps = [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]
        starts = range(2 * SAVE_EVERY - 1, len(gaps), SAVE_EVERY)
        return [max(gaps[start : start + SAVE_EVERY]) for start in starts]


def new_history(records: int) -> InMemoryRunHistory:
    history = InMemoryRunHistory()
    history.follow(lambda: Progress(0.5, number, number * BATCH, number / 100, 0.5))
    for number in range(records):
        history.update_metric(METRICS[number % len(METRICS)], number / records)
    return history


def new_trainer(history: InMemoryRunHistory, *callbacks: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))
    optimizer = torch.optim.Adam(model.parameters())
    return Trainer(
        model, nn.functional.mse_loss, optimizer, callbacks, plugins=(), run_history=history
    )


def measure(records: int, folder: Path) -> dict[str, float]:
    """Save within a run of this many records, and resume from the last state."""
    x = torch.rand(STEPS * BATCH, WIDTH)
    data, clock = TensorDataset(x, x), Clock()
    saver = SaveTrainingStateCallback(folder, save_every_n_steps=SAVE_EVERY, save_at_end=False)
    history = new_history(records)
    trainer = new_trainer(history, clock, saver)
    trainer.train(data, 1, per_device_batch_size=BATCH, reset_run_history=False)
    state = max(folder.iterdir())
    if verify(state):
        raise SystemExit(f"{state} is damaged")
    resumed_clock = Clock(is_ending=True)
    resumed_history = InMemoryRunHistory()
    resumed = new_trainer(resumed_history, resumed_clock)
    start = time.perf_counter()
    with suppress(KeyboardInterrupt):
        resumed.train(data, 2, per_device_batch_size=BATCH, resume_from=state)
    if resumed_history.records[:records] != history.records[:records]:
        raise SystemExit("the resumed run has a different history")
    return {
        "gap": statistics.median(clock.longest_gaps()),
        "bytes": sum(path.stat().st_size for path in state.iterdir()),
        "resume": resumed_clock.first_batch - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, nargs=2, default=[200, 200_000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="A folder on the disk to measure.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[int, list[dict[str, float]]] = {records: [] for records in options.records}
    for number in range(options.rounds + 1):  # the first warms up
        for records in options.records:
            with (
                tempfile.TemporaryDirectory(dir=options.folder) as folder,
                redirect_stdout(StringIO()),
                warnings.catch_warnings(action="ignore"),  # resumed without the same plugins
            ):
                figures = measure(records, Path(folder))
            if number:
                found[records].append(figures)
    print("| records | longest gap, ms | min to max | state, MB | resumed after, s |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for records, rounds in found.items():
        gaps = [1000 * figures["gap"] for figures in rounds]
        resume = statistics.median(figures["resume"] for figures in rounds)
        print(
            f"| {records:,} | {statistics.median(gaps):.1f} | {min(gaps):.1f} to {max(gaps):.1f} "
            f"| {rounds[0]['bytes'] / 1e6:.1f} | {resume:.3f} |"
        )
    few, many = found.values()
    ratios = [b["gap"] / a["gap"] for a, b in zip(few, many, strict=True)]
    print(
        f"\nlongest gap, many / few: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
