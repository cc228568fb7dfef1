"""Overhead of a training step on two processes, and of evaluation on one and on two.

The network, the optimizer, the data and the clock are those of ``overhead.py``. All contenders run
in the same processes (gloo, CPU, one thread each), interleaved and repeated, each time with a new
network. The result is the median of the ratios to the raw loop of the same round, with its 95 %
confidence interval, so that other load on the machine affects all contenders equally. CPU time, of
all threads of a process, is measured too: it excludes waiting for the other process or for a core.

    python -m benchmarks.distributed --rounds 15
    python -m benchmarks.distributed --only hand pa-core --json results.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.overhead import (
    CONTENDERS,
    LOSS_TOLERANCE,
    ROOT,
    SEED,
    BenchmarkError,
    Job,
    Train,
    UpdateClock,
    describe_machine,
    make_dataset,
    make_net,
    mean_loss,
    versions,
)

BATCH_SIZE = 32  # per process
EPOCHS = 3  # the first one is the warm-up
NAMES = ("hand", "pa-core", "accelerate", "pytorch-accelerated", "hf", "lightning")
Evaluate = Callable[[], float]


# -- Training -------------------------------------------------------------------------------------


def ddp(job: Job) -> Train:
    """The raw `DistributedDataParallel` loop, without redundant work."""
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    sampler: Any = DistributedSampler(job.dataset, shuffle=True, seed=SEED)
    loader = DataLoader(job.dataset, batch_size=job.batch_size, sampler=sampler)
    model = DistributedDataParallel(job.net)

    def train() -> float:
        mean = math.nan
        for epoch in range(job.epochs):
            sampler.set_epoch(epoch)
            model.train()
            total, samples = 0.0, 0
            for inputs, targets in loader:
                job.optimizer.zero_grad()
                loss = job.loss_func(model(inputs), targets)
                loss.backward()
                job.optimizer.step()
                total += loss.item() * len(inputs)
                samples += len(inputs)
            sums = torch.tensor([total, samples], dtype=torch.float64)
            torch.distributed.all_reduce(sums)
            mean = float(sums[0] / sums[1])
        return mean

    return train


def time_training(name: str, samples: int, processes: int, folder: str) -> dict[str, Any]:
    """Train one contender.

    Returns:
        Microseconds per step of this process, work between epochs included; the same for the
        typical step and in CPU time; and the final loss.

    Raises:
        BenchmarkError: if it made a different number of updates than requested.
    """
    import torch

    net, dataset = make_net(), make_dataset("tensor", samples)
    loss_func = torch.nn.CrossEntropyLoss()
    steps = samples // (BATCH_SIZE * processes)
    clock = UpdateClock(net, steps, None)
    prepare = ddp if name == "hand" else CONTENDERS[name].prepare
    job = Job(
        net, loss_func, clock.optimizer, dataset, EPOCHS, BATCH_SIZE, "cpu", folder, processes
    )
    prepare(job)()
    on_processor = clock.processor_stamps
    if len(clock.stamps) != EPOCHS * steps:
        raise BenchmarkError(f"{name} made {len(clock.stamps)} updates, not {EPOCHS * steps}")
    return {
        "us": statistics.median(clock.epochs()) / steps * 1e6,
        "typical_us": statistics.median(clock.gaps(1)) * 1e6,
        "cpu_us": (on_processor[-1] - on_processor[steps - 1]) / (EPOCHS - 1) / steps * 1e6,
        "loss": mean_loss(net, loss_func, dataset, "cpu"),
    }


# -- Evaluation -----------------------------------------------------------------------------------


def evaluate_by_hand(net: Any, loss_func: Any, dataset: Any, rank: int, processes: int) -> Evaluate:
    """Each of P processes takes every P-th sample, so each sample counts once; one reduction."""
    import torch
    from torch.utils.data import DataLoader, Subset

    mine = Subset(dataset, range(rank, len(dataset), processes)) if processes > 1 else dataset

    def evaluate() -> float:
        net.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for inputs, targets in DataLoader(mine, batch_size=BATCH_SIZE):
                sums[0] += loss_func(net(inputs), targets) * len(inputs)
                sums[1] += len(inputs)
        if processes > 1:
            torch.distributed.all_reduce(sums)
        return float(sums[0] / sums[1])

    return evaluate


def evaluate_here(net: Any, loss_func: Any, dataset: Any, rank: int, processes: int) -> Evaluate:
    """`Trainer.evaluate` with all default built-ins, set-up and progress bar included."""
    from pa_core import Trainer

    trainer = Trainer(net, loss_func, None, plugins=())

    def evaluate() -> float:
        return float(trainer.evaluate(dataset, BATCH_SIZE)["evaluation_loss"])

    return evaluate


EVALUATORS: Mapping[str, Callable[..., Evaluate]] = {
    "hand": evaluate_by_hand,
    "pa-core": evaluate_here,
}


def time_evaluation(name: str, samples: int, rank: int, processes: int) -> dict[str, Any]:
    """Evaluate twice and time the second one, in microseconds per batch of each process."""
    import torch

    loss_func, dataset = torch.nn.CrossEntropyLoss(), make_dataset("tensor", samples)
    evaluate = EVALUATORS[name](make_net(), loss_func, dataset, rank, processes)
    evaluate()
    if processes > 1:
        torch.distributed.barrier()
    start, on_processor = time.perf_counter(), time.process_time()
    loss = evaluate()
    to_us = 1e6 * BATCH_SIZE * processes / samples
    us, cpu_us = (time.perf_counter() - start) * to_us, (time.process_time() - on_processor) * to_us
    return {"us": us, "typical_us": us, "cpu_us": cpu_us, "loss": loss}


# -- The processes --------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """Measure everything in this process, one of several; rank 0 writes the result to a file."""
    import torch

    torch.set_num_threads(1)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if args.pin:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.distributed.init_process_group("gloo")
    number_of = "one process" if processes == 1 else "two processes"
    training, evaluation = f"training, {number_of}", f"evaluation, {number_of}"
    records: list[dict[str, Any]] = []

    def note(number: int, what: str, name: str, measured: dict[str, Any]) -> None:
        record = {"what": what, "contender": name, "round": number, **measured}
        by_hand = [r for r in records if (r["what"], r["contender"]) == (what, "hand")]
        tolerance = LOSS_TOLERANCE if what == training else 1e-5
        if by_hand and not math.isclose(record["loss"], by_hand[0]["loss"], rel_tol=tolerance):
            raise BenchmarkError(f"{name}: loss {record['loss']}, not {by_hand[0]['loss']}")
        records.append(record)

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for number in range(args.rounds):
            # Reverse the order in every other round, so that no contender gains by its place.
            turn = slice(None, None, -1 if number % 2 else 1)
            for name in args.only[turn] if processes > 1 else ():
                note(number, training, name, time_training(name, args.samples, processes, folder))
            for name in list(EVALUATORS)[turn]:
                if name in args.only:
                    note(
                        number,
                        evaluation,
                        name,
                        time_evaluation(name, args.samples, rank, processes),
                    )
    if rank == 0:
        args.result.write_text(json.dumps(records))
    torch.distributed.barrier()


def start(processes: int, args: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """Start the processes with torchrun and return their measurements."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder, "result.json"), Path(folder, "output.txt")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), "-m", "benchmarks.distributed"]
        command += ["--result", str(result), "--rounds", str(args.rounds)]
        command += ["--samples", str(args.samples), "--only", *names]
        command += ["--pin"] if args.pin else []
        with output.open("wb") as file:
            code = subprocess.run(
                command, check=False, stdout=file, stderr=subprocess.STDOUT, env=environment
            ).returncode
        if code:
            raise BenchmarkError(output.read_text(errors="replace")[-4000:])
        measured: list[dict[str, Any]] = json.loads(result.read_text())
        return measured


