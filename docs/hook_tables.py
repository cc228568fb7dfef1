"""Write the loop and the tables of the hooks into the pages: ``python docs/hook_tables.py``.

All of it comes from `pa_core.hookspecs`: the order from `LOOP`, the rest from the docstrings. What
stands between ``<!-- made by hook_tables.py: … -->`` and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from pa_core.hookspecs import LOOP
from pa_core.plugins.explain import HookContract, loop_rows, read_contract
from pa_core.plugins.manager import PluginManager

PAGES = [
    Path(__file__).with_name(folder) / name
    for folder, name in (("understand", "loop.md"), ("plugins", "hooks.md"))
]
PART = re.compile(r"(<!-- made by hook_tables\.py: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
HOOKS = PluginManager().hooks
LABELS = ("Collectives allowed", "Reads the device")
ORDER = [row.hook for row in loop_rows() if row.hook]


def contract(name: str) -> HookContract:
    return read_contract(inspect.getdoc(HOOKS[name].function) or "")


def contracts(kind: str) -> str:
    """A table of the hooks of one kind, such as ``on_``: arguments, and the contract of each."""
    lines = [
        "| hook | arguments | when, and on which processes | collectives | reads the device |",
        "|---|---|---|---|---|",
    ]
    for name in ORDER:
        if name.startswith(kind):
            fields = {key: value.rstrip(".") for key, value in contract(name).fields.items()}
            arguments = ", ".join(f"`{argument}`" for argument in HOOKS[name].arguments)
            when, processes = fields["When"], fields["Runs on"]
            if processes != "every process":
                when += f". On {processes}"
            answers = [fields[label][:3].rstrip(",") for label in LABELS]
            lines.append(f"| `{name}` | {arguments} | {when} | {' | '.join(answers)} |")
    return markdown("\n".join(lines))


def summaries(first: str, last: str) -> str:
    """A table of the hooks from one to another, with links to their pages."""
    names = ORDER[ORDER.index(first) : ORDER.index(last) + 1]
    rows = [f"| [`{name}`](hooks/{name}.md) | {contract(name).summary} |" for name in names]
    return markdown("\n".join(["| hook | |", "|---|---|", *rows]))


def markdown(text: str) -> str:
    return text.replace("``", "`")


def part(request: str) -> str:
    """What a page requests: ``the loop``, ``the contents``, ``on_…``, or ``FIRST to LAST``."""
    if request == "the loop":
        return f"```text{LOOP}```"
    if request == "the contents":
        pages = "\n".join(f"hooks/{name}" for name in ORDER)
        return f":::{{toctree}}\n:hidden:\n\n{pages}\n:::"
    if request.endswith("…"):
        return contracts(request.removesuffix("…"))
    return summaries(*request.split(" to "))


def updated(page: str) -> str:
    """The text of a page with its parts made again."""
    return PART.sub(lambda found: f"{found[1]}\n{part(found[2])}\n\n{found[3]}", page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))
