"""Overhead of a training loop per step: the same work in seven systems and in raw PyTorch.

Every contender trains the same small network (784-128-64-10, ReLU) with the same Adam on the same
data in memory. The work is so small that the loop's own overhead dominates. Each run has its own
process, and runs are interleaved (A B C … A B C …), so that a slow phase of the machine affects
all contenders equally.

All contenders are timed by the same clock, which they can't influence: the `step` of the
optimizer, which the benchmark creates and passes in. It counts updates and records the time of
each. An epoch is timed from the last update of the previous epoch to its own last update, so it
includes everything that a system does per step and between epochs, but not its set-up. The time
between two updates within an epoch gives the typical step, which other load on the machine hardly
affects.

    python benchmarks/overhead.py --rounds 5 --json results.json
    python benchmarks/overhead.py --only hand pa-core --data tensor

The rules are in README.md in this folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ("tensor", "map")
LEARNING_RATE = 1e-3
SEED = 1234
LOSS_TOLERANCE = 0.25  # relative to the raw loop; a different order of samples alone makes 0.1


class BenchmarkError(Exception):
    """A contender did not do the work, so its time doesn't count; the message has the reason."""


# --------------------------------------------------------------------------------------------
# The work: one network, one optimizer, one data set, one clock
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The amount of work.

    Attributes:
        samples: training samples; a multiple of ``batch_size``, so all batches are full.
        batch_size: samples per step.
        warmup_epochs: untimed epochs at the start.
        timed_epochs: timed epochs.
    """

    samples: int = 12_800
    batch_size: int = 32
    warmup_epochs: int = 1
    timed_epochs: int = 6

    @property
    def epochs(self) -> int:
        """Epochs of one run, warm-up included."""
        return self.warmup_epochs + self.timed_epochs

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.samples // self.batch_size


class UpdateClock:
    """Records the time after each update of an optimizer, which it creates.

    Attributes:
        optimizer: an Adam of a subclass, whose `step` records the time. A hook on a plain
            Adam would slow down systems that call `step` faster without hooks.
        stamps: wall-clock time after each update, in seconds.
        processor_stamps: CPU time of this process after each update, in seconds.
    """

    def __init__(self, net: Any, steps: int, synchronize: Callable[[], None] | None) -> None:
        import torch

        self.stamps: list[float] = []
        self.processor_stamps: list[float] = []
        self._steps = steps
        self._synchronize = synchronize
        clock = self

        class Adam(torch.optim.Adam):
            def step(self, closure: Any = None) -> Any:
                loss = super().step(closure)
                clock._record()
                return loss

        self.optimizer = Adam(net.parameters(), lr=LEARNING_RATE)

    def _record(self) -> None:
        if self._synchronize is not None and (len(self.stamps) + 1) % self._steps == 0:
            self._synchronize()  # count queued kernels in their own epoch
        self.stamps.append(time.perf_counter())
        self.processor_stamps.append(time.process_time())

    def epochs(self) -> list[float]:
        """Seconds from the last update of each epoch to that of the next."""
        return [end - begin for begin, end in pairwise(self.stamps[self._steps - 1 :: self._steps])]

    def gaps(self, first_epoch: int) -> list[float]:
        """Seconds between consecutive updates of an epoch, from epoch `first_epoch` (0, …) on."""
        return [
            end - begin
            for number, (begin, end) in enumerate(pairwise(self.stamps), 1)
            if number % self._steps and number >= first_epoch * self._steps
        ]


@dataclass
class Job:
    """What a contender receives: the objects to train with, and nothing it could tune."""

    net: Any
    loss_func: Any
    optimizer: Any
    dataset: Any
    epochs: int
    batch_size: int
    device: str
    folder: str = field(default_factory=tempfile.gettempdir)
    processes: int = 1

    @property
    def loader_kwargs(self) -> dict[str, Any]:
        """Data loader options, the same for all contenders: pinned memory only for a GPU."""
        return {"num_workers": 0, "pin_memory": self.device != "cpu"}


# --------------------------------------------------------------------------------------------
# The contenders. Each takes a job and returns the function that trains. That function returns the
# mean training loss of the last epoch if the system reports one. Imports and construction happen
# before it is returned; only the call that trains is measured.
# --------------------------------------------------------------------------------------------

Train = Callable[[], "float | None"]


def hand(job: Job) -> Train:
    """The raw PyTorch loop that a good engineer writes, without redundant work."""
    import torch
    from torch.utils.data import DataLoader

    device = torch.device(job.device)
    model, loss_func, optimizer = job.net.to(device), job.loss_func, job.optimizer
    loader = DataLoader(job.dataset, batch_size=job.batch_size, shuffle=True, **job.loader_kwargs)
    # On a CPU the loss is at hand; on a GPU reading it would stop the queue at every step.
    read: Any = torch.Tensor.item if device.type == "cpu" else torch.Tensor.detach

    def train() -> float:
        mean = math.nan
        for _ in range(job.epochs):
            model.train()
            total, samples = 0.0, 0
            for inputs, targets in loader:
                inputs = inputs.to(device, non_blocking=True)
                targets = targets.to(device, non_blocking=True)
                optimizer.zero_grad()
                loss = loss_func(model(inputs), targets)
                loss.backward()
                optimizer.step()
                total += read(loss) * len(inputs)
                samples += len(inputs)
            mean = float(total) / samples
        return mean

    return train


def accelerate(job: Job) -> Train:
    """The loop of accelerate's tutorial."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    loader = DataLoader(job.dataset, batch_size=job.batch_size, shuffle=True, **job.loader_kwargs)

    def train() -> float:
        accelerator = Accelerator()
        model, optimizer, train_loader = accelerator.prepare(job.net, job.optimizer, loader)
        mean = math.nan
        for _ in range(job.epochs):
            model.train()
            total, samples = torch.zeros((), device=accelerator.device), 0
            for inputs, targets in train_loader:
                optimizer.zero_grad()
                loss = job.loss_func(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                total += loss.detach() * len(inputs)
                samples += len(inputs)
            mean = float(total) / samples
        return mean

    return train


def pytorch_accelerated(job: Job) -> Train:
    """pytorch-accelerated's Trainer with its default callbacks, progress bar included."""
    from pytorch_accelerated import Trainer

    trainer = Trainer(job.net, job.loss_func, job.optimizer)

    def train() -> float:
        trainer.train(
            job.dataset,
            num_epochs=job.epochs,
            per_device_batch_size=job.batch_size,
            train_dataloader_kwargs=job.loader_kwargs,
        )
        return float(trainer.run_history.get_latest_metric("train_loss_epoch"))

    return train


def hf(job: Job) -> Train:
    """Hugging Face's Trainer: dict batches, progress bar; no reports, no files.

    Gradient clipping and learning-rate decay, on by default, are disabled, since the other
    contenders don't do that work.
    """
    import torch
    from torch.utils.data import default_collate
    from transformers import Trainer, TrainingArguments

    class WithLoss(torch.nn.Module):
        def __init__(self, net: Any, loss_func: Any) -> None:
            super().__init__()
            self.net, self.loss_func = net, loss_func

        def forward(self, inputs: Any, labels: Any) -> dict[str, Any]:
            logits = self.net(inputs)
            return {"loss": self.loss_func(logits, labels), "logits": logits}

    def collate(samples: list[Any]) -> dict[str, Any]:
        inputs, labels = default_collate(samples)
        return {"inputs": inputs, "labels": labels}

    trainer = Trainer(
        WithLoss(job.net, job.loss_func),
        TrainingArguments(
            output_dir=job.folder,
            num_train_epochs=job.epochs,
            per_device_train_batch_size=job.batch_size,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            use_cpu=job.device == "cpu",
            dataloader_pin_memory=job.loader_kwargs["pin_memory"],
        ),
        data_collator=collate,
        train_dataset=job.dataset,
        optimizers=(job.optimizer, None),
    )

    def train() -> None:
        trainer.train()  # reports the mean of the whole run, not of an epoch

    return train


def _lightning(job: Job, barebones: bool) -> Train:
    import lightning
    from torch.utils.data import DataLoader

    class Module(lightning.LightningModule):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss_func = job.net, job.loss_func

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            inputs, targets = batch
            loss = self.loss_func(self.net(inputs), targets)
            if not barebones:  # which can't log
                self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return job.optimizer

    quiet: dict[str, Any] = {} if barebones else {"logger": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        max_epochs=job.epochs,
        accelerator="cpu" if job.device == "cpu" else "gpu",
        devices=job.processes,
        strategy="auto" if job.processes == 1 else "ddp",
        barebones=barebones,
        default_root_dir=job.folder,
        **quiet,
    )
    module = Module()
    loader = DataLoader(job.dataset, batch_size=job.batch_size, shuffle=True, **job.loader_kwargs)

    def train() -> float | None:
        trainer.fit(module, loader)
        return None if barebones else float(trainer.callback_metrics["train_loss"])

    return train


def lightning(job: Job) -> Train:
    """Lightning with its default progress bar and an epoch loss; no logger, no checkpoints."""
    return _lightning(job, barebones=False)


def lightning_barebones(job: Job) -> Train:
    """Lightning's mode for measuring its overhead: no bar, no logging, no callbacks."""
    return _lightning(job, barebones=True)


def ignite(job: Job) -> Train:
    """Ignite's supervised trainer with the mean loss of the epoch; it has no bar by default."""
    from ignite.engine import create_supervised_trainer
    from ignite.metrics import Average
    from torch.utils.data import DataLoader

    net = job.net.to(job.device)
    trainer = create_supervised_trainer(net, job.optimizer, job.loss_func, device=job.device)
    Average().attach(trainer, "loss")
    loader = DataLoader(job.dataset, batch_size=job.batch_size, shuffle=True, **job.loader_kwargs)

    def train() -> float:
        trainer.run(loader, max_epochs=job.epochs)
        return float(trainer.state.metrics["loss"])

    return train


def pa_core(job: Job) -> Train:
    """This project's Trainer with all default built-ins on, and a progress bar.

    The default table has a bar in terminals only. The output goes to a file, where other trainers
    write theirs, so the built-in that does the same is added.
    """
    from pa_core import Trainer
    from pa_core.callbacks import ProgressBarCallback

    trainer = Trainer(job.net, job.loss_func, job.optimizer, plugins=[ProgressBarCallback])

    def train() -> float:
        trainer.train(
            job.dataset,
            num_epochs=job.epochs,
            per_device_batch_size=job.batch_size,
            train_dataloader_kwargs={"num_workers": 0},
        )
        return float(trainer.run_history.get_latest_metric("train_loss_epoch"))

    return train


@dataclass(frozen=True)
class Contender:
    """A system under test, the module it needs and the distribution that provides it."""

    prepare: Callable[[Job], Train]
    module: str
    distribution: str


CONTENDERS: Mapping[str, Contender] = {
    "hand": Contender(hand, "torch", "torch"),
    "pa-core": Contender(pa_core, "pa_core", "pa-core"),
    "ignite": Contender(ignite, "ignite", "pytorch-ignite"),
    "accelerate": Contender(accelerate, "accelerate", "accelerate"),
    "pytorch-accelerated": Contender(
        pytorch_accelerated, "pytorch_accelerated", "pytorch-accelerated"
    ),
    "lightning-barebones": Contender(lightning_barebones, "lightning", "lightning"),
    "hf": Contender(hf, "transformers", "transformers"),
    "lightning": Contender(lightning, "lightning", "lightning"),
}


# --------------------------------------------------------------------------------------------
# One run, in its own process
# --------------------------------------------------------------------------------------------


def make_dataset(kind: str, samples: int) -> Any:
    """Random inputs and labels in memory, the same for every process.

    ``tensor`` is a ``TensorDataset``. ``map`` is a plain map dataset, whose items are a row of
    the inputs and an ``int``.
    """
    import torch
    from torch.utils.data import Dataset, TensorDataset

    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(samples, 784, generator=generator)
    labels = torch.randint(0, 10, (samples,), generator=generator)
    if kind == "tensor":
        return TensorDataset(inputs, labels)

    class MapDataset(Dataset[tuple[torch.Tensor, int]]):
        def __init__(self) -> None:
            self.inputs, self.labels = inputs, labels.tolist()

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return self.inputs[index], self.labels[index]

    return MapDataset()


def make_net() -> Any:
    """The network, a module as users write them, with the same weights in every process."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(784, 128),
                torch.nn.ReLU(),
                torch.nn.Linear(128, 64),
                torch.nn.ReLU(),
                torch.nn.Linear(64, 10),
            )

        def forward(self, inputs: torch.Tensor) -> Any:
            return self.layers(inputs)

    torch.manual_seed(SEED)
    return Net()


def mean_loss(net: Any, loss_func: Any, dataset: Any, device: str) -> float:
    """The mean loss over all samples in evaluation mode, which shows whether a run trained."""
    import torch
    from torch.utils.data import DataLoader

    inputs, labels = next(iter(DataLoader(dataset, batch_size=len(dataset))))
    net.to(device).eval()
    with torch.no_grad():
        return float(loss_func(net(inputs.to(device)), labels.to(device)))


def run_contender(name: str, data: str, device: str, work: Work, folder: str) -> dict[str, Any]:
    """Train one contender in this process.

    Returns:
        ``step_us``: microseconds per step, the median over the timed epochs; ``typical_us``: the
        median over their single steps; ``setup_ms``: the rest of the training call;
        ``initial_loss`` and ``final_loss`` over all samples, calculated by the benchmark;
        ``epoch_loss``: what the system itself reported for the last epoch, or ``None``.

    Raises:
        BenchmarkError: if the contender made a different number of updates than requested.
    """
    import torch

    torch.set_num_threads(1)
    net = make_net()
    loss_func = torch.nn.CrossEntropyLoss()
    dataset = make_dataset(data, work.samples)
    initial_loss = mean_loss(net, loss_func, dataset, device)
    net.train()
    clock = UpdateClock(
        net, work.steps, torch.cuda.synchronize if device.startswith("cuda") else None
    )
    train = CONTENDERS[name].prepare(
        Job(net, loss_func, clock.optimizer, dataset, work.epochs, work.batch_size, device, folder)
    )

    start = time.perf_counter()
    epoch_loss = train()
    call = time.perf_counter() - start

    updates = len(clock.stamps)
    if updates != work.epochs * work.steps:
        raise BenchmarkError(f"{name} made {updates} updates, not {work.epochs * work.steps}")

    epochs = clock.epochs()[work.warmup_epochs - 1 :]
    step_us = statistics.median(epochs) / work.steps * 1e6
    return {
        "step_us": step_us,
        "typical_us": statistics.median(clock.gaps(work.warmup_epochs)) * 1e6,
        "setup_ms": call * 1e3 - step_us * updates / 1e3,
        "initial_loss": initial_loss,
        "final_loss": mean_loss(net, loss_func, dataset, device),
        "epoch_loss": epoch_loss,
    }


# --------------------------------------------------------------------------------------------
# All runs, interleaved
# --------------------------------------------------------------------------------------------


def run_process(name: str, data: str, args: argparse.Namespace, work: Work) -> dict[str, Any]:
    """Run one contender in a fresh interpreter, with its output redirected to a file."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    if args.device == "cpu":
        environment.update(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder, "result.json"), Path(folder, "output.txt")
        command = [sys.executable, __file__, "--run", name, "--result", str(result)]
        command += ["--data", data, "--device", args.device, "--epochs", str(work.timed_epochs)]
        command += ["--samples", str(work.samples)]
        pin = (lambda: os.sched_setaffinity(0, {args.core})) if args.core is not None else None
        with output.open("wb") as file:
            code = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,  # for any files that a system writes
                env=environment,
                preexec_fn=pin,
            ).returncode
        if code != 0:
            tail = "\n".join(output.read_text(errors="replace").splitlines()[-15:])
            raise BenchmarkError(f"{name} failed with exit code {code}; its last lines:\n{tail}")
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


