"""What a run's time is spent on: each plugin, each part of a step, and waiting for data."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from pa_core.checkpoint import atomic_io
from pa_core.diagnostics.device_syncs import watch_device_syncs
from pa_core.diagnostics.stopwatch import Spent, Stopwatch
from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback

if TYPE_CHECKING:
    from pa_core.plugins.implementations import Call, Implementation
    from pa_core.trainer import Trainer

_PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "saving", "loop")
_OF_A_STEP = ("data", "forward", "backward", "optimizer", "loop")
_METHODS = {
    "calculate_train_batch_loss": "forward",
    "backward_step": "backward",
    "_clip_gradients": "optimizer",
    "optimizer_step": "optimizer",
    "scheduler_step": "optimizer",
    "optimizer_zero_grad": "optimizer",
    "_run_eval_epochs": "evaluation",
    "save_checkpoint": "saving",
    "_run_train_epoch": "loop",
}
"""The Trainer's methods, and the phase that each belongs to."""

_MUCH_WAITING = 0.1
_LOOK_EVERY = 10
_SMALL_SHARE = 0.001  # of the run; what costs less is printed as one row
_END = object()


class ProfileSettings(CallbackSettings):
    """Settings of the built-in plugin `profile`."""

    to_json: Path | None = Field(None, description="A file for the report, as JSON.")
    trace: Path | None = Field(
        None, description="A file for a trace of some steps, to be opened in Perfetto."
    )
    trace_start: int = Field(
        10, ge=0, description="Micro-batches of the run before those that are traced."
    )
    trace_steps: int = Field(5, ge=1, description="How many micro-batches are traced.")


