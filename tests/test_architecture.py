"""The import contract, and what it can't say: no torch at start, and no private accesses."""

import ast
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
LAYERS = [
    [part.strip() for part in layer.split("|")]
    for contract in CONTRACTS["contracts"]
    if contract["id"] == "layers"
    for layer in contract["layers"]
]
PLUGIN_FOLDERS = [*sorted(ROOT.glob("plugins/*")), *sorted(ROOT.glob("examples/plugins/*"))]
PUBLIC_ONLY = ["builtins", "cli", "testing"]
"""The folders of the core that use only public names of the others' objects, as plugins do."""
MOST_MODULES, MOST_LINES = 87, 17_600
"""What a plain run may import of the core; to be lowered, the aim being 40 and 7,500."""
ATTRIBUTE_FUNCTIONS = {"getattr", "setattr", "hasattr", "delattr"}
TORCH_FREE_FOLDERS = ["cli", "plugins", "settings"]
TORCH_FREE = [
    "pa_core",
    "pa_core.callbacks",
    "pa_core.checkpoint.atomic_io",
    "pa_core.checkpoint.listing",
    "pa_core.checkpoint.retention",
    "pa_core.checkpoint.storage",
    "pa_core.control",
    "pa_core.durations",
    "pa_core.errors",
    "pa_core.hookspecs",
    "pa_core.plugin",
    "pa_core.plugins.builtin_names",
    "pa_core.testing",
    "pa_core.testing.recorder",
]


