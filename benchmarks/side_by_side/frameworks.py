"""The frameworks, their scripts, and how each writes the accuracy of an epoch."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Framework:
    """One of the frameworks.

    Attributes:
        key: the name of its script and of its pictures.
        name: as its users write it.
        distribution: the package whose version counts.
        accuracy: a pattern that is found once per epoch whose accuracy was written.
    """

    key: str
    name: str
    distribution: str
    accuracy: str


FRAMEWORKS = [
    Framework("pa_core", "pa-core", "pa-core", r"^ *(\d+ +[\d.]+ +[\d.]+\*? +0\.\d+)"),
    Framework(
        "pytorch_accelerated", "pytorch-accelerated", "pytorch-accelerated", r"^accuracy: (0\.\d+)"
    ),
    Framework(
        "transformers", "Hugging Face Trainer", "transformers", r"'eval_accuracy': '([\d.]+)'"
    ),
    Framework("lightning", "Lightning", "lightning", r"val_acc:\s+(0\.\d+)"),
    Framework("ignite", "Ignite", "pytorch-ignite", r"^(epoch \d+: .* accuracy 0\.\d+)"),
    Framework("fastai", "fastai", "fastai", r"^(\d+ .*0\.\d+) +\d\d:\d\d"),
    Framework("keras", "Keras", "keras", r"val_accuracy: (0\.\d+)"),
]


def count_lines(framework: Framework) -> int:
    """Lines of code in the script: without empty lines, comments and docstrings."""
    source = (SCRIPTS / f"{framework.key}.py").read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            skipped |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(map(str.strip, source.splitlines()), 1)
    return sum(1 for number, line in lines if line and line[0] != "#" and number not in skipped)
