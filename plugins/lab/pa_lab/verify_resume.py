"""``pa verify-resume``: compare a killed and resumed run with an uninterrupted one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pa_core.errors import PaCoreError
from pa_lab.diff import Difference, compare_states
from pa_lab.verify_resume_run import NOTES, Plan

_SHOWN = 5
"""How many differences are listed."""


class CannotVerifyError(PaCoreError):
    """The script can't be run as far as the comparison needs."""


def verify_resume(
    script: str, arguments: list[str], updates: int = 20, at: int | None = None
) -> tuple[bool, str]:
    """Run a script; run it again, kill it and resume it; compare the two runs bit for bit.

    Args:
        script: the script, which calls `Trainer.train`; the first call counts.
        arguments: the script's arguments.
        updates: compare the runs after this many updates, or at their end if that comes first.
        at: kill the second run after this update; by default half of `updates`.

    Returns:
        Whether both runs are the same, and the report.

    Raises:
        CannotVerifyError: if the script fails by itself, or ends too early.
    """
    at = updates // 2 if at is None else at
    if not 0 < at < updates:
        raise CannotVerifyError(f"--at must be between 1 and {updates - 1}, not {at}")
    if not Path(script).is_file():
        raise CannotVerifyError(f"Script not found: {script}")
    with tempfile.TemporaryDirectory(prefix="pa-verify-resume-") as name:
        folder = Path(name)
        output = str(folder / "output")
        whole, killed, resumed = (folder / part for part in ("whole", "killed", "resumed"))
        first = _run(Plan(str(whole), str(folder / "other"), at, updates), script, arguments)
        total = first["updates"]
        if not (whole / "at").is_dir() or total <= at:
            raise CannotVerifyError(f"The run ends after {total} updates: set --at below {total}")
        second = _run(Plan(str(killed), output, at, at), script, arguments)
        found = compare_states(whole / "at", killed / "end", ignore_plugins=first["savers"])
        # Without a seed, Python's and NumPy's generators differ from process to process. If
        # training draws from them, other values differ too.
        before = [item for item in found if not _is_host_generator(item)]
        is_unseeded = len(before) < len(found)
        # Plugins that only observe may measure times, which differ between any two runs.
        observers = {f"plugin {name!r}" for name in first["observers"]}
        measured = {_place(item) for item in before if item.part in observers}
        before = [item for item in before if _place(item) not in measured]
        if before:
            return False, _report_before(before, first, second, at)
        try:
            third = _run(
                Plan(str(resumed), output, at, updates, str(killed / "end")), script, arguments
            )
        except CannotVerifyError as error:
            return False, f"The run can't be resumed from update {at}. {error}"
        after = compare_states(whole / "end", resumed / "end", ignore_plugins=first["savers"])
        after = [item for item in after if not _is_measured(item, measured)]
        if is_unseeded:
            after = [item for item in after if not _is_host_generator(item)]
        if after:
            return False, _report_after(after, (first, second, third), at)
        return True, (
            f"Both runs are the same, bit for bit: {total} updates without interruption, and {at} "
            f"updates, a kill, and {total - at} more after resuming. Compared: weights, optimizer, "
            "scheduler, run history, random generators and the state of every plugin"
            f"{_except(measured)}."
        )


def _is_host_generator(found: Difference) -> bool:
    return found.part.startswith("random generators") and found.name.startswith(("python", "numpy"))


def _place(found: Difference) -> tuple[str, str]:
    """The part and the name of a difference, for any position in a list."""
    return found.part, re.sub(r"\d+", "#", found.name)


def _is_measured(found: Difference, measured: set[tuple[str, str]]) -> bool:
    """Whether a difference is at a measured place, or a float of a plugin that measures.

    Some places, such as the duration of an evaluation, have no value before the interruption.
    """
    return _place(found) in measured or (
        found.part in {part for part, _ in measured}
        and all(_is_float(value) for value in (found.first, found.second))
    )


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not text.lstrip("-").isdigit()


def _except(measured: set[tuple[str, str]]) -> str:
    """The end of a sentence: whose measurements were not compared."""
    plugins = sorted({part.removeprefix("plugin ") for part, _ in measured})
    if not plugins:
        return ""
    return f", except what differs between any two runs in that of {', '.join(plugins)}"


def _run(plan: Plan, script: str, arguments: list[str]) -> dict[str, Any]:
    """Run the script by a plan, in a process group that doesn't outlive this call."""
    folder = Path(plan.folder)
    folder.mkdir()
    log = folder / "log"
    command = [sys.executable, "-m", "pa_lab.verify_resume_run", json.dumps(asdict(plan)), script]
    with log.open("wb") as file:
        child = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            child.wait()
        finally:
            if hasattr(os, "killpg"):
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # data-loader workers too
            child.wait()
    notes = folder / NOTES
    if not notes.exists():
        why = (
            f"failed with exit code {child.returncode}"
            if child.returncode
            else "ended without calling Trainer.train"
        )
        raise CannotVerifyError(f"{script} {why}.\n{_tail(log)}".rstrip())
    read: dict[str, Any] = json.loads(notes.read_text())
    return read


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _report_before(
    found: list[Difference], first: dict[str, Any], second: dict[str, Any], at: int
) -> str:
    unknown = (
        "The script draws random numbers that no seed reaches, initialises its model differently "
        "each time (call torch.manual_seed first), or reads a clock"
    )
    return _report(
        f"Two runs of this script differ at update {at}, before any interruption.",
        found,
        (first["losses"], second["losses"]),
        first["suspects"] or [unknown],
    )


def _report_after(found: list[Difference], notes: tuple[dict[str, Any], ...], at: int) -> str:
    whole, killed, resumed = notes
    saved, restored = killed["attributes"], resumed["attributes"]
    causes = [
        f"{name} was {saved[name]} at update {at} and is {restored.get(name, 'missing')} after "
        "resuming: save and load it in state_dict and load_state_dict"
        for name in saved
        # What differs in any two runs, such as a time, is not a cause.
        if saved[name] != restored.get(name) and saved[name] == whole["attributes"].get(name)
    ]
    causes += [cause for cause in whole["suspects"] if cause not in causes]
    return _report(
        f"The run killed at update {at} and resumed differs from the uninterrupted one.",
        found,
        (whole["losses"], killed["losses"] + resumed["losses"]),
        causes or [_cause_by_part(found[0], whole["scheduler"])],
    )


def _cause_by_part(first: Difference, scheduler: str) -> str:
    if first.part == "scheduler" or first.name.endswith((".lr", ".initial_lr")):
        return (
            f"The scheduler ({scheduler}) depends on something that its state_dict doesn't hold, "
            "such as the memory of a function that it calls"
        )
    if first.part.startswith("plugin"):
        return f"load_state_dict of the {first.part} doesn't restore what state_dict returned"
    if first.part.startswith("random"):
        return "Random numbers are drawn at other times than in the uninterrupted run"
    return "Training depends on something that no state holds: a global, a closure, or a file"


def _report(
    title: str,
    found: list[Difference],
    losses: tuple[list[list[Any]], list[list[Any]]],
    causes: list[str],
) -> str:
    lines = [title, "", "First differences:", *(f"  {item}" for item in found[:_SHOWN])]
    if len(found) > _SHOWN:
        lines.append(f"  … and {len(found) - _SHOWN} more")
    for (update, one), (_, other) in zip(*losses, strict=False):
        if one != other:
            values = float.fromhex(one), float.fromhex(other)
            lines += ["", f"The training loss differs from update {update}: %r and %r" % values]
            break
    return "\n".join([*lines, "", "Likely cause:", *(f"  {cause}." for cause in causes)])