class ProfileCallback(ConfigurableCallback):
    """Tells at a run's end what its time was spent on, and which plugins wait for the device.

    Times are the host's, and each is less the times within it, so that they add up. A GPU computes
    beside the host: there they tell what starting the work costs, and the trace what the work does.

    Args:
        to_json: a file for the report; the main process writes it.
        trace: a file for a Chrome trace of some steps, for https://ui.perfetto.dev.
        trace_start: micro-batches of the run before those that are traced.
        trace_steps: how many micro-batches are traced.
    """

    Settings = ProfileSettings
    changes_training = False

    def __init__(
        self,
        to_json: str | Path | None = None,
        trace: str | Path | None = None,
        trace_start: int = 10,
        trace_steps: int = 5,
    ) -> None:
        self.to_json, self.trace = to_json, trace
        self.trace_start, self.trace_steps = trace_start, trace_steps
        self._reset()

    def _reset(self) -> None:
        self._watch = Stopwatch()
        self._hooks: dict[str, tuple[str, str]] = {}  # the stopwatch's name -> plugin, hook
        self._waits: dict[tuple[str, str], list[int]] = {}  # plugin, hook -> found, looked at
        self._epochs: list[dict[str, Any]] = []
        self._epoch: int | None = None
        self._before: dict[str, float] = {}
        self._steps = self._steps_before = 0
        self._start = self._epoch_start = time.perf_counter()
        self._seconds: float | None = None
        self._workers, self._device = 0, torch.device("cpu")
        self._is_evaluating = self._traces = False
        self._profiler: Any = None

    # -- Measuring ------------------------------------------------------------------------------

    @hookimpl(wrapper=True, tryfirst=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        self._reset()
        self._traces = self.trace is not None and trainer.is_main_process
        self._workers = (trainer._train_dl_kwargs or {}).get("num_workers") or 0
        with self._timing(trainer):
            result = yield
        self._close_epoch()
        self._seconds = time.perf_counter() - self._start
        self._tell(trainer)
        return result

    @hookimpl(tryfirst=True)
    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # Only now is the last one over: what is saved for it is saved after its events.
        self._close_epoch()
        self._epoch = trainer.run_history.current_epoch

    def _close_epoch(self) -> None:
        if self._epoch is None:
            return
        now, phases = time.perf_counter(), self._phases()
        self._epochs.append(
            {
                "epoch": self._epoch,
                "seconds": now - self._epoch_start,
                "steps": self._steps - self._steps_before,
                "phases": {name: phases[name] - self._before.get(name, 0.0) for name in phases},
            }
        )
        self._before, self._epoch_start, self._steps_before = phases, now, self._steps

    def _phases(self) -> dict[str, float]:
        """Seconds of each phase so far, those of the plugins together."""
        spent = self._watch.spent
        phases = {name: spent[name].seconds if name in spent else 0.0 for name in _PHASES}
        return phases | {"plugins": sum(spent[name].seconds for name in self._hooks)}

    @contextmanager
    def _timing(self, trainer: Trainer) -> Iterator[None]:
        """Time the trainer's methods and its plugins; everything is as before in the end."""
        owners: list[tuple[Any, str, str]] = [
            (trainer, method, phase) for method, phase in _METHODS.items()
        ]
        owners += [(trainer._saver, method, "saving") for method in ("save", "wait")]
        kept = [(owner, name, vars(owner).get(name, _END)) for owner, name, _ in owners]
        kept.append((trainer._engine, "moved", vars(trainer._engine).get("moved", _END)))
        for owner, name, phase in owners:
            setattr(owner, name, self._watch.timed(phase, getattr(owner, name)))
        self._time_data(trainer)
        self._device = trainer.device
        trainer.plugins.wrap_calls(self._around)
        try:
            yield
        finally:
            trainer.plugins.unwrap_calls(self._around)
            for owner, name, value in kept:
                if value is _END:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)
            self._end_trace()

    def _time_data(self, trainer: Trainer) -> None:
        """Time each look for the next training batch; those of an evaluation belong to it."""
        moved, evaluate = trainer._engine.moved, trainer._run_eval_epochs

        def evaluate_apart(*args: Any, **kwargs: Any) -> None:
            before, self._is_evaluating = self._is_evaluating, True
            try:
                evaluate(*args, **kwargs)
            finally:
                self._is_evaluating = before

        def timed(batches: Iterator[Any]) -> Iterator[Any]:
            iterator = moved(batches)
            return iterator if self._is_evaluating else self._timed_batches(iterator)

        trainer._run_eval_epochs = evaluate_apart  # type: ignore[method-assign]
        trainer._engine.moved = timed  # type: ignore[method-assign]

    def _timed_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            self._trace_step()
            with self._watch.lap("data"):
                batch = next(batches, _END)
            if batch is _END:
                return
            self._steps += 1
            yield batch

    def _around(self, found: Implementation) -> Call:
        """A plugin's call, timed; now and then it is looked at whether it waits."""
        device = self._device
        if found.name == "pa_core" or found.plugin is self:
            return found.call
        name = f"{found.name}: {found.hook}"
        self._hooks[name] = found.name, found.hook
        self._watch.spent.setdefault(name, Spent())
        if found.wrapper:
            return self._watch.timed_wrapper(name, found.call)
        timed = self._watch.timed(name, found.call)
        of_step = "_step_" in found.hook or "_backward_" in found.hook
        # Built-ins read a value at once where it costs nothing, on a CPU, and there alone.
        if not of_step or (device.type != "cuda" and found.source.origin == "built-in"):
            return timed
        counts = self._waits.setdefault((found.name, found.hook), [0, 0])
        spent = self._watch.spent[name]

        def call(arguments: dict[str, Any]) -> Any:
            # Not always: it slows what the plugin does with tensors.
            if spent.count % _LOOK_EVERY:
                return timed(arguments)
            with watch_device_syncs(device) as waits:
                result = timed(arguments)
            counts[0] += bool(waits)
            counts[1] += 1
            return result

        return call

    # -- A trace of some steps ------------------------------------------------------------------

    def _trace_step(self) -> None:
        """Begin and end the trace where its time has come; called before each micro-batch."""
        if not self._traces:
            return
        if self._profiler is None and self._steps == self.trace_start:
            self._profiler = torch.profiler.profile(acc_events=True)
            self._profiler.start()
            self._watch.label = torch.profiler.record_function
        elif self._watch.label is not None and self._steps == self.trace_start + self.trace_steps:
            self._end_trace()

    def _end_trace(self) -> None:
        if self._watch.label is None:
            return
        self._watch.label = None
        self._profiler.stop()
        file = Path(str(self.trace))
        file.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(file))

    # -- Telling --------------------------------------------------------------------------------

    @hookimpl
    def calculate_costs(self, trainer: Trainer) -> dict[str, Any]:
        return self.report()

    def report(self) -> dict[str, Any]:
        """What the last run's time was spent on, as plain data; times in seconds.

        Returns:
            ``device``, ``seconds`` and ``steps`` (micro-batches) of the run; ``phases`` and
            ``hooks``, lists of rows with ``count``, ``seconds``, ``mean``, ``per_step`` and
            ``share`` of the run; ``data_wait``, the share of the training steps' time spent
            waiting for the next batch; ``advice`` on that, or None; ``epochs``, a row for each;
            ``waits``, the plugins' hooks that waited for the device, ``found`` times in
            ``looked_at`` calls; where it is no GPU, those that read values of tensors, for which
            a GPU would make them wait.
        """
        seconds = self._seconds
        if seconds is None:
            seconds = time.perf_counter() - self._start
        spent = self._watch.spent
        phases = [
            {"phase": name} | _row(spent[name], seconds, self._steps)
            for name in _PHASES
            if name in spent
        ]
        rest = Spent(1, seconds - sum(one.seconds for one in spent.values()))
        phases.append({"phase": "rest"} | _row(rest, seconds, self._steps))
        hooks = [
            {"plugin": plugin, "hook": hook} | _row(spent[name], seconds, self._steps)
            for name, (plugin, hook) in self._hooks.items()
            if spent[name].count
        ]
        return {
            "device": self._device.type,
            "seconds": seconds,
            "steps": self._steps,
            "phases": phases,
            "hooks": sorted(hooks, key=lambda row: -float(row["seconds"])),
            "data_wait": self._data_wait(),
            "advice": self._advice(),
            "epochs": self._epochs,
            "waits": [
                {"plugin": plugin, "hook": hook, "found": found, "looked_at": looked_at}
                for (plugin, hook), (found, looked_at) in self._waits.items()
                if found
            ],
        }

    def _data_wait(self) -> float:
        spent = self._watch.spent
        of_steps = [name for name in _OF_A_STEP if name in spent]
        of_steps += [
            name
            for name, (_, hook) in self._hooks.items()
            if hook.startswith(("on_train_step_", "on_backward_", "on_optimizer_step_"))
        ]
        total = sum(spent[name].seconds for name in of_steps)
        return spent["data"].seconds / total if total else 0.0

    def _advice(self) -> str | None:
        wait = self._data_wait()
        if wait <= _MUCH_WAITING:
            return None
        more = f"more than {self._workers}" if self._workers else "4"
        return (
            f"{wait:.0%} of the steps' time was spent waiting for data: where reading and decoding "
            f"cost, give train_dataloader_kwargs={{'num_workers': …}}, {more} say; data that fits "
            "in memory is fastest as tensors in a TensorDataset"
        )

    def _tell(self, trainer: Trainer) -> None:
        report = self.report()
        trainer.print(as_text(report))
        if self._traces and self._profiler is None:
            trainer.print(
                f"There is no trace: the run had {self._steps} micro-batches, and it begins after "
                f"trace_start = {self.trace_start}"
            )
        if self.to_json is not None and trainer.is_main_process:
            text = json.dumps(report, indent=2)
            atomic_io.save_file(self.to_json, lambda path: path.write_text(text, encoding="utf-8"))


