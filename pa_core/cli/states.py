"""``pa states``: list the training states in a folder, and remove old ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from pa_core.checkpoint import atomic_io
from pa_core.checkpoint.listing import describe_states, readable_age, readable_size
from pa_core.checkpoint.retention import Retention
from pa_core.checkpoint.storage import recover_replaced
from pa_core.cli.console import console, print_json, print_table, printable
from pa_core.errors import TrainingStateError


def show_states(
    folder: Path,
    *,
    every_byte: bool,
    as_json: bool,
    prune: bool,
    keep: int | None,
    yes: bool,
) -> None:
    """List the states of a folder, after removing old ones if that is asked for.

    Args:
        folder: a folder of states, or a single one.
        every_byte: whether to check the files' hashes.
        as_json: whether to print JSON.
        prune: whether to remove states beyond `keep`, and leftovers.
        keep: the number of intact states to keep.
        yes: whether to remove without a prompt.

    Raises:
        TrainingStateError: if no state is intact, or of `prune` and `keep` only one is given.
    """
    removed = _prune(folder, keep, yes, quiet=as_json) if prune else []
    if keep is not None and not prune:
        raise TrainingStateError("--keep needs --prune: it sets how many states --prune keeps")
    rows = describe_states(folder, every_byte=every_byte)
    if as_json:
        print_json({"folder": str(folder), "states": rows, "removed": list(map(str, removed))})
    else:
        _show(rows)
    if not any(row["intact"] for row in rows):
        raise TrainingStateError(f"No state in {folder} is intact")


def _prune(folder: Path, keep: int | None, yes: bool, *, quiet: bool) -> list[Path]:
    """Remove surplus states and leftovers, after a prompt; the newest intact state is kept."""
    if keep is None:
        raise TrainingStateError("--prune needs --keep N, the number of intact states to keep")
    recover_replaced(folder)  # a state moved aside for one that was never written isn't a leftover
    removable = [*Retention().surplus(folder, keep), *atomic_io.find_leftovers(folder)]
    if not quiet:
        for path in removable:
            console().print(f"{'Removing' if yes else 'To be removed:'} {path}")
    if not removable or not (yes or (not quiet and typer.confirm("Remove them?"))):
        return []
    for path in removable:
        if path.name.startswith("."):
            atomic_io.remove_leftover(path)
        else:
            atomic_io.remove_whole(path)
    return removable


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.text import Text

    out = console()
    cells = []
    for row in rows:
        plugins = row["plugins"]
        cells.append(
            [
                "yes" if row["intact"] else "no",
                row["name"],
                *("?" if row[key] is None else str(row[key]) for key in ("epoch", "update")),
                readable_size(row["size"]),
                "?" if row["age"] is None else readable_age(row["age"]),
                row["resume"] or "?",
                "?" if plugins is None else ", ".join(plugins) or "none",
            ]
        )
    header = ("intact", "state", "epoch", "update", "size", "age", "resume", "plugins")
    print_table(out, header, cells, whole=(0, 1, 2, 3, 4))
    for row in rows:
        for problem in row["problems"]:
            out.print(Text(printable(problem), style="red"))
