"""The distributions: their contents, that sdists rebuild the same wheels, and that they install."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.check_dist import (
    check_artefacts,
    check_installed,
    check_sdist,
    check_versions,
    check_wheel,
    distributions,
)

ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = {item.package: item for item in distributions(ROOT)}
HOMES = {package: item.folder for package, item in DISTRIBUTIONS.items()}
packages = pytest.mark.parametrize("package", HOMES)


def project(package: str) -> dict[str, object]:
    table: dict[str, object] = tomllib.loads((HOMES[package] / "pyproject.toml").read_text())
    return table["project"]  # type: ignore[return-value]


def run(*args: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Build one artefact with the backend directly: no network, no isolated environment."""
    target.mkdir(parents=True)
    run("-m", "hatchling", "build", "-t", kind, "-d", str(target), cwd=source)
    (artefact,) = target.iterdir()
    return artefact


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    return {package: build("wheel", home, folder / package) for package, home in HOMES.items()}


@pytest.fixture(scope="module")
def sdists(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sdists")
    return {package: build("sdist", home, folder / package) for package, home in HOMES.items()}


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@packages
def test_a_wheel_has_its_whole_package_and_nothing_else(
    package: str, wheels: dict[str, Path]
) -> None:
    assert check_wheel(DISTRIBUTIONS[package], wheels[package]) == []


@packages
def test_an_sdist_has_its_whole_package_the_licence_and_no_tests(
    package: str, sdists: dict[str, Path]
) -> None:
    assert check_sdist(DISTRIBUTIONS[package], sdists[package]) == []


@packages
def test_a_wheel_declares_its_entry_points(package: str, wheels: dict[str, Path]) -> None:
    version = project(package)["version"]
    with zipfile.ZipFile(wheels[package]) as archive:
        text = archive.read(f"{package}-{version}.dist-info/entry_points.txt").decode()
    if package == "pa_core":
        assert "[console_scripts]\npa = pa_core.cli.app:main" in text
    else:
        name = {"pa_models": "timm", "pa_lab": "profile"}.get(package, package.removeprefix("pa_"))
        assert f"\n{name} = {package}:" in text.partition("[pa_core]")[2]


@packages
def test_an_sdist_rebuilds_the_same_wheel(
    package: str, sdists: dict[str, Path], wheels: dict[str, Path], tmp_path: Path
) -> None:
    with tarfile.open(sdists[package]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = build("wheel", source, tmp_path / "again")
    assert again.name == wheels[package].name
    assert names_in(again) == names_in(wheels[package])


def test_installed_wheels_show_their_plugins_without_importing_them(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "site"
    arguments = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    files = [str(wheel) for wheel in wheels.values()]
    run("-m", "pip", "install", *arguments, "--target", str(target), *files, cwd=tmp_path)
    code = f"""
import json, sys
from importlib.metadata import distributions
sys.path.insert(0, {str(target)!r})
import pa_core
from pa_core.plugins.discovery import find_plugins
print(json.dumps({{
    "distributions": sorted(d.metadata["Name"] for d in distributions(path=[{str(target)!r}])),
    "core": pa_core.__file__,
    "plugins": {{name: source.distribution for name, source in find_plugins().items()}},
    "imported": [name for name in sys.modules if name in {list(HOMES)!r}],
}}))
"""
    # -P keeps the working directory off the path.
    found = json.loads(run("-P", "-c", code, cwd=tmp_path))
    assert found["distributions"] == sorted(item.name for item in DISTRIBUTIONS.values())
    assert Path(found["core"]).is_relative_to(target)
    assert {
        name: found["plugins"][name]
        for name in ("metrics", "profile", "report", "schedulers", "timm", "tracking")
    } == {
        "metrics": "pa-metrics",
        "profile": "pa-lab",
        "report": "pa-report",
        "schedulers": "pa-schedulers",
        "timm": "pa-models",
        "tracking": "pa-tracking",
    }
    assert found["imported"] == ["pa_core"]


# A line that type checkers must refuse ends with a comment; they must take all others.
SCRIPT = """\
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

from pa_core import Trainer, TrainerCallback, TrainerPlaceholderValues, hookimpl
from pa_core.callbacks import EarlyStoppingCallback, SaveTrainingStateCallback
from pa_lab import ProfileCallback
from pa_metrics import MetricsPlugin
from pa_models import EmaPlugin, TimmPlugin, TransformersPlugin
from pa_report import ReportPlugin
from pa_schedulers import SchedulersPlugin
from pa_tracking import TrackingPlugin

V = TrainerPlaceholderValues


class Own(Trainer):
    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return {"loss": self.loss_func(self.model(batch)), "model_outputs": None, "batch_size": 1}


class Stop(TrainerCallback):
    @hookimpl(tryfirst=True)
    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.control.stop("enough")


def main(folder: Path, data: Any) -> None:
    model = nn.Linear(4, 2)
    trainer = Own(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[
            Stop,
            EarlyStoppingCallback(early_stopping_patience=2),
            SaveTrainingStateCallback(folder, every="15 minutes"),
        ],
        plugins=[
            "metrics:more",
            MetricsPlugin(metrics={"top": {"class": "accuracy", "top_k": 2}}, on=["train", "eval"]),
            MetricsPlugin(metrics=["accuracy"], to_preds_and_target="causal_language_model"),
            TrackingPlugin(service="csv", every="50 updates", log=["config"], logging_dir=folder),
            ReportPlugin(folder="reports", every=10),
            SchedulersPlugin(name="cosine", warmup="5%"),
            EmaPlugin(decay=0.99),
            TimmPlugin(mixup=0.2, optimizer_options={"betas": (0.9, 0.99)}),
            TransformersPlugin(label_smoothing=0.1, tokenizer=object()),
        ],
        mixed_precision="bf16",
    )
    for create in (
        partial(OneCycleLR, max_lr=0.1, total_steps=V.NUM_UPDATES),
        partial(CosineAnnealingLR, T_max=V.NUM_EPOCHS * V.NUM_UPDATE_STEPS_PER_EPOCH + 1),
        partial(MultiStepLR, milestones=[V.NUM_UPDATES // 2, V.NUM_UPDATES]),
        lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=V.NUM_UPDATES),
    ):
        trainer.train(data, "10 epochs", eval_dataset=data, create_scheduler_fn=create)
    rate: float = trainer.optimizer.param_groups[0]["lr"]
    trainer.evaluate(data)[f"evaluation_loss at {rate}"]
    trainer.scheduler.step()


MetricsPlugin(taks="multiclass")  # refused
MetricsPlugin(task="multi")  # refused
TrackingPlugin(servise="csv")  # refused
TrackingPlugin(service="csvv")  # refused
ReportPlugin(titel="first")  # refused
TimmPlugin(mixupp=0.2)  # refused
TransformersPlugin(label_smooth=0.1)  # refused
EmaPlugin(decai=0.9)  # refused
ProfileCallback(to_jsn="profile.json")  # refused
EarlyStoppingCallback(patience=3)  # refused
SaveTrainingStateCallback(on_save_error="wran")  # refused
Trainer(nn.Linear(1, 1), None, None, mixed_precision="bf17")  # refused
Trainer(nn.Linear(1, 1), None, None, pluggins=["metrics"])  # refused
partial(OneCycleLR, max_lr=0.1, total_steps="updates")  # refused
"""

MYPY = """\
[mypy]
strict = True
cache_dir = /dev/null
# Of the libraries only what the script's lines need: all of torch takes a minute.
[mypy-torch.*,numpy.*,accelerate.*,pydantic.*,transformers.*,timm.*,torchmetrics.*]
follow_imports = skip
[mypy-torch.optim.*]
follow_imports = normal
"""


@pytest.mark.slow
def test_type_checkers_take_a_script_that_uses_the_wheels_and_refuse_its_mistakes(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    arguments = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    files = [str(wheel) for wheel in wheels.values()]
    run("-m", "pip", "install", *arguments, "--target", str(site), *files, cwd=tmp_path)
    others = [path for path in sys.path if path.endswith("site-packages")]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in others]
    (site / "others.pth").write_text("".join(lines))
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(MYPY)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def output(*command: str | Path) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        return done.stdout + done.stderr

    where = output(python, "-c", "import pa_core, pa_metrics; print(pa_core, pa_metrics)")
    assert where.count(str(site)) == 2
    refused = {n for n, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# refused")}
    for checker in (
        output(sys.executable, "-m", "mypy", "--python-executable", python, "script.py"),
        output(sys.executable, "-m", "pyright", "--pythonpath", python, "script.py"),
    ):
        found = re.findall(r"script\.py:(\d+)(?::\d+)?(?: -|:) error", checker)
        assert {int(number) for number in found} == refused, checker


def test_the_versions_are_in_step_and_the_changelog_has_a_section_for_them() -> None:
    assert check_versions(ROOT) == []


@packages
def test_torch_is_never_capped_or_pinned(package: str) -> None:
    requirements = project(package)["dependencies"]
    assert isinstance(requirements, list)
    torch = [item for item in requirements if item.split(">")[0].split("=")[0].strip() == "torch"]
    assert all(">=" in item and "<" not in item and "==" not in item for item in torch)
    if package != "pa_core":
        major, minor, _ = str(project("pa_core")["version"]).split(".")
        assert f"pa-core>={major}.{minor},<{major}.{int(minor) + 1}" in requirements


@packages
def test_a_distribution_has_a_readme_and_the_licence(package: str) -> None:
    readme = HOMES[package] / "README.md"
    assert readme.read_text().startswith(f"# {package.replace('_', '-')}\n")
    assert (HOMES[package] / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


# -- The checks themselves, on a small source tree with one fault at a time ------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with the core and one plugin, which passes all checks."""
    for folder, name in ((tmp_path, "pa-core"), (tmp_path / "plugins" / "extra", "pa-extra")):
        package = folder / name.replace("-", "_")
        package.mkdir(parents=True)
        (package / "__init__.py").write_text('__version__ = "1.2.3"\n')
        (package / "py.typed").touch()
        (folder / "LICENSE").write_text("The licence\n")
        (folder / "README.md").write_text(f"# {name}\n")
        (folder / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
            f'[project]\nname = "{name}"\nversion = "1.2.3"\nreadme = "README.md"\n'
            'requires-python = ">=3.11"\n'
            'license-files = ["LICENSE"]\n'
            f'[tool.hatch.build.targets.sdist]\nonly-include = ["{package.name}"]\n'
        )
    (tmp_path / "CHANGELOG.md").write_text("## [1.2.3] - 2030-01-01\n")
    return tmp_path


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            lambda tree: replace(tree / "plugins/extra/pyproject.toml", "1.2.3", "1.2.4"),
            "pa-extra has version 1.2.4, but pa_core.__version__ is 1.2.3",
        ),
        (
            lambda tree: replace(tree / "pyproject.toml", "1.2.3", "1.2.4"),
            "pa-core has version 1.2.4, but pa_core.__version__ is 1.2.3",
        ),
        (
            lambda tree: replace(tree / "CHANGELOG.md", "1.2.3", "1.2.2"),
            "CHANGELOG.md has no section '## [1.2.3] - DATE'",
        ),
    ],
)
def test_a_version_out_of_step_is_a_problem(
    tree: Path, damage: Callable[[Path], None], problem: str
) -> None:
    assert check_versions(tree) == []
    damage(tree)
    assert check_versions(tree) == [problem]


def build_all(tree: Path) -> Path:
    """Build the tree's artefacts into one folder."""
    target = tree / "dist"
    target.mkdir()
    for item in distributions(tree):
        for kind in ("sdist", "wheel"):
            built = build(kind, item.folder, tree / "built" / item.name / kind)
            built.rename(target / built.name)
    return target


def test_each_difference_between_artefacts_and_sources_is_a_problem(tree: Path) -> None:
    folder = build_all(tree)
    assert check_artefacts(tree, folder) == []

    package = tree / "plugins" / "extra" / "pa_extra"
    (package / "added.py").touch()
    (package / "py.typed").unlink()
    (folder / "pa_extra-1.2.2.tar.gz").touch()
    (folder / "pa_core-1.2.3.tar.gz").unlink()
    assert check_artefacts(tree, folder) == [
        "pa_extra-1.2.3.tar.gz has no pa_extra/added.py",
        "pa_extra-1.2.3.tar.gz has pa_extra/py.typed, which is unexpected",
        "pa_extra-1.2.3-py3-none-any.whl has no pa_extra/added.py",
        "pa_extra-1.2.3-py3-none-any.whl has pa_extra/py.typed, which is unexpected",
        "dist/ has no pa_core-1.2.3.tar.gz",
        "dist/ has pa_extra-1.2.2.tar.gz, which is unexpected",
    ]


def test_a_missing_licence_and_packed_tests_and_caches_are_problems(tree: Path) -> None:
    replace(tree / "plugins/extra/pyproject.toml", 'license-files = ["LICENSE"]', "")
    replace(
        tree / "plugins/extra/pyproject.toml",
        'only-include = ["pa_extra"]',
        'only-include = ["pa_extra", "tests"]',
    )
    (tree / "plugins/extra/LICENSE").unlink()
    (tree / "plugins/extra/tests").mkdir()
    (tree / "plugins/extra/tests/test_extra.py").touch()
    extra = distributions(tree)[1]
    sdist = build("sdist", extra.folder, tree / "sdist")
    wheel = build("wheel", extra.folder, tree / "wheel")
    assert check_sdist(extra, sdist) == [
        "pa_extra-1.2.3.tar.gz has no LICENSE",
        "pa_extra-1.2.3.tar.gz must not have tests/test_extra.py",
    ]
    assert check_wheel(extra, wheel) == [
        "pa_extra-1.2.3-py3-none-any.whl has no pa_extra-1.2.3.dist-info/licenses/LICENSE"
    ]


def test_what_is_not_installed_or_imported_from_elsewhere_is_a_problem(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = distributions(tree)[1]
    assert f"{item.name} is not installed" in check_installed(tree)
    info = tree / "site" / "pa_extra-1.2.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pa-extra\nVersion: 1.2.2\n")
    monkeypatch.syspath_prepend(item.folder)
    monkeypatch.syspath_prepend(tree / "site")
    problems = check_installed(tree)
    assert "pa-extra 1.2.2 is installed, not 1.2.3" in problems
    assert any(text.startswith("pa_extra is imported from ") for text in problems)
