"""The import rules and the sizes that keep the house in order."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "pa_core").rglob("*.py"))
PLUGIN_PACKAGES = {
    "pa_metrics": "metrics",
    "pa_schedulers": "schedulers",
    "pa_models": "models",
    "pa_tracking": "tracking",
    "pa_report": "report",
    "pa_lab": "lab",
}
SERVICES = {"tensorboard", "wandb", "mlflow", "comet_ml", "aim", "swanlab", "trackio"}
TORCH_FREE = [
    "pa_core",
    "pa_core.builtins",
    "pa_core.cli.app",
    "pa_core.cli.entry_points",
    "pa_core.control",
    "pa_core.plugins.discovery",
    "pa_core.plugins.distributions",
    "pa_core.checkpoint.atomic_io",
    "pa_core.cli.doctor",
    "pa_core.durations",
    "pa_core.errors",
    "pa_core.hookspecs",
    "pa_core.plugins.implementations",
    "pa_core.plugins.process_scope",
    "pa_core.plugins.manager",
    "pa_core.plugins.pluggy_bridge",
    "pa_core.checkpoint.retention",
    "pa_core.cli.new_plugin",
    "pa_core.settings.environment",
    "pa_core.settings.table",
    "pa_core.checkpoint.listing",
    "pa_core.checkpoint.storage",
    "pa_core.settings.validation",
    "pa_core.testing",
    "pa_core.testing.recorder",
]


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_imports(path: Path) -> set[str]:
    """Every module that the file imports anywhere, except for type checkers only."""
    return set(_imports(ast.parse(path.read_text()).body))


def _imports(statements: list[ast.stmt]) -> list[str]:
    found: list[str] = []
    for statement in statements:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            found += _imports(statement.orelse)
        elif isinstance(statement, ast.Import):
            found += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            home = statement.module or ""
            found += [home, *(f"{home}.{alias.name}" for alias in statement.names)]
        else:
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                for child in getattr(statement, field, []):
                    found += _imports(child.body if hasattr(child, "pattern") else [child])
    return found


def packages(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_the_import_finder_sees_nested_imports_and_skips_type_checking_ones(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "import a.b\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import hidden\nelse:\n    import shown\n"
        "try:\n    import c\nexcept ImportError:\n    import d\nfinally:\n    import e\n"
        "class K:\n    def f(self):\n        with x:\n            from g import h\n"
        "match x:\n    case 1:\n        import i\n"
    )
    assert runtime_imports(file) == {
        *("a.b", "typing", "typing.TYPE_CHECKING", "shown", "c", "d", "e", "g", "g.h", "i")
    }


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_the_core_never_imports_a_plugin_or_a_plugins_library(path: Path) -> None:
    banned = {*PLUGIN_PACKAGES, "torchmetrics", "timm", "transformers", *SERVICES}
    assert not packages(runtime_imports(path)) & banned


@pytest.mark.parametrize(
    "path",
    [path for path in CORE if module_name(path) not in ("pa_core", "pa_core.cli.app")],
    ids=module_name,
)
def test_only_the_face_and_the_command_line_import_the_trainer(path: Path) -> None:
    assert not any(name.startswith("pa_core.trainer") for name in runtime_imports(path))


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_this_module_imports_no_torch(module: str) -> None:
    heavy = ("torch", "accelerate", "numpy", "transformers", "timm", "torchmetrics")
    code = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize("package", PLUGIN_PACKAGES)
def test_a_plugin_package_imports_the_core_and_never_another_plugin(package: str) -> None:
    home = ROOT / "plugins" / PLUGIN_PACKAGES[package]
    files = sorted((home / package).rglob("*.py"))
    assert files
    libraries = {
        "pa_metrics": {"torchmetrics"},
        "pa_schedulers": {"timm", "transformers"},
        "pa_models": {"timm", "transformers"},
        "pa_tracking": SERVICES,
        "pa_report": set(),
        "pa_lab": set(),
    }
    foreign = {*PLUGIN_PACKAGES, *set().union(*libraries.values())} - libraries[package] - {package}
    for path in files:
        assert not packages(runtime_imports(path)) & foreign, path


@pytest.mark.parametrize("package", PLUGIN_PACKAGES)
def test_a_plugin_package_takes_nothing_private_from_the_core(package: str) -> None:
    for path in sorted((ROOT / "plugins" / PLUGIN_PACKAGES[package] / package).rglob("*.py")):
        names = {name for name in runtime_imports(path) if packages({name}) == {"pa_core"}}
        private = {n for n in names if any(p.startswith("_") and p[1] != "_" for p in n.split("."))}
        assert not private, path


@pytest.mark.parametrize(
    "path", [*CORE, *sorted(ROOT.glob("plugins/*/pa_*/**/*.py"))], ids=module_name
)
def test_every_module_can_be_read_in_one_sitting(path: Path) -> None:
    limit = 680 if module_name(path) == "pa_core.trainer" else 500
    assert len(path.read_text().splitlines()) <= limit


def test_each_built_in_plugin_has_a_file_of_its_own() -> None:
    from pa_core.builtins import BUILTINS

    modules = [target.partition(":")[0] for target in BUILTINS.values()]
    assert len(set(modules)) == len(modules)
    assert all(module.startswith("pa_core.builtins.") for module in modules)
