"""The frame of a page: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path

from pa_core.plugin import save_file
from pa_report.palette import style_sheet


def build_page(title: str, body: str) -> str:
    """A complete page around its content.

    Only the page's own script can run: the policy names it by its hash.
    """
    script = _read("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{_read('report.css')}{style_sheet()}</style></head>"
        f"<body><main>{body}<footer>Written by pa-report.</footer></main>"
        f"<script>{script}</script></body></html>\n"
    )


def save_page(path: Path, page: str) -> None:
    """Write a page atomically: the file is complete or unchanged.

    Raises:
        OSError: if it can't be written.
    """

    def write(file: Path) -> None:
        # A lone surrogate in a metric's name must not prevent the report.
        file.write_text(page, encoding="utf-8", errors="replace")

    save_file(path, write)


@cache
def _read(name: str) -> str:
    return files("pa_report").joinpath(name).read_text(encoding="utf-8")
