"""The command ``pa report``: compare runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Reports, folders of reports (all are used), training states, or folders of "
            "training states (the newest is used).",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path(
        "comparison.html"
    ),
    title: Annotated[str, typer.Option(help="The page's title.")] = "Comparison of runs",
) -> None:
    """Compare runs in one HTML file.

    For a single run, write its report.

    Exit code: 1 if a run can't be read, or the file can't be written.
    """
    from pa_report.comparison_page import comparison_page
    from pa_report.files import read_run, reports_in
    from pa_report.page import save_page
    from pa_report.run import with_unique_names
    from pa_report.run_page import run_page

    paths = [path for given in runs for path in reports_in(given)]
    found = with_unique_names([read_run(path) for path in paths])
    page = comparison_page(found, title) if len(found) > 1 else run_page(found[0])
    if output.resolve() in [path.resolve() for path in paths]:
        _fail(f"{output} is one of the runs: choose another file with --output")
    try:
        save_page(output, page)
    except OSError as error:
        _fail(f"Can't write {output}: {error}")
    typer.echo(f"Written to {output}")


def _fail(message: str) -> None:
    typer.secho(message, fg="red", err=True)
    raise typer.Exit(1)
