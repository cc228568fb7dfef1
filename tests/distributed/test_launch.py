"""A script gives the same results and writes each file once, however it is launched."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.distributed.launch import ROOT, environment, flat, read_outcome, run, torchrun
from tests.distributed.machines import INTERFACE, address, two_machines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FILES = {
    "train.py": """
        import atexit
        import json
        import os
        from pathlib import Path

        @atexit.register  # before PyTorch is imported: runs last
        def write_threads():
            names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
            Path(f"threads-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(names))

        import torch
        from torch import nn
        from torch.utils.data import TensorDataset
        from pa_core import Trainer
        from pa_core.utils import local_process_zero_first

        @local_process_zero_first  # as for a download, before there is a Trainer
        def load():
            generator = torch.Generator().manual_seed(0)
            inputs = torch.randn(50, 8, generator=generator)
            return TensorDataset(inputs, (inputs.sum(1) > 0).long())

        def main():
            data = load()
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer)
            trainer.train(
                data,
                num_epochs=2,
                eval_dataset=data,
                per_device_batch_size=12 // trainer.num_processes,
            )
            predictions = trainer.predict(data)
            history, config = trainer.run_history, trainer.run_config
            if trainer.is_main_process:
                outcome = {
                    "train": history.get_metric_values("train_loss_epoch"),
                    "eval": history.get_metric_values("eval_loss_epoch"),
                    "weights": [value.tolist() for value in trainer.get_model().parameters()],
                    "predictions": predictions.tolist(),
                    "config": [config.num_processes, str(config.mixed_precision)],
                }
                with open("outcome.json", "w") as file:
                    json.dump(outcome, file)

        if __name__ == "__main__":
            main()
        """,
    # Each process records the files that it creates; the main one prints its events.
    "watch.py": """
        import json
        import os
        import sys
        from pa_core import TrainerCallback

        RENAMED = []
        sys.addaudithook(
            lambda event, args: event == "os.rename" and RENAMED.append(os.path.basename(args[1]))
        )

        class Watch(TrainerCallback):
            runs_on = "main"

            def __init__(self):
                self.epochs = 0

            def on_train_epoch_end(self, trainer):
                self.epochs += 1
                print("epoch end")

            def state_dict(self):
                print("state_dict")
                return {"epochs": self.epochs}

            def load_state_dict(self, state):
                self.epochs = state["epochs"]

        import atexit

        @atexit.register
        def write():
            with open(f"renamed-{os.environ.get('RANK', '0')}.json", "w") as file:
                json.dump(RENAMED, file)
        """,
    "pyproject.toml": """
        [tool.pa-core]
        plugins = ["watch.py", "checkpoint", "save_best_model"]

        [tool.pa-core.checkpoint]
        save_every_n_epochs = 1
        save_at_end = false
        """,
}


@pytest.fixture(scope="module")
def new_project(tmp_path_factory):
    """A function that makes a folder with the script and its settings."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        for file, content in FILES.items():
            (folder / file).write_text(dedent(content).lstrip())
        return folder

    return make


def launch_with_configuration_of_the_page(folder: Path, name: str) -> dict[str, Any]:
    """Run the script as on the page, with the accelerate configuration shown there."""
    page = (ROOT / "docs/understand/distributed.md").read_text()
    (content,) = re.findall(rf"^cat > {name} <<'END'\n(.*?)^END$", page, re.MULTILINE | re.DOTALL)
    (folder / name).write_text(content)
    arguments = f"-m accelerate.commands.launch --config_file {name}"
    assert f"python {arguments} train.py" in page
    return read_outcome(launch(folder, *arguments.split())[0])


