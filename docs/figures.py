"""Print what the core costs its readers: ``python docs/figures.py`` writes it into ``inside.md``.

A plain run is one epoch with an evaluation, with the default plugins and no training state.

It also brings the line numbers of the page's links into the code up to date. Such a link quotes its
line in its title, after the function or constant that has it::

    [`trainer.py:42`](../pa_core/trainer.py#L42 "Trainer.backward_step: self._engine.backward(")
"""

from __future__ import annotations

import ast
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


LINE_LINK = re.compile(
    r'\[`(?P<name>[\w.]+):\d+`\]\((?P<path>[\w./]+)#L\d+ "(?P<symbol>[\w.]+): (?P<source>[^"]+)"\)'
)


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


def line_of(file: Path, symbol: str, source: str) -> int:
    """The number of the line that contains `source`, in a function, class or constant of a file.

    Raises:
        ValueError: if there is no such symbol, or not exactly one such line in it.
    """
    text = file.read_text()
    body: list[ast.stmt] = ast.parse(text).body
    for name in symbol.split("."):
        found = [node for node in body if name in _names(node)]
        if not found:
            raise ValueError(f"{file.name} has no {symbol}")
        body = getattr(found[0], "body", [])
    first, last = found[0].lineno, found[0].end_lineno
    lines = enumerate(text.splitlines()[first - 1 : last], first)
    numbers = [number for number, line in lines if source in line]
    if len(numbers) != 1:
        raise ValueError(f"{len(numbers)} lines of {symbol} in {file.name} contain {source!r}")
    return numbers[0]


def _names(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [getattr(node, "name", "")]


def with_line_numbers(page: Path) -> str:
    """The text of a page, its links to lines of code brought up to date."""

    def updated(link: re.Match[str]) -> str:
        number = line_of(page.parent / link["path"], link["symbol"], link["source"])
        return (
            f"[`{link['name']}:{number}`]({link['path']}#L{number} "
            f'"{link["symbol"]}: {link["source"]}")'
        )

    return LINE_LINK.sub(updated, page.read_text())


if __name__ == "__main__":
    page = ROOT / "docs" / "understand" / "inside.md"
    before, _, rest = with_line_numbers(page).partition(BEGIN)
    after = rest.partition(END)[2]
    figures = table()
    page.write_text(f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}")
    print(figures)
