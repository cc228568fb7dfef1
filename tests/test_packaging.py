"""The seven distributions: what is in them, that they build anew from their sdists, and install."""

import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOMES = {
    "pa_core": ROOT,
    "pa_metrics": ROOT / "plugins" / "metrics",
    "pa_schedulers": ROOT / "plugins" / "schedulers",
    "pa_models": ROOT / "plugins" / "models",
    "pa_tracking": ROOT / "plugins" / "tracking",
    "pa_report": ROOT / "plugins" / "report",
    "pa_lab": ROOT / "plugins" / "lab",
}
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
    """Build one artefact with the backend itself: no network, no environment of its own."""
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
def test_a_wheel_holds_its_package_whole_and_nothing_else(
    package: str, wheels: dict[str, Path]
) -> None:
    names = names_in(wheels[package])
    version = project(package)["version"]
    assert {name.partition("/")[0] for name in names} == {package, f"{package}-{version}.dist-info"}
    modules = {
        str(path.relative_to(HOMES[package])) for path in (HOMES[package] / package).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    assert f"{package}/py.typed" in names
    assert f"{package}-{version}.dist-info/licenses/LICENSE" in names
    assert not any("tests" in name.split("/") for name in names)


@packages
def test_a_wheel_tells_its_entry_points(package: str, wheels: dict[str, Path]) -> None:
    version = project(package)["version"]
    with zipfile.ZipFile(wheels[package]) as archive:
        text = archive.read(f"{package}-{version}.dist-info/entry_points.txt").decode()
    if package == "pa_core":
        assert "[console_scripts]\npa = pa_core.cli.app:main" in text
    else:
        name = {"pa_models": "timm", "pa_lab": "profile"}.get(package, package.removeprefix("pa_"))
        assert f"\n{name} = {package}:" in text.partition("[pa_core]")[2]


@packages
def test_an_sdist_builds_the_same_wheel_again(
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
    # -P: the folder that the process runs in is not on its path.
    found = json.loads(run("-P", "-c", code, cwd=tmp_path))
    assert found["distributions"] == [
        *("pa-core", "pa-lab", "pa-metrics", "pa-models", "pa-report"),
        *("pa-schedulers", "pa-tracking"),
    ]
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


@packages
def test_the_versions_are_in_step(package: str) -> None:
    import pa_core

    assert project(package)["version"] == pa_core.__version__


def test_the_changelog_knows_the_version() -> None:
    version = project("pa_core")["version"]
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert any(line.startswith(f"## [{version}] - ") for line in lines)


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
def test_every_distribution_has_a_readme_and_the_licence(package: str) -> None:
    readme = HOMES[package] / "README.md"
    assert readme.read_text().startswith(f"# {package.replace('_', '-')}\n")
    assert (HOMES[package] / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