def launch(folder: Path, *launcher: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    return folder, run(folder, *launcher, "train.py")


@pytest.fixture(scope="module")
def alone(new_project):
    return launch(new_project("python"))


@pytest.fixture(scope="module")
def two(new_project):
    return launch(new_project("two"), *torchrun(2))


def assert_same_results(folder: Path, alone: Any, processes: int) -> None:
    outcome, expected = read_outcome(folder), read_outcome(alone[0])
    assert outcome.pop("config") == [processes, "no"]
    for name, values in outcome.items():
        assert flat(values) == pytest.approx(flat(expected[name]), abs=1e-6), name


@pytest.mark.parametrize("processes", [1, 3])
def test_torchrun(processes, alone, new_project):
    folder, _ = launch(new_project("torchrun"), *torchrun(processes))
    assert_same_results(folder, alone, processes)


def test_torchrun_on_two_processes(two, alone):
    assert_same_results(two[0], alone, 2)


def test_the_threads_of_gloo_end_before_the_interpreter_shuts_down(two):
    for rank in range(2):  # otherwise the shutdown may abort the process
        names = json.loads((two[0] / f"threads-{rank}.json").read_text())
        assert names
        assert not [name for name in names if "gloo" in name]


def test_accelerate_launch_sets_the_precision_of_the_trainer(alone, new_project):
    outcome = launch_with_configuration_of_the_page(new_project("accelerate"), "one.yaml")
    assert outcome["config"] == [1, "bf16"]
    expected = read_outcome(alone[0])
    assert outcome["train"] != expected["train"]
    assert outcome["train"] == pytest.approx(expected["train"], abs=0.02)  # bf16 has three digits


def test_accelerate_launch_on_two_processes(alone, new_project):
    folder = new_project("accelerate")
    launch_with_configuration_of_the_page(folder, "two.yaml")
    assert_same_results(folder, alone, 2)


CELLS = {
    "import": """
        from pa_core import Trainer, notebook_launcher
        from train import load, main
        """,
    "launch": """
        notebook_launcher(main, num_processes=2)
        """,
    "train": """
        import torch
        from torch import nn

        model = nn.Linear(8, 2)
        plugins = {"plugins": ["live_plot"], "live_plot": {"interval": 0.01}}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, settings=plugins)
        trainer.train(load(), 100, eval_dataset=load())
        """,
    "history": "trainer.run_history",
    "evaluate": "trainer.evaluate(load())",
    "plot": "trainer.run_history.plot()",
}


@pytest.fixture(scope="module")
def notebook(new_project):
    """A folder with an executed notebook, and the outputs of its cells by their names."""
    from nbformat import v4

    folder = new_project("notebook")
    sources = [dedent(cell).strip() for cell in CELLS.values()]
    file = folder / "train.ipynb"
    cells = [v4.new_code_cell(source) for source in sources]
    file.write_text(json.dumps(v4.new_notebook(cells=cells)))
    run(
        folder,
        *("-c", "from nbclient.cli import main; main()", file.name, "--inplace", "--timeout=200"),
        IPYTHONDIR=str(folder / "ipython"),  # no user settings
        JUPYTER_CONFIG_DIR=str(folder / "jupyter"),
        JUPYTER_DATA_DIR=str(folder / "jupyter"),
    )
    executed = json.loads(file.read_text())["cells"]
    return folder, {name: cell["outputs"] for name, cell in zip(CELLS, executed, strict=True)}


def test_a_notebook_on_two_processes(alone, notebook):
    assert_same_results(notebook[0], alone, 2)


def shown_in(outputs: list[dict[str, Any]], kind: str) -> list[str]:
    """What is shown in the richest form of a MIME type; a bar that is over leaves an empty text."""
    found = ["".join(output.get("data", {}).get(kind, "")) for output in outputs]
    return [one for one in found if one]


def test_a_saved_notebook_has_the_table_of_a_run_once_and_no_bar(notebook):
    _, outputs = notebook
    assert outputs["import"] == []  # no warning that a bar needs another package
    for name in ("launch", "train"):
        (table,) = shown_in(outputs[name], "text/html")
        assert "<th>train loss</th><th>eval loss</th>" in table
        assert "progress" not in table.partition("</style>")[2]
        assert "\r" not in json.dumps(outputs[name])
        printed = "".join("".join(one.get("text", "")) for one in outputs[name])
        assert len(printed.splitlines()) < 20, printed
    table = table.partition("</style>")[2]
    assert table.count("<tr>") <= 1 + 60 + 2 + 2
    assert "<td>1</td>" in table
    assert "<td>100</td>" in table
    assert table.count('class="best"') == 1


def test_a_saved_notebook_has_the_last_live_plot_and_the_history(notebook):
    _, outputs = notebook
    (picture,) = shown_in(outputs["train"], "image/png")
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert "Plot of loss after 700 updates" in shown_in(outputs["train"], "text/plain")
    (table,) = shown_in(outputs["history"], "text/html")
    assert "<td>100</td>" in table
    assert "evaluation_loss" in shown_in(outputs["evaluate"], "text/html")[-1]
    assert len(shown_in(outputs["plot"], "image/png")) == 1


def test_two_machines(alone, new_project):
    folder = new_project("machines")
    with two_machines() as machines:
        started = []
        try:
            for number, machine in enumerate(machines):
                command = [
                    *(*machine, sys.executable, "-m", "torch.distributed.run"),
                    *("--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"),
                    *("--rdzv_endpoint", f"{address(0)}:29400", "--local_addr", address(number)),
                    # Both have the same host name, so torchrun can't know which one is the first.
                    *("--rdzv_conf", f"is_host={int(number == 0)}", "train.py"),
                ]
                started.append(
                    subprocess.Popen(
                        command,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                        cwd=folder,
                        env=environment(GLOO_SOCKET_IFNAME=INTERFACE),
                    )
                )
            shown = [process.communicate(timeout=240) for process in started]
        finally:
            for process in started:
                process.terminate()  # torchrun then ends its processes
                process.communicate(timeout=60)
    assert [process.returncode for process in started] == [0, 0], shown
    assert_same_results(folder, alone, 2)
    # Only the main process of the run prints, so the other machine prints nothing.
    (silent,) = [out for out, _ in shown if "Training Sequential" not in out]
    assert silent == ""


def lines_of(launched: Any) -> list[str]:
    """The printed lines, without the folder and without digits, which may differ by rounding.

    The processes are in the first lines of the run.
    """
    folder, done = launched
    text = done.stdout.replace(str(folder), "folder").replace("2 processes on cpu", "cpu")
    return [re.sub(r"[\d.]+(e-\d+)?", "#", line) for line in text.splitlines() if line]


def test_lines_bars_and_files_are_written_once(alone, two):
    assert lines_of(two) == lines_of(alone)
    printed = Counter(lines_of(two))
    assert sum(line.startswith("Training Sequential: ") for line in printed) == 1
    assert sum(bool(re.match(r" +# ", line)) for line in lines_of(two)) == 2  # a row per epoch
    assert sum("Plugins: " in line for line in two[1].stdout.splitlines()) == 1
    assert printed["epoch end"] == 2
    # One for each training state, and none on the other process.
    assert printed["state_dict"] == 2

    files = [two[0] / f"training_states/epoch_0001/process-0000{rank}.json" for rank in range(2)]
    assert ['"watch"' in file.read_text() for file in files] == [True, False]

    for _, done in (alone, two):
        assert "\r" not in done.stdout + done.stderr

    # In any order: training states are written in the background.
    written = ["best_model.pt", "best_model.pt", "epoch_0001", "epoch_0002"]
    for folder, rank, expected in [(alone[0], 0, written), (two[0], 0, written), (two[0], 1, [])]:
        renamed = json.loads((folder / f"renamed-{rank}.json").read_text())
        assert sorted(name for name in renamed if name[0] != ".") == expected
    assert not [path for path in two[0].rglob("*") if "tmp" in path.name]
