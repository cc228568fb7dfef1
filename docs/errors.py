"""Write the page "Errors you may meet": ``python docs/errors.py``.

Each script of `tests.mistakes` is run, and the error that it gets is shown below it.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.mistakes import MISTAKES, Mistake  # noqa: E402 - of this folder, wherever it is run

PAGE = ROOT / "docs" / "reference" / "errors.md"
INTRODUCTION = """\
<!-- made by docs/errors.py from tests/mistakes.py -->

# Errors you may meet

First scripts, settings and plugins with a mistake, each with the error that it gets. A message says
what is wrong, where, and what to write instead. Notes that Python prints below the message are
included; a plugin's error has one that names the plugin and the hook. Search this page for a few
words of your message, without your own names and numbers.

Each script begins with these lines. The tests run all of them, so the messages are those of this
version.

```python
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pa_core import Trainer, TrainerCallback, hookimpl

model = nn.Linear(4, 2)
loss_func = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long))
```
"""


def page() -> str:
    """The text of the page."""
    parts, section = [INTRODUCTION], ""
    for mistake in MISTAKES:
        if mistake.section != section:
            section = mistake.section
            parts.append(f"\n## {section}\n")
        parts.append(entry(mistake))
    return "".join(parts)


def entry(mistake: Mistake) -> str:
    """A mistake: its files, its script and its error."""
    lines = [f"\n### {mistake.title}\n"]
    for name, text in mistake.files.items():
        language = {".toml": "toml", ".py": "python"}[Path(name).suffix]
        lines.append(f"`{name}`:\n\n{block(language, text.strip())}")
    lines.append(block("python", mistake.code))
    lines.append(block("text", "\n".join(map(wrapped, mistake.message.splitlines()))))
    return "\n".join(lines)


def block(language: str, text: str) -> str:
    """A fenced block; code isn't run with that of the page, as it fails."""
    mark = "" if language == "text" else "<!-- not run: a mistake -->\n"
    return f"{mark}```{language}\n{text.rstrip()}\n```\n"


def wrapped(line: str) -> str:
    """A line of a message, broken so that it needs no scrolling."""
    return textwrap.fill(
        line,
        width=90,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    PAGE.write_text(page())