def check_trained(name: str, run: dict[str, Any], reference: dict[str, Any] | None) -> None:
    """Reject a run that did not do the work.

    Raises:
        BenchmarkError: if the loss over all samples did not fall, or if it or the reported loss of
            the last epoch differs from that of the raw loop of the same round.
    """
    final, initial = run["final_loss"], run["initial_loss"]
    if not math.isfinite(final) or final > 0.98 * initial:
        raise BenchmarkError(f"{name} did not train: loss {initial:.3f} before, {final:.3f} after")
    if reference is None:
        return
    for key in ("final_loss", "epoch_loss"):
        value, expected = run[key], reference[key]
        if value is not None and not math.isclose(value, expected, rel_tol=LOSS_TOLERANCE):
            raise BenchmarkError(f"{name}: {key} is {value:.3f}, of the raw loop {expected:.3f}")


def measure(
    names: Sequence[str], args: argparse.Namespace, work: Work
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure all contenders, interleaved.

    Returns:
        One record per run (data, round, contender and measurements), and the failures. A contender
        that fails once is left out of the later rounds with the same data.
    """
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    for data in args.data:
        contenders = list(names)
        for number in range(1, args.rounds + 1):
            reference: dict[str, Any] | None = None
            for name in tuple(contenders):
                try:
                    run = run_process(name, data, args, work)
                    check_trained(name, run, reference)
                except BenchmarkError as error:
                    contenders.remove(name)
                    failures.append(f"{data} round {number}/{args.rounds}: {error}")
                    print(failures[-1], file=sys.stderr, flush=True)
                    continue
                if name == "hand":
                    reference = run
                records.append({"data": data, "round": number, "contender": name, **run})
                print(
                    f"{data} round {number}/{args.rounds} {name}: {run['step_us']:.0f} µs a step",
                    file=sys.stderr,
                    flush=True,
                )
    return records, failures


# --------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------


def summarize(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per kind of data and contender.

    ``ratio`` and ``typical_ratio`` are medians of the ratios within each round; ``min_ratio`` is
    the ratio of the fastest rounds.
    """
    by_hand = {(r["data"], r["round"]): r for r in records if r["contender"] == "hand"}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["data"], record["contender"]), []).append(record)

    def ratio(runs: Sequence[dict[str, Any]], key: str) -> float | None:
        pairs = [(run, by_hand.get((run["data"], run["round"]))) for run in runs]
        ratios = [run[key] / base[key] for run, base in pairs if base is not None]
        return statistics.median(ratios) if ratios else None

    rows = [
        {
            "data": data,
            "contender": name,
            "rounds": len(runs),
            "median_us": statistics.median(run["step_us"] for run in runs),
            "min_us": min(run["step_us"] for run in runs),
            "max_us": max(run["step_us"] for run in runs),
            "ratio": ratio(runs, "step_us"),
            "typical_us": statistics.median(run["typical_us"] for run in runs),
            "typical_ratio": ratio(runs, "typical_us"),
            "setup_ms": statistics.median(run["setup_ms"] for run in runs),
            "final_loss": statistics.median(run["final_loss"] for run in runs),
        }
        for (data, name), runs in groups.items()
    ]
    fastest_by_hand = {row["data"]: row["min_us"] for row in rows if row["contender"] == "hand"}
    for row in rows:
        base = fastest_by_hand.get(row["data"])
        row["min_ratio"] = None if base is None else row["min_us"] / base
    return rows


