"""Cost of saving a training state: how long the loop is blocked, and when the state is complete.

A model and Adam's two moments make up a state of a given size. For each way of saving it, `stall`
is how long the call blocks the loop, and `total` the time until the state is on disk.

    python benchmarks/saving.py --megabytes 100 1000 --json results.json

Then a run is resumed from states at the start, in the middle and near the end of a long epoch, and
the time until its first batch is measured. README.md in this folder has the details.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from pa_core import Trainer, TrainerCallback
from pa_core.checkpoint.storage import verify
from pa_core.control import SaveRequest

WIDTH = 1000
SAMPLES = 200_000


class Slices(Dataset[Any]):
    """Counts the samples that are fetched."""

    fetched = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        Slices.fetched += 1
        return torch.full((WIDTH,), index / SAMPLES), torch.zeros(WIDTH)


def new_trainer(layers: int, *callbacks: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    return Trainer(
        model, nn.functional.mse_loss, torch.optim.Adam(model.parameters()), callbacks, plugins=()
    )


def trained(megabytes: int) -> Trainer:
    """A trainer whose state has about this size: weights and two moments in float32."""
    trainer = new_trainer(max(1, round(megabytes * 1e6 / (12 * WIDTH * (WIDTH + 1)))))
    data = torch.utils.data.Subset(Slices(), range(8))
    trainer.train(data, 1, per_device_batch_size=4)
    return trainer


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def ways(trainer: Trainer) -> dict[str, Callable[[Path], Callable[[], None]]]:
    """Ways of saving, each of which returns a function that waits until the state is complete."""
    saver, accelerator = trainer._saver, trainer._accelerator
    accelerator._models, accelerator._optimizers = [trainer.model], [trainer.optimizer]

    def done() -> None:
        pass

    def background(path: Path) -> Callable[[], None]:
        saver.save(path, SaveRequest(in_background=True), {})
        return saver.wait

    def foreground(path: Path) -> Callable[[], None]:
        saver.save(path, SaveRequest(), {})
        return done

    def torch_save(path: Path) -> Callable[[], None]:
        torch.save(
            {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}, path
        )
        return done

    def torch_save_flushed(path: Path) -> Callable[[], None]:
        torch_save(path)
        flush(path)
        return done

    def save_state(path: Path) -> Callable[[], None]:
        accelerator.save_state(str(path))
        return done

    return {
        "pa-core, background": background,
        "pa-core, foreground": foreground,
        "torch.save in place": torch_save,
        "torch.save and fsync": torch_save_flushed,
        "accelerate save_state": save_state,
    }


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def measure_saving(megabytes: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    trainer = trained(megabytes)
    times: dict[str, list[tuple[float, float]]] = {}
    sizes: dict[str, int] = {}
    for number in range(rounds + 1):  # the first of each warms up
        for name, save in ways(trainer).items():
            path = folder / f"{name.replace(' ', '_')}"
            os.sync()  # don't measure what earlier calls left to write
            start = time.perf_counter()
            wait = save(path)
            stall = time.perf_counter() - start
            wait()
            total = time.perf_counter() - start
            if name.startswith("pa-core") and verify(path):
                raise SystemExit(f"{name}: the state is damaged")
            sizes[name] = size_of(path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            if number:
                times.setdefault(name, []).append((stall, total))
    return [
        {
            "way": name,
            "megabytes": round(sizes[name] / 1e6),
            "stall": statistics.median(stall for stall, _ in found),
            "stall_range": [min(found)[0], max(found)[0]],
            "total": statistics.median(total for _, total in found),
        }
        for name, found in times.items()
    ]


class Clock(TrainerCallback):
    """Records the time of the first batch and ends the run there."""

    def on_train_step_start(self, trainer: Trainer) -> None:
        self.at = time.perf_counter()
        raise KeyboardInterrupt


class SaveAt(TrainerCallback):
    """Saves one state after the given number of updates and ends the run."""

    def __init__(self, path: Path, update: int) -> None:
        self.path, self.update = path, update

    def on_train_step_end(self, trainer: Trainer) -> None:
        if trainer.updates == self.update:
            trainer.save_training_state(self.path)
            trainer.control.stop("saved")


def measure_resuming(rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Measure the time from the call of `train` to the first batch, anywhere in the epoch."""
    batch_size, rows = 100, []
    last = SAMPLES // batch_size
    for place, update in (("start", 1), ("middle", last // 2), ("end", last - 1)):
        path = folder / place
        # Set the position instead of training up to it: the state differs in nothing else that
        # resuming depends on.
        trainer = new_trainer(1, SaveAt(path, 1))
        trainer.train(Slices(), 1, per_device_batch_size=batch_size)
        trainer.position.batch, trainer.position.updates = update, update
        trainer.position.phase, trainer.position.stop_reason = "train", None
        shutil.rmtree(path)
        trainer.save_training_state(path)
        taken = []
        for _ in range(rounds):
            clock = Clock()
            resumed = new_trainer(1, clock)
            before, start = Slices.fetched, time.perf_counter()
            try:
                resumed.train(Slices(), 1, per_device_batch_size=batch_size, resume_from=path)
            except KeyboardInterrupt:
                taken.append(clock.at - start)
            if resumed.position.batch != update:
                raise SystemExit(f"resumed at batch {resumed.position.batch}, not {update}")
            fetched = Slices.fetched - before
        rows.append({"place": place, "seconds": statistics.median(taken), "fetched": fetched})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="A folder on the disk to measure.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"saving": [], "resuming": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(
            "| state | way | stall, s | min to max | total, s |\n| --- | --- | ---: | ---: | ---: |"
        )
        for megabytes in options.megabytes:
            for row in measure_saving(megabytes, options.rounds, Path(folder)):
                low, high = row["stall_range"]
                print(
                    f"| {row['megabytes']} MB | {row['way']} | {row['stall']:.3f} | "
                    f"{low:.3f} to {high:.3f} | {row['total']:.2f} |",
                    flush=True,
                )
                results["saving"].append(row)
        print(
            "\n| resumed at | until the first batch, s | samples fetched |\n| --- | ---: | ---: |"
        )
        for row in measure_resuming(options.rounds, Path(folder)):
            print(f"| {row['place']} | {row['seconds']:.3f} | {row['fetched']} |", flush=True)
            results["resuming"].append(row)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
