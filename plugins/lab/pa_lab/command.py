"""The commands ``pa check`` and ``pa verify-resume``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# An app of one command, as only a command has context settings.
check_app = typer.Typer()
verify_resume_app = typer.Typer()


@check_app.command(context_settings={"ignore_unknown_options": True})
def check(
    script: Annotated[
        Path | None,
        typer.Argument(metavar="SCRIPT", exists=True, dir_okay=False, help="A script that trains."),
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="The script's arguments.")
    ] = None,
) -> None:
    """Dry-run a script and report what would fail.

    Without a script, check the settings and the plugins of this folder. With one, run it for one
    update, one evaluation batch, and one save and load of a training state; its Trainer checks the
    settings together with what the script passes to it.

    Exit code: 0 if no problems were found, 1 if there are problems, 2 for wrong usage.
    """
    from pa_lab.check import check_script, check_settings

    if script is None:
        problems = check_settings(Path.cwd())
    else:
        report, problems = check_script(script, arguments or [])
        if report:
            typer.echo(report)
    for problem in problems:
        typer.secho(f"error  {problem}", fg="red")
    count = len(problems)
    typer.echo(f"{count or 'No'} {'problem' if count == 1 else 'problems'} found.")
    if problems:
        raise typer.Exit(1)


@verify_resume_app.command(
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False}
)
def verify_resume(
    context: typer.Context,
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="A script that trains; its arguments follow.")
    ],
    updates: Annotated[int, typer.Option(help="Compare after this many updates.", min=2)] = 20,
    at: Annotated[
        int | None,
        typer.Option(help="Kill the run after this update; by default half of --updates."),
    ] = None,
) -> None:
    """Compare a killed and resumed run with a whole one.

    Kills a run of the script, resumes it from its last training state, and compares the result with
    that of an uninterrupted run. Options come before the script; everything after it belongs to the
    script.

    Exit code: 0 if both runs are the same bit for bit, 1 if they differ, 2 if the script can't be
    run that far.
    """
    from pa_lab.verify_resume import CannotVerifyError
    from pa_lab.verify_resume import verify_resume as verify

    try:
        same, report = verify(script, context.args, updates, at)
    except CannotVerifyError as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(2) from None
    typer.echo(report)
    if not same:
        raise typer.Exit(1)