def table(rows: Sequence[dict[str, Any]], data: str) -> str:
    """The rows of one kind of data as a Markdown table, fastest first."""
    head = ["system", "µs a step", "min", "max", "/ hand", "min / min"]
    head += ["typical step", "/ hand", "set-up ms", "loss"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]

    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    chosen = [row for row in rows if row["data"] == data]
    for row in sorted(chosen, key=lambda row: row["ratio"] or row["median_us"]):
        cells = [row["contender"]]
        cells += [f"{row[key]:.0f}" for key in ("median_us", "min_us", "max_us")]
        cells += [times(row["ratio"]), times(row["min_ratio"])]
        cells += [f"{row['typical_us']:.0f}", times(row["typical_ratio"])]
        cells += [f"{row['setup_ms']:.0f}", f"{row['final_loss']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, cores, system, Python, and the GPU if one is used."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    machine: dict[str, Any] = {
        "processor": processor,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "device": device,
    }
    if device.startswith("cuda"):
        import torch

        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def versions(names: Sequence[str]) -> dict[str, str]:
    """The installed versions of the contenders' distributions, torch first."""
    found = {}
    for distribution in dict.fromkeys(["torch", *(CONTENDERS[n].distribution for n in names)]):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = "from the tree, not installed"
    return found


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Microseconds per training step, in raw PyTorch and in each system."
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all contenders (5)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CONTENDERS,
        metavar="NAME",
        help=f"measure only these of {', '.join(CONTENDERS)}",
    )
    parser.add_argument(
        "--data", nargs="+", choices=DATA, default=list(DATA), help="kinds of data (both)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--epochs", type=int, default=6, help="timed epochs of each run (6)")
    parser.add_argument("--samples", type=int, default=12_800, help="samples per epoch (12800)")
    parser.add_argument("--core", type=int, help="pin every run to this CPU core (Linux)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements here")
    parser.add_argument("--run", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    for option in ("rounds", "epochs"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} must be at least 1")
    if args.samples < Work.batch_size or args.samples % Work.batch_size:
        parser.error(f"--samples must be a multiple of the batch size, {Work.batch_size}")
    return args


def main() -> int:
    """Measure and print the tables; return 1 if a contender failed or did not train."""
    args = parse_arguments()
    work = Work(samples=args.samples, timed_epochs=args.epochs)
    if args.run:  # the process of one run
        with tempfile.TemporaryDirectory() as folder:
            run = run_contender(args.run, args.data[0], args.device, work, folder)
        args.result.write_text(json.dumps(run))
        return 0

    sys.path.insert(0, str(ROOT))  # measure pa-core from this source tree
    names = []
    for name in args.only or CONTENDERS:
        if importlib.util.find_spec(CONTENDERS[name].module) is None:
            print(f"{name}: skipped, {CONTENDERS[name].distribution} is not installed")
        else:
            names.append(name)
    if "hand" in names:  # first, since the others of a round are checked against it
        names.sort(key=lambda name: name != "hand")
    records, failures = measure(names, args, work)

    machine, packages, rows = describe_machine(args.device), versions(names), summarize(records)
    for data in args.data:
        print(f"\n### {data}\n\n{table(rows, data)}")
    print(
        f"\n{args.rounds} rounds of {work.timed_epochs} timed epochs of {work.steps} steps after "
        f"{work.warmup_epochs} of warm-up; batch {work.batch_size}, one thread, no workers."
    )
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(", ".join(f"{name} {version}" for name, version in packages.items()))
    if failures:
        print("\n" + "\n".join(f"failed: {failure}" for failure in failures))
    if args.json:
        report = {
            "machine": machine,
            "versions": packages,
            "summary": rows,
            "runs": records,
            "failures": failures,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