def _row(spent: Spent, seconds: float, steps: int) -> dict[str, Any]:
    return {
        "count": spent.count,
        "seconds": spent.seconds,
        "mean": spent.seconds / spent.count if spent.count else 0.0,
        "share": spent.seconds / seconds if seconds else 0.0,
        "per_step": spent.seconds / steps if steps else 0.0,
    }


def as_text(report: dict[str, Any]) -> str:
    """A report of `ProfileCallback` as tables, for people."""
    out = io.StringIO()
    console = Console(file=out, width=100, markup=False, highlight=False)
    console.print(f"\nProfile: {report['seconds']:.2f} s, {report['steps']} micro-batches")
    table = _table("part of the run")
    for row in report["phases"]:
        table.add_row(row["phase"], *_cells(row))
    console.print(table)
    if report["hooks"]:
        table = _table("plugin: hook")
        rest = []
        for row in report["hooks"]:
            if row["share"] < _SMALL_SHARE:
                rest.append(row)
            else:
                table.add_row(f"{row['plugin']}: {row['hook']}", *_cells(row))
        if rest:
            seconds = sum(row["seconds"] for row in rest)
            table.add_row(f"{len(rest)} more, below {_SMALL_SHARE:.1%} each", "", f"{seconds:.3f}")
        console.print(table)
    if len(report["epochs"]) > 1:
        table = Table("epoch", "seconds", *report["epochs"][0]["phases"], box=None, pad_edge=False)
        for row in report["epochs"]:
            shown = (f"{seconds:.3f}" for seconds in row["phases"].values())
            table.add_row(str(row["epoch"]), f"{row['seconds']:.3f}", *shown)
        console.print(table)
    on_gpu = report["device"] == "cuda"
    does = "waits for the device" if on_gpu else "reads values (a GPU would make it wait)"
    for row in report["waits"]:
        console.print(
            f"{row['plugin']} {does} in {row['hook']}: in {row['found']} of the "
            f"{row['looked_at']} calls that were looked at"
        )
    if report["advice"]:
        console.print(report["advice"])
    return out.getvalue().rstrip()


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, min_width=45, overflow="fold")  # so that both have equal columns
    for column in ("calls", "seconds", "a call, µs", "a step, µs", "share"):
        table.add_column(column, justify="right")
    return table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    each, step = row["mean"] * 1e6, row["per_step"] * 1e6
    return (
        str(row["count"]),
        f"{row['seconds']:.3f}",
        f"{each:.0f}",
        f"{step:.0f}",
        f"{row['share']:.1%}",
    )
