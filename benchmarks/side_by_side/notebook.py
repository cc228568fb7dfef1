"""Run code as the cell of a notebook, and take a picture of what it shows."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from PIL import Image
from playwright.sync_api import sync_playwright

# Widgets live in JavaScript that the exported file loads from the network.
WIDGET = "application/vnd.jupyter.widget-view+json"
STYLE = """<style>
body { margin: 0 !important; padding: 0 !important; background: white; }
main, .jp-Notebook { padding: 8px !important; }
.jp-Cell-inputWrapper, .jp-OutputPrompt, .jp-OutputCollapser, .jp-Collapser { display: none; }
.jp-Cell { padding: 0 !important; }
.jp-OutputArea-output pre { white-space: pre-wrap; }
</style></head>"""


@dataclass
class Executed:
    """A notebook after its run.

    Attributes:
        notebook: its cells, with their outputs.
        widgets: the state of its widgets, by their ids.
    """

    notebook: Any
    widgets: Mapping[str, Any]

    def text(self, cell: int) -> str:
        """What a cell printed."""
        outputs = self.notebook.cells[cell].outputs
        return "".join(output.get("text", "") for output in outputs)


def execute(cells: list[str], folder: Path) -> Executed:
    """Run cells in a new kernel of this environment, in a folder."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    for cell in notebook.cells:
        cell.outputs = _joined(cell.outputs)
    return Executed(notebook, dict(client.widget_state))


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs with consecutive texts of a stream in one, as JupyterLab shows and saves them."""
    joined: list[Any] = []
    for output in outputs:
        if output.output_type == "stream":
            if joined and joined[-1].get("name") == output.name:
                output.text = joined.pop().text + output.text
            output.text = _overwritten(output.text)
        joined.append(output)
    return joined


def _overwritten(text: str) -> str:
    """A text in which carriage returns and backspaces have moved back, as in JupyterLab."""
    count = 1
    while count:
        text, count = re.subn(r"[^\n\x08]\x08", "", text)
    return re.sub(r"^.*\r(?!\n)", "", text, flags=re.MULTILINE)


def take_picture(executed: Executed, file: Path, width: int = 1000) -> int:
    """Write the output of the first cell as a PNG, as a browser shows the exported page.

    Returns:
        the height of the output in pixels, at the width given.
    """
    notebook = nbformat.v4.new_notebook()
    cell = executed.notebook.cells[0]
    cell.outputs = [shown for output in cell.outputs for shown in _shown(output, executed.widgets)]
    notebook.cells = [cell]
    page, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox"],
        )
        view = browser.new_page(viewport={"width": width, "height": 200}, device_scale_factor=1.5)
        view.route("http*://**", lambda route: route.abort())  # only scripts it can do without
        view.set_content(page.replace("</head>", STYLE), wait_until="load")
        data = view.locator("main").screenshot()
        height = round(view.evaluate("document.querySelector('main').offsetHeight"))
        browser.close()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)
    return height


def _shown(output: Any, widgets: Mapping[str, Any]) -> list[Any]:
    """An output as the browser shows it: rich has a widget around outputs, and closed ones hide."""
    model = output.get("data", {}).get(WIDGET, {}).get("model_id")
    if model is None:
        return [output]
    state = widgets.get(model, {})
    layout = widgets.get(str(state.get("layout")).removeprefix("IPY_MODEL_"), {})
    if layout.get("visibility") == "hidden":
        return []
    if "outputs" not in state:
        output["data"].pop(WIDGET)  # leaves its text
        return [output]
    return [nbformat.from_dict(inner) for inner in state["outputs"]]
