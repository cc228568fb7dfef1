"""Check what a release consists of; ``nox -s release`` runs each of these.

    python scripts/check_dist.py versions          # before anything is built
    python scripts/check_dist.py artefacts dist    # the built sdists and wheels
    python scripts/check_dist.py installed         # the environment of this Python

Needs the standard library only. It prints each problem and exits with 1 if there are any.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CACHES = ("__pycache__", ".pyc", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis")


class Distribution(NamedTuple):
    """A distribution of this repository: its folder, its name and its version."""

    folder: Path
    name: str
    version: str

    @property
    def package(self) -> str:
        return self.name.replace("-", "_")

    @property
    def stem(self) -> str:
        """What the names of its sdist and its wheel begin with."""
        return f"{self.package}-{self.version}"

    def files(self) -> set[str]:
        """The files of its package, relative to its folder."""
        found = (path for path in (self.folder / self.package).rglob("*") if path.is_file())
        names = {path.relative_to(self.folder).as_posix() for path in found}
        return {name for name in names if not is_cache(name)}


def distributions(root: Path) -> list[Distribution]:
    found = []
    for file in [root / "pyproject.toml", *sorted(root.glob("plugins/*/pyproject.toml"))]:
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        found.append(Distribution(file.parent, project["name"], project["version"]))
    return found


def core_version(root: Path) -> str:
    """``pa_core.__version__``, read from the source so that nothing is imported."""
    for node in ast.parse((root / "pa_core" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise ValueError("pa_core/__init__.py doesn't assign __version__")


def check_versions(root: Path) -> list[str]:
    """All distributions have the version of the core, and the changelog has a section for it."""
    version = core_version(root)
    problems = [
        f"{item.name} has version {item.version}, but pa_core.__version__ is {version}"
        for item in distributions(root)
        if item.version != version
    ]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    if not any(line.startswith(f"## [{version}] - ") for line in changelog):
        problems.append(f"CHANGELOG.md has no section '## [{version}] - DATE'")
    return problems


def check_wheel(item: Distribution, wheel: Path) -> list[str]:
    """The package as it is in the source tree, its metadata and its licence; nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = archive.read(f"{item.stem}.dist-info/METADATA").decode()
    info = {name for name in names if name.startswith(f"{item.stem}.dist-info/")}
    problems = _differences(wheel.name, names - info, item.files())
    for wanted in (f"{item.stem}.dist-info/licenses/LICENSE", f"{item.package}/py.typed"):
        if wanted not in names:
            problems.append(f"{wheel.name} has no {wanted}")
    headers = HeaderParser().parsestr(metadata)
    if (headers["Name"], headers["Version"]) != (item.name, item.version):
        problems.append(f"{wheel.name} is of {headers['Name']} {headers['Version']}")
    return problems


def check_sdist(item: Distribution, sdist: Path) -> list[str]:
    """The package, and what builds it; no tests and no caches."""
    with tarfile.open(sdist) as archive:
        members = [member.name for member in archive if member.isfile()]
    names = {name.removeprefix(f"{item.stem}/") for name in members}
    package = {name for name in names if name.startswith(f"{item.package}/")}
    problems = _differences(sdist.name, package, item.files())
    for wanted in ("LICENSE", "README.md", "pyproject.toml", "PKG-INFO"):
        if wanted not in names:
            problems.append(f"{sdist.name} has no {wanted}")
    for name in sorted(names):
        if is_cache(name) or "tests" in name.split("/"):
            problems.append(f"{sdist.name} must not have {name}")
    return problems


def is_cache(name: str) -> bool:
    return any(part.endswith(CACHES) for part in name.split("/"))


def _differences(archive: str, found: set[str], expected: set[str]) -> list[str]:
    return [
        *(f"{archive} has no {name}" for name in sorted(expected - found)),
        *(f"{archive} has {name}, which is unexpected" for name in sorted(found - expected)),
    ]


def check_artefacts(root: Path, folder: Path) -> list[str]:
    """One sdist and one wheel of each distribution, each with the right contents."""
    problems = []
    expected = set()
    for item in distributions(root):
        sdist, wheel = f"{item.stem}.tar.gz", f"{item.stem}-py3-none-any.whl"
        expected |= {sdist, wheel}
        if (folder / sdist).exists():
            problems += check_sdist(item, folder / sdist)
        if (folder / wheel).exists():
            problems += check_wheel(item, folder / wheel)
    built = {path.name for path in folder.iterdir() if path.suffix in (".gz", ".whl")}
    return problems + _differences(f"{folder.name}/", built, expected)


def check_installed(root: Path) -> list[str]:
    """All distributions are installed in this environment, and none is imported from elsewhere."""
    problems = []
    for item in distributions(root):
        try:
            version = importlib.metadata.version(item.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{item.name} is not installed")
            continue
        if version != item.version:
            problems.append(f"{item.name} {version} is installed, not {item.version}")
        spec = importlib.util.find_spec(item.package)
        origin = Path(spec.origin) if spec is not None and spec.origin else None
        if origin is None or not origin.is_relative_to(sys.prefix):
            problems.append(f"{item.package} is imported from {origin}, not from {sys.prefix}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Check what a release consists of.")
    checks = parser.add_subparsers(dest="check", required=True)
    checks.add_parser("versions", help="the versions in the source tree, and the changelog")
    checks.add_parser("artefacts", help="the sdists and wheels in a folder").add_argument(
        "folder", type=Path
    )
    checks.add_parser("installed", help="the environment of this Python")
    arguments = parser.parse_args()
    if arguments.check == "versions":
        problems = check_versions(ROOT)
    elif arguments.check == "artefacts":
        problems = check_artefacts(ROOT, arguments.folder)
    else:
        problems = check_installed(ROOT)
    print("\n".join(problems) or f"{arguments.check}: no problems found")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
