"""The example packages follow the template, use only public names, and pass their tests.

They are built, installed into a temporary folder and tested there.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

import pa_core
from pa_core import testing
from pa_core.cli.new_plugin import FILES, new_plugin
from pa_core.testing import run_on_processes, tiny_data, tiny_model, tiny_trainer
from pa_core.testing.conformance import Outcome, check_processes
from pa_core.testing.processes import find

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples" / "plugins").iterdir())
NAMES = [
    "curriculum",
    "distillation",
    "gan",
    "gradient-noise",
    "sam",
    "sample-images",
    "swa",
    "webhook",
]
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)


def package_of(example: Path) -> Path:
    return example / example.name.replace("-", "_")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages installed."""
    folder = tmp_path_factory.mktemp("site")
    quiet = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    command = (sys.executable, "-m", "pip", "install", *quiet, "--no-build-isolation")
    subprocess.run([*command, "--target", str(folder), *map(str, EXAMPLES)], check=True)
    return folder


@pytest.fixture
def on_path(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The packages can be imported by this process and by those it starts."""
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {package_of(example).name for example in EXAMPLES}:
            del sys.modules[name]


# -- Contents -------------------------------------------------------------------------------------


def test_the_examples_are_complete() -> None:
    assert [example.name for example in EXAMPLES] == [f"pa-{name}" for name in NAMES]


@each_example
def test_an_example_has_the_files_and_settings_of_the_template(
    example: Path, tmp_path: Path
) -> None:
    made = new_plugin(example.name, tmp_path)
    files = {place.replace("$package", package_of(example).name) for place in FILES.values()}
    for file in files:
        assert (example / file).is_file(), file
    for file in ("noxfile.py", ".gitignore", ".github/workflows/test.yml"):
        assert (example / file).read_text() == (made / file).read_text()
    own, template = (tomllib.loads((p / "pyproject.toml").read_text()) for p in (example, made))
    own["tool"]["mypy"].pop("overrides", None)
    assert own["tool"] == template["tool"]
    assert own["project"]["entry-points"] == template["project"]["entry-points"]
    assert set(own["project"]["dependencies"]) >= set(template["project"]["dependencies"])


def public_modules() -> set[str]:
    """The modules that have a page in the API reference."""
    titles = {page.read_text().partition("\n")[0] for page in ROOT.glob("docs/reference/api/*.md")}
    assert "# pa_core.durations" in titles
    return {title.removeprefix("# ") for title in titles}


def not_public(code: str) -> list[str]:
    """Names of pa_core that code imports though they aren't public, and private attributes."""
    listed = {"pa_core": set(pa_core.__all__), "pa_core.testing": set(testing.__all__)}
    modules, found = public_modules(), []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("pa_core")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pa_core"):
            home = node.module or ""
            for alias in node.names:
                is_listed = alias.name in listed.get(home, {alias.name})
                if home not in modules or not is_listed or alias.name.startswith("_"):
                    found.append(f"{home}.{alias.name}")
        elif isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr):
            owner = ast.unparse(node.value)
            # A private attribute of PyTorch that a test inspects.
            if owner not in ("self", "super()", "parameter"):
                found.append(f"{owner}.{node.attr}")
    return found


def test_the_check_finds_names_that_are_not_public() -> None:
    code = (
        "import pa_core.engine.base\n"
        "from pa_core import Trainer, Engine\n"
        "from pa_core.durations import Every, _UNITS\n"
        "from pa_core.plugins.process_scope import alone\n"
        "from pa_core.testing import run_tiny, companions\n"
        "self._own = trainer._engine.rank + trainer.__class__\n"
    )
    assert sorted(not_public(code)) == [
        *("pa_core.Engine", "pa_core.durations._UNITS", "pa_core.engine.base"),
        *("pa_core.plugins.process_scope.alone", "pa_core.testing.companions", "trainer._engine"),
    ]


@each_example
def test_an_example_uses_only_public_names(example: Path) -> None:
    files = sorted(example.rglob("*.py"))
    assert package_of(example) / "plugin.py" in files
    for file in files:
        assert not not_public(file.read_text()), file


@each_example
def test_the_readme_has_each_setting(example: Path, on_path: None) -> None:
    package = importlib.import_module(package_of(example).name)
    (plugin,) = (getattr(package, name) for name in package.__all__)
    rows = re.findall(
        r"^\| `(\w+)` \| .+? \| (.+) \|$", (example / "README.md").read_text(), re.MULTILINE
    )
    fields = plugin.Settings.model_fields
    assert [row for row in rows if row[0] in fields] == [
        (name, field.description) for name, field in fields.items()
    ]


# -- Behaviour ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_their_own_tests_pass_on_the_installed_packages(site: Path, tmp_path: Path) -> None:
    for example in EXAMPLES:
        shutil.copytree(example / "tests", tmp_path / example.name)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\naddopts = --strict-markers --import-mode=importlib "
        "--doctest-modules -p pa_core.testing.pytest_plugin -p no:cacheprovider\n"
    )
    # -P keeps the sources and the working directory off the path.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "not distributed", "."]
    paths = os.pathsep.join((str(site), str(ROOT)))
    done = subprocess.run(
        [*command, *(str(site / package_of(example).name) for example in EXAMPLES)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PA_CORE_CONFIG"} | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^1[23]\d passed, 18 skipped, 8 deselected", done.stdout, re.MULTILINE), (
        done.stdout
    )


class Channel(HTTPServer):
    """A server that counts the posted messages."""

    posts = 0


class Counts(BaseHTTPRequestHandler):
    server: Channel

    def do_POST(self) -> None:
        self.server.posts += 1
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Print nothing."""


def outcomes() -> list[tuple]:
    """The outcome of a run with each package, as in their own tests on two processes."""
    found = []
    for example in EXAMPLES:
        name = "".join(map(str.capitalize, example.name.split("-")[1:]))
        suite = find(str(example / "tests/test_plugin.py"), example.name, f"Test{name}Plugin")
        outcome = suite().shared_outcome()
        found.append((outcome.weights, outcome.history))
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_they_record_the_same_on_two_processes_as_on_one(on_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Channel(("127.0.0.1", 0), Counts) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            monkeypatch.setenv("PA_WEBHOOK_URL", url)
            on_two = run_on_processes(outcomes, 2)
            posts = server.posts
            on_one = outcomes()
        finally:
            server.shutdown()
            thread.join()
    for number, one in enumerate(on_one):
        check_processes(Outcome(*one), [Outcome(*process[number]) for process in on_two])
    assert "gradient_noise_scale" in on_one[NAMES.index("gradient-noise")][1]
    assert posts == 4  # by the main process: the start, two epochs, the end
    assert server.posts == 2 * posts


def test_tracking_saves_the_grids_of_sample_images(on_path, tmp_path, monkeypatch):
    from pa_sample_images import SampleImagesPlugin

    from pa_tracking import TrackingPlugin

    monkeypatch.chdir(tmp_path)
    vectors, classes = tiny_data(8, features=16).tensors
    data = torch.utils.data.TensorDataset(vectors.reshape(-1, 1, 4, 4), classes)
    model = torch.nn.Sequential(torch.nn.Flatten(), tiny_model(features=16))
    plugins = [SampleImagesPlugin, TrackingPlugin(run_name="run")]
    tiny_trainer(*plugins, model=model).train(data, 2, data)
    own = sorted(Path("samples").iterdir())
    tracked = sorted(Path("runs/pa-core/run/images").rglob("*.png"))
    assert len(own) == len(tracked) == 2
