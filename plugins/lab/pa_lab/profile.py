"""Profile a run: the time of each plugin, of each part of a step, and of waiting for data."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from pa_core import hookimpl, hookspec
from pa_core.plugin import (
    CallbackSettings,
    ConfigurableCallback,
    LocalPath,
    Spent,
    Stopwatch,
    local_path,
    save_file,
    watch_device_syncs,
)

if TYPE_CHECKING:
    from pa_core import Trainer
    from pa_core.plugin import Implementation

_PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "saving", "loop")
_STEP_PHASES = ("data", "forward", "backward", "optimizer", "loop")
_LONG_DATA_WAIT = 0.1  # of the time of all steps; above this, the report advises
_WATCH_EVERY = 10  # calls; watching one for synchronisation slows its tensor operations
_SMALL_SHARE = 0.001  # of the run; hooks below it are printed as one row


class ProfileSettings(CallbackSettings):
    """The table ``[tool.pa-core.profile]``."""

    to_json: LocalPath | None = Field(None, description="File for the report, as JSON.")
    trace: LocalPath | None = Field(
        None, description="File for a trace of a few steps, to open in Perfetto."
    )
    trace_start: int = Field(
        10, ge=0, description="Number of micro-batches to run before the trace starts."
    )
    trace_steps: int = Field(5, ge=1, description="Number of micro-batches to trace.")


class ProfileCallback(ConfigurableCallback):
    """Reports at the end of a run where its time went, and which plugins synchronise.

    Times are measured on the host. Each excludes the times measured within it, so they add up to
    the run. A GPU computes asynchronously: there, the times say what launching the work costs, and
    the trace shows the work itself.

    Args:
        to_json: file for the report; the main process writes it.
        trace: file for a Chrome trace of a few steps, for https://ui.perfetto.dev.
        trace_start: number of micro-batches to run before the trace starts.
        trace_steps: number of micro-batches to trace.
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
        self.to_json = None if to_json is None else local_path(to_json)
        self.trace = None if trace is None else local_path(trace)
        self.trace_start, self.trace_steps = trace_start, trace_steps
        self._reset()

    def _reset(self) -> None:
        self._watch = Stopwatch()
        self._hooks: dict[str, tuple[str, str]] = {}  # the stopwatch's name -> plugin, hook
        self._syncs: dict[tuple[str, str], list[int]] = {}  # plugin, hook -> found, watched
        self._epochs: list[dict[str, Any]] = []
        self._epoch: int | None = None
        self._before: dict[str, float] = {}
        self._steps = self._steps_before = 0
        self._start = self._epoch_start = time.perf_counter()
        self._seconds: float | None = None
        self._workers, self._device = 0, torch.device("cpu")
        self._traces = False
        self._profiler: Any = None

    # -- Measuring ------------------------------------------------------------------------------

    @hookimpl(wrapper=True, tryfirst=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        self._reset()
        self._traces = self.trace is not None and trainer.is_main_process
        self._workers = getattr(trainer.train_dataloader, "num_workers", 0)
        with self._timing(trainer):
            result = yield
        self._close_epoch()
        self._seconds = time.perf_counter() - self._start
        self._report_end(trainer)
        return result

    @hookimpl(tryfirst=True)
    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # The previous epoch ends only now: its training state is saved after its last event.
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
        """Seconds of each phase so far, with all plugins as one phase."""
        spent = self._watch.spent
        phases = {name: spent[name].seconds if name in spent else 0.0 for name in _PHASES}
        return phases | {"plugins": sum(spent[name].seconds for name in self._hooks)}

    @contextmanager
    def _timing(self, trainer: Trainer) -> Iterator[None]:
        """Time the phases of the run and its plugins until the end of the block."""
        self._device = trainer.device
        with trainer.wrap_phases(self._timed_phase):
            trainer.plugins.wrap_calls(self._around)
            try:
                yield
            finally:
                trainer.plugins.unwrap_calls(self._around)
                self._end_trace()

    def _timed_phase(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return self._timed_fetch(call) if phase == "data" else self._watch.timed(phase, call)

    def _timed_fetch(self, fetch: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            self._trace_step()
            with self._watch.lap("data"):
                batch = fetch()
            self._steps += 1
            return batch

        return call

    def _around(self, found: Implementation) -> Callable[[dict[str, Any]], Any]:
        """A plugin's call, timed; in a step, every tenth is watched for synchronisation."""
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
        # Built-ins read a value early only where it is free, on a CPU.
        if not of_step or (device.type != "cuda" and found.source.origin == "built-in"):
            return timed
        counts = self._syncs.setdefault((found.name, found.hook), [0, 0])
        spent = self._watch.spent[name]

        def call(arguments: dict[str, Any]) -> Any:
            if spent.count % _WATCH_EVERY:
                return timed(arguments)
            with watch_device_syncs(device) as syncs:
                result = timed(arguments)
            counts[0] += bool(syncs)
            counts[1] += 1
            return result

        return call

    # -- The trace of a few steps ---------------------------------------------------------------

    def _trace_step(self) -> None:
        """Start or end the trace if it is due; called before each micro-batch."""
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

    # -- The report -----------------------------------------------------------------------------

    @hookimpl
    @hookspec(firstresult=True)
    def calculate_costs(self, trainer: Trainer) -> Mapping[str, Any] | None:
        """Calculate where the run's time has gone so far.

        A hook that this plugin adds and implements. Other plugins implement it, marked with
        ``@hookimpl(optionalhook=True)``, to answer instead; the first value that isn't None is
        used.

        Args:
            trainer: the trainer.

        Returns:
            Plain data: ``hooks``, rows with ``plugin`` and ``hook``, and ``phases``, rows with
            ``phase``, each with ``count``, ``seconds``, ``mean``, ``per_step`` and ``share`` of the
            run; ``advice``.

        When: whenever a plugin asks, such as `report`. Runs on: the process that asks.
        Collectives allowed: no. Reads the device: no.
        """
        return self.report()

    def report(self) -> dict[str, Any]:
        """Where the time of the last run went, as plain data; times in seconds.

        Returns:
            ``device``, ``seconds`` and ``steps`` (micro-batches) of the run; ``phases`` and
            ``hooks``, lists of rows with ``count``, ``seconds``, ``mean``, ``per_step`` and
            ``share`` of the run; ``data_wait``, the share of the training steps' time spent
            waiting for the next batch; ``advice`` on that, or None; ``epochs``, a row for each;
            ``waits``, the plugins' hooks that synchronised host and device, ``found`` times in
            ``looked_at`` calls. Without a GPU, these are the hooks that read values of tensors,
            which would synchronise on a GPU.
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
                for (plugin, hook), (found, looked_at) in self._syncs.items()
                if found
            ],
        }

    def _data_wait(self) -> float:
        spent = self._watch.spent
        of_steps = [name for name in _STEP_PHASES if name in spent]
        of_steps += [
            name
            for name, (_, hook) in self._hooks.items()
            if hook.startswith(("on_train_step_", "on_backward_", "on_optimizer_step_"))
        ]
        total = sum(spent[name].seconds for name in of_steps)
        return spent["data"].seconds / total if total else 0.0

    def _advice(self) -> str | None:
        wait = self._data_wait()
        if wait <= _LONG_DATA_WAIT:
            return None
        more = f"more than {self._workers}" if self._workers else "4"
        return (
            f"Training waited for data for {wait:.0%} of the steps' time. If reading or decoding "
            f"is slow, set train_dataloader_kwargs={{'num_workers': …}}, for example to {more}. "
            "Data that fits in memory is fastest as tensors in a TensorDataset"
        )

    def _report_end(self, trainer: Trainer) -> None:
        report = self.report()
        trainer.print(as_text(report))
        if self._traces and self._profiler is None:
            trainer.print(
                f"No trace was written: the run had {self._steps} micro-batches, and the trace "
                f"starts after trace_start = {self.trace_start}"
            )
        if self.to_json is not None and trainer.is_main_process:
            text = json.dumps(report, indent=2)
            save_file(self.to_json, lambda path: path.write_text(text, encoding="utf-8"))


def _row(spent: Spent, seconds: float, steps: int) -> dict[str, Any]:
    return {
        "count": spent.count,
        "seconds": spent.seconds,
        "mean": spent.seconds / spent.count if spent.count else 0.0,
        "share": spent.seconds / seconds if seconds else 0.0,
        "per_step": spent.seconds / steps if steps else 0.0,
    }


def as_text(report: dict[str, Any]) -> str:
    """A report of `ProfileCallback` as tables of text."""
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
            share = sum(row["share"] for row in rest)
            small = f"{len(rest)} more, below {_SMALL_SHARE:.1%} each"
            table.add_row(small, "", f"{seconds:.3f}", "", "", f"{share:.1%}")
        console.print(table)
    if len(report["epochs"]) > 1:
        table = Table("epoch", "seconds", *report["epochs"][0]["phases"], box=None, pad_edge=False)
        for row in report["epochs"]:
            shown = (f"{seconds:.3f}" for seconds in row["phases"].values())
            table.add_row(str(row["epoch"]), f"{row['seconds']:.3f}", *shown)
        console.print(table)
    on_gpu = report["device"] == "cuda"
    does = "synchronises with the device" if on_gpu else "reads values (this synchronises on a GPU)"
    for row in report["waits"]:
        console.print(
            f"{row['plugin']} {does} in {row['hook']}: in {row['found']} of "
            f"{row['looked_at']} watched calls"
        )
    if report["advice"]:
        console.print(report["advice"])
    return out.getvalue().rstrip()


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, min_width=45, overflow="fold")  # aligns both tables
    for column in ("calls", "seconds", "µs/call", "µs/step", "share"):
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