def bounds(values: list[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median.

    It uses order statistics only, so it holds for any distribution: Conover, Practical
    Nonparametric Statistics (1999), section 3.2, with the normal approximation. For fewer than six
    values it is their range.
    """
    ordered, number = sorted(values), len(values)
    rank = max(0, math.floor((number - 1.96 * math.sqrt(number)) / 2))
    return ordered[rank], ordered[-1 - rank]


def ratio(ratios: list[float]) -> str:
    """The median with its confidence interval, as text."""
    return "{:.2f} ({:.2f} to {:.2f})".format(statistics.median(ratios), *bounds(ratios))


def table(records: list[dict[str, Any]]) -> str:
    """The measurements as a Markdown table."""
    measures = ("µs a step", "typical step", "CPU µs a step")
    lines = ["| what | system | " + "".join(f"{name} | / hand | " for name in measures) + "loss |"]
    lines.append("| --- | --- |" + " ---: |" * (2 * len(measures) + 1))
    by_hand = {(r["what"], r["round"]): r for r in records if r["contender"] == "hand"}
    for what, name in dict.fromkeys((r["what"], r["contender"]) for r in records):
        runs = [r for r in records if (r["what"], r["contender"]) == (what, name)]
        cells = [what, name]
        for key in ("us", "typical_us", "cpu_us"):
            cells.append(f"{statistics.median(run[key] for run in runs):.0f}")
            pairs = [(run, by_hand.get((what, run["round"]))) for run in runs]
            ratios = [run[key] / base[key] for run, base in pairs if base is not None]
            cells.append("1.00" if name == "hand" else ratio(ratios) if ratios else "")
        cells.append(f"{statistics.median(run['loss'] for run in runs):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure on one and on two processes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all contenders (5)")
    parser.add_argument("--samples", type=int, default=6400, help="samples per epoch (6400)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--pin", action="store_true", help="one core per process (Linux)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements here")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.samples < 2 * BATCH_SIZE or args.samples % (2 * BATCH_SIZE):
        parser.error(f"--samples must be a multiple of both processes' batches, {2 * BATCH_SIZE}")
    if args.pin and len(os.sched_getaffinity(0)) < 2:
        parser.error("--pin needs two cores")
    if args.result:  # this is one of the measured processes
        work(args)
        return 0
    names = [name for name in NAMES if name in args.only]
    for name in tuple(names):
        if importlib.util.find_spec(CONTENDERS[name].module) is None:
            print(f"{name}: skipped, {CONTENDERS[name].distribution} is not installed")
            names.remove(name)
    records = [record for processes in (1, 2) for record in start(processes, args, names)]
    print(table(records))
    machine, packages = describe_machine("cpu"), versions(names)
    how = "one thread on its own core" if args.pin else "one thread"
    print(f"\nRounds: {args.rounds}; batch {BATCH_SIZE} on each process, {how}, no workers.")
    print(", ".join(f"{key} {value}" for key, value in (machine | packages).items()))
    if args.json:
        report = {"machine": machine, "versions": packages, "runs": records}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