# -- The import contract --------------------------------------------------------------------------


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Check the contract on a copy of the repository, or on the repository itself."""
    folders = [root, *(root / folder.relative_to(ROOT) for folder in PLUGIN_FOLDERS)]
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources that the contract is about."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "pa_core", tmp_path / "pa_core")
    for folder in PLUGIN_FOLDERS:
        for package in folder.glob("pa_*"):
            shutil.copytree(package, tmp_path / package.relative_to(ROOT))
    return tmp_path


def a_file_of(part: str, root: Path) -> Path:
    folder = root / "pa_core" / part
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def append_import(file: Path, module: str) -> None:
    file.write_text(f"{file.read_text()}\n\ndef wrong():\n    import {module}\n")


def test_the_import_contract_is_kept() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_import_in_any_layer_breaks_the_contract(copy: Path) -> None:
    for above, layer in itertools.pairwise(LAYERS):
        for part in layer:
            append_import(a_file_of(part, copy), f"pa_core.{above[0]}")
    done = lint_imports(copy)
    assert done.returncode == 1
    for above, layer in itertools.pairwise(LAYERS):
        for part in layer:
            wrong = f"pa_core.{part} is not allowed to import pa_core.{above[0]}:"
            assert wrong in done.stdout


def test_folders_of_one_layer_may_not_import_each_other(copy: Path) -> None:
    for first, second, *_ in [layer for layer in LAYERS if len(layer) > 1]:
        append_import(a_file_of(first, copy), f"pa_core.{second}")
    done = lint_imports(copy)
    for first, second, *_ in [layer for layer in LAYERS if len(layer) > 1]:
        assert f"pa_core.{first} is not allowed to import pa_core.{second}:" in done.stdout


def test_a_new_module_must_be_given_its_layer(copy: Path) -> None:
    (copy / "pa_core" / "newcomer.py").write_text("")
    done = lint_imports(copy)
    assert done.returncode == 1
    assert "- pa_core.newcomer" in done.stdout


@pytest.mark.parametrize("folder", ["builtins", "checkpoint", "engine", "loop", "plugins"])
def test_a_plugin_package_may_not_use_a_folder_of_the_core(folder: str, copy: Path) -> None:
    packages = [package for one in PLUGIN_FOLDERS for package in one.glob("pa_*")]
    for package in packages:
        append_import(copy / package.relative_to(ROOT) / "__init__.py", f"pa_core.{folder}")
    done = lint_imports(copy)
    assert len(packages) == len(PLUGIN_FOLDERS)
    for package in packages:
        assert f"{package.name} is not allowed to import pa_core.{folder}:" in done.stdout


def test_libraries_belong_to_their_plugins_and_plugins_are_independent(copy: Path) -> None:
    append_import(copy / "pa_core/trainer.py", "torchmetrics")
    append_import(copy / "plugins/report/pa_report/__init__.py", "timm")
    append_import(copy / "plugins/models/pa_models/__init__.py", "wandb")
    append_import(copy / "plugins/models/pa_models/__init__.py", "pa_metrics")
    append_import(copy / "plugins/tracking/pa_tracking/__init__.py", "torchmetrics")
    done = lint_imports(copy)
    for source, target in [
        ("pa_core", "torchmetrics"),
        ("pa_report", "timm"),
        ("pa_models", "wandb"),
        ("pa_models", "pa_metrics"),
        ("pa_tracking", "torchmetrics"),
    ]:
        assert f"{source} is not allowed to import {target}:" in done.stdout


def test_every_distribution_is_under_the_contract() -> None:
    packages = {package.name for one in PLUGIN_FOLDERS for package in one.glob("pa_*")}
    assert set(CONTRACTS["root_packages"]) == {"pa_core", *packages}


# -- What imports can't say -----------------------------------------------------------------------


def test_the_command_line_and_what_it_loads_import_no_torch() -> None:
    files = [file for part in TORCH_FREE_FOLDERS for file in (ROOT / "pa_core" / part).glob("*.py")]
    modules = [*TORCH_FREE, *(f"pa_core.{file.parent.name}.{file.stem}" for file in files)]
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(modules)}:\n"
        "    importlib.import_module(name.removesuffix('.__init__'))\n"
        "    for heavy in ('torch', 'accelerate', 'numpy', 'transformers', 'timm'):\n"
        "        assert heavy not in sys.modules, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_each_built_in_plugin_has_a_file_of_its_own() -> None:
    from pa_core.plugins.builtin_names import BUILTINS

    modules = [target.partition(":")[0] for target in BUILTINS.values()]
    assert len(set(modules)) == len(modules)
    assert all(module.startswith("pa_core.builtins.") for module in modules)


def private_names_of_the_core() -> set[str]:
    """The private attributes and methods that classes of the core define, built-ins aside."""
    names = set()
    for file in (ROOT / "pa_core").rglob("*.py"):
        if file.relative_to(ROOT / "pa_core").parts[0] in PUBLIC_ONLY:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                names |= {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                names.add(node.attr)
    return {name for name in names if is_private(name)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_accesses(code: str, of_the_core: set[str]) -> list[str]:
    """Accesses to private attributes of a trainer or another object of the core.

    Found are private attributes of anything called a trainer or a probe; attributes that the core
    defines, of anything but the object itself; those of the object itself in a subclass of Trainer
    that doesn't define them; and names passed to `getattr` and the like.
    """
    found, tree = [], ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            is_own = owner in ("self", "cls", "super()")
            is_trainer = re.search(r"(trainer|probe)$", owner) is not None
            if is_trainer or (node.attr in of_the_core and not is_own):
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ATTRIBUTE_FUNCTIONS:
            if len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                name = str(node.args[1].value)
                if is_private(name) and name in of_the_core:
                    found.append(f"{ast.unparse(node.func)}({name!r})")
        elif isinstance(node, ast.ClassDef):
            if any(ast.unparse(base).endswith("Trainer") for base in node.bases):
                found += _inherited_private_names(node, of_the_core)
    return found


def _inherited_private_names(class_: ast.ClassDef, of_the_core: set[str]) -> list[str]:
    names = [
        node
        for node in ast.walk(class_)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    ]
    own = {node.attr for node in names if isinstance(node.ctx, ast.Store)}
    own |= {one.name for one in class_.body if isinstance(one, ast.FunctionDef)}
    return [
        f"{class_.name}: {ast.unparse(node)}"
        for node in names
        if node.attr in of_the_core and (node.attr not in own or ast.unparse(node.value) != "self")
    ]


def test_plugins_examples_built_ins_and_the_command_line_use_public_names_only() -> None:
    of_the_core = private_names_of_the_core() - {"_defaults"}  # torchmetrics has one, too
    assert {"_engine", "_hooks", "_callers"} <= of_the_core
    folders = [*(ROOT / "plugins").glob("*/pa_*"), ROOT / "examples"]
    folders += [ROOT / "pa_core" / folder for folder in PUBLIC_ONLY]
    found = {
        str(file.relative_to(ROOT)): names
        for folder in folders
        for file in sorted(folder.rglob("*.py"))
        if (names := private_accesses(file.read_text(), of_the_core))
    }
    assert found == {}


def test_every_kind_of_private_access_is_found() -> None:
    code = (
        "class DigitsTrainer(Trainer):\n"
        "    def train_epoch_end(self):\n"
        "        self._own = self._engine.rank\n"
        "        return self._own, super()._run('x')\n"
        "class Plugin:\n"
        "    def __init__(self, trainer, run):\n"
        "        self._engine = self._own = self.__dict__\n"
        "        self.trainer._own, trainer._other, run.control._here, run.plain, metric._done\n"
        "        getattr(run, '_engine'), getattr(run, 'plain'), hasattr(run, '_computed')\n"
    )
    assert sorted(private_accesses(code, {"_engine", "_run", "_here"})) == [
        *("DigitsTrainer: self._engine", "DigitsTrainer: super()._run", "getattr('_engine')"),
        *("run.control._here", "self.trainer._own", "trainer._other"),
    ]


def test_private_attributes_of_the_trainer_are_used_in_no_more_places_of_the_core() -> None:
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    page = (ROOT / "docs" / "understand" / "inside.md").read_text()
    recorded = re.search(r"used in other folders of the core \| ([\d,]+) \|", page)
    assert recorded is not None, "run: python docs/figures.py"
    assert figures["private_accesses"]() <= int(recorded[1].replace(",", ""))


def test_the_figures_of_the_page_are_about_what_the_code_has() -> None:
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    page = (ROOT / "docs" / "understand" / "inside.md").read_text()
    now, said = figures["table"](), page.partition(figures["BEGIN"])[2]
    pattern = re.compile(r"^\| (.+) \| ([\d,]+) \|$", re.MULTILINE)
    numbers = {name: int(value.replace(",", "")) for name, value in pattern.findall(now)}
    recorded = {name: int(value.replace(",", "")) for name, value in pattern.findall(said)}
    assert numbers.keys() == recorded.keys(), "run: python docs/figures.py"
    for name, number in numbers.items():
        assert number == pytest.approx(recorded[name], rel=0.05), f"{name}: python docs/figures.py"
    assert numbers["modules that a plain run imports"] <= MOST_MODULES
    assert numbers["lines of these modules"] <= MOST_LINES


def test_the_loop_can_be_read_in_one_sitting() -> None:
    """An aim of the design, and a bound of what its readers need from elsewhere."""
    tree = ast.parse((ROOT / "pa_core" / "trainer.py").read_text())
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    methods = {node.name: node for node in trainer.body if isinstance(node, ast.FunctionDef)}
    loop = [
        methods[name]
        for name in (
            *("_run_train_epoch", "_forward_backward", "_update_parameters", "apply_update"),
            *("_handle_requests", "_run_eval_epoch"),
        )
    ]
    lines = 0
    for method in loop:
        has_docstring = ast.get_docstring(method) is not None
        first = method.body[1] if has_docstring else method.body[0]
        lines += (method.end_lineno or 0) - first.lineno + 1
    attributes = {
        node.attr
        for method in loop
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    assert lines <= 150
    assert len(attributes - methods.keys()) <= 20, sorted(attributes - methods.keys())
