"""Print what the core costs its readers: ``python docs/figures.py`` writes it into ``inside.md``.

A plain run is one epoch with an evaluation, with the default plugins and no training state.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = ROOT / "pa_core"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
PLAIN_RUN = """
import sys
import torch
from torch.utils.data import TensorDataset
from pa_core import Trainer

data = TensorDataset(torch.ones(8, 2), torch.ones(8, 1))
model = torch.nn.Linear(2, 1)
trainer = Trainer(model, torch.nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
trainer.train(data, num_epochs=1, eval_dataset=data, per_device_batch_size=4)
print("\\n", *(m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "pa_core"))
"""
PRIVATE = re.compile(r"\btrainer\._[a-z]\w*")
"""An access to a private attribute of a `Trainer` that is not one's self."""


def lines_of(files: list[Path]) -> int:
    return sum(len(file.read_text().splitlines()) for file in files)


def files_of_a_plain_run() -> list[Path]:
    """The files of `pa_core` that a plain run imports."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_RUN], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return [Path(file) for file in done.stdout.splitlines()[-1].split()]


def private_accesses() -> int:
    """How often folders other than `loop` read or set a private attribute of a trainer.

    Plugins, examples, the built-ins, the command line and the test kit never do; a test checks it.
    """
    files = [file for file in CORE.glob("*/*.py") if file.parent.name != "loop"]
    return sum(len(PRIVATE.findall(file.read_text())) for file in files)


def table() -> str:
    """The figures as a table in Markdown."""
    plain = files_of_a_plain_run()
    wheel = sorted(CORE.rglob("*.py"))
    rows = {
        "files at the top of `pa_core`": len(list(CORE.glob("*.py"))),
        "modules that a plain run imports": len(plain),
        "lines of these modules": lines_of(plain),
        "lines of `trainer.py`": lines_of([CORE / "trainer.py"]),
        "lines in the wheel, templates aside": lines_of(wheel),
        "private attributes of `Trainer` used in other folders of the core": private_accesses(),
    }
    body = [f"| {name} | {value:,} |" for name, value in rows.items()]
    return "\n".join(["| figure | value |", "|---|---|", *body])


if __name__ == "__main__":
    page = Path(__file__).with_name("inside.md")
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    figures = table()
    page.write_text(f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}")
    print(figures)
