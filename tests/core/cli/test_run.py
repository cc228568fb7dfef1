"""``pa run``: a script with other settings or plugins."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from pa_core.cli import app as cli
from pa_core.cli.run import ScriptRequest
from tests.warm import start_warm

SCRIPT = """
import os
import pickle
import sys
from beside import NUMBER

class Kept:
    pass

print(NUMBER, __name__, __file__, sys.argv, sys.path[0] == os.path.dirname(__file__))
print(sys.modules["__main__"].Kept is Kept, type(pickle.loads(pickle.dumps(Kept()))) is Kept)
if "interrupt" in sys.argv:
    raise KeyboardInterrupt
if "leave" in sys.argv:
    sys.exit(7)

from tests.builtin_trainer import make_trainer
from tests.helpers import tiny_data

trainer = make_trainer(plugins=None)
trainer.train(tiny_data(16), 1)
print("updates", trainer.updates, "seed", trainer.seed, list(trainer.plugins.by_name))
"""
RUN = [
    *("run", "--set", "train.num_epochs=3 updates", "--set=trainer.seed=9"),
    *("--plugin", "overfit", "--plugin", "model_summary", "--disable", "early_stopping"),
]


@pytest.fixture
def folder(tmp_path):
    """A project whose script is in a subfolder."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src/train.py").write_text(SCRIPT)
    (tmp_path / "src/beside.py").write_text("NUMBER = 5\n")
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pa-core]\nplugins = ['early_stopping']\n[tool.pa-core.trainer]\nseed = 3\n"
    )
    return tmp_path


def test_a_script_runs_as_python_runs_it_with_other_settings(folder):
    script = str(folder / "src/train.py")
    given = {"PA_CORE_SET": "trainer.seed=8\noverfit.num_batches=1", "PA_CORE_PLUGINS": "overfit"}
    arguments = [*RUN, script, "--set", "a", "--", "--plugin"]
    (ended,) = start_warm("pa_core", *arguments, folder=folder, environment=given)
    assert ended.returncode == 0
    assert ended.stderr.splitlines() == [
        "pa run: adds overfit, model_summary",
        "pa run: leaves out early_stopping",
        "pa run: sets trainer.seed = 9 instead of 3",
        "pa run: sets train.num_epochs = '3 updates'",
        "pa run: sets overfit.num_batches = 1",
    ]
    lines = ended.stdout.splitlines()
    assert lines[0] == f"5 __main__ {script} {[script, '--set', 'a', '--', '--plugin']} True"
    assert lines[1] == "True True"
    assert lines[-1] == "updates 3 seed 9 ['overfit', 'model_summary']"
    (line,) = [line for line in lines if line.startswith("Plugins: ")]
    assert line.endswith(
        "(settings: pyproject.toml; PA_CORE_PLUGINS: overfit, model_summary, "
        "-early_stopping; PA_CORE_SET: trainer.seed = 9, overfit.num_batches = 1, "
        "train.num_epochs = '3 updates')"
    )


@pytest.mark.distributed
def test_it_runs_a_script_on_several_processes(folder):
    ended = start_warm("pa_core", *RUN, folder / "src/train.py", folder=folder, processes=2)
    for rank, process in enumerate(ended):
        assert process.returncode == 0, process.stderr
        assert "updates 3 seed 9 ['overfit', 'model_summary']" in process.stdout
        assert ("Plugins: overfit" in process.stdout) == (rank == 0)
        assert ("pa run: adds overfit" in process.stderr) == (rank == 0)


def test_what_a_script_raises_ends_it_as_in_python(folder):
    script = folder / "src/train.py"
    (left,) = start_warm("pa_core", "run", script, "leave", folder=folder)
    assert (left.returncode, left.stderr) == (7, "")
    (interrupted,) = start_warm("pa_core", "run", script, "interrupt", folder=folder)
    assert interrupted.returncode != 0
    assert interrupted.stderr.rstrip().endswith("KeyboardInterrupt")
    (wrong,) = start_warm("pa_core", "run", "--set", "trainer.sead=1", script, folder=folder)
    assert wrong.returncode == 1
    assert "Traceback" in wrong.stderr
    assert "(sead from PA_CORE_SET) has no key 'sead'. Did you mean 'seed'?" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.py"], "Script not found: nowhere.py"),
        (["run", "--set", "seed=1", "src/train.py"], "'seed=…' is not a setting: expected table"),
        (["run", "--set", "a.token=hidden", "."], "Script not found: ."),
    ],
)
def test_mistakes_end_it_before_the_script_starts(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["pa", *arguments])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.out == ""


def test_options_after_the_script_are_its_own(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [])
    for variable in ("PA_CORE_SET", "PA_CORE_PLUGINS"):
        monkeypatch.setenv(variable, "")
    result = CliRunner().invoke(cli.app, ["run", "src/train.py", "--help"])
    assert isinstance(result.exception, ScriptRequest)
    assert sys.argv == ["src/train.py", "--help"]
    helped = CliRunner().invoke(cli.app, ["run", "--help"])
    assert "SCRIPT" in helped.output
    unknown = CliRunner().invoke(cli.app, ["run", "--sett", "a.b=1", "src/train.py"])
    assert unknown.exit_code == 2
