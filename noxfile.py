"""One session per check or job; ``nox -l`` lists them.

Plain ``nox`` runs all checks. Most sessions that need torch share the environment of ``develop``,
so that it is installed only once; ``nox -R`` runs them again without installing anything.
"""

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "docs", "tests"]  # the fastest first

ROOT = Path(__file__).parent
DISTRIBUTIONS = [
    ".",
    *sorted(str(path.parent) for path in Path("plugins").glob("*/pyproject.toml")),
]
EXAMPLE_PLUGINS = sorted(
    str(path.parent) for path in Path("examples/plugins").glob("*/pyproject.toml")
)


def groups(*names: str) -> list[str]:
    """The requirements of dependency groups, which pip itself can install only from 25.1 on."""
    return list(nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), *names))


def run_python(session: nox.Session, *args: str) -> None:
    """Run Python in the environment of ``develop``, with one thread per process."""
    folder = "Scripts" if os.name == "nt" else "bin"
    python = ROOT / ".nox" / "develop" / folder / "python"
    session.run(str(python), *args, env={"OMP_NUM_THREADS": "1"}, external=True)


@nox.session(default=False, reuse_venv=True)
def develop(session: nox.Session) -> None:
    """Create the shared environment: all distributions in editable form, and the tools."""
    editable = [arg for path in DISTRIBUTIONS for arg in ("-e", path)]
    session.install(*editable, *groups("test", "lint", "types", "docs"))


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check style, format and the import contract; ``nox -s lint -- --fix`` fixes what it can."""
    session.install(*groups("lint"))
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")
    sources = os.pathsep.join([*DISTRIBUTIONS, *EXAMPLE_PLUGINS])  # read, not imported
    session.run("lint-imports", "--no-logo", "--no-cache", env={"PYTHONPATH": sources})


@nox.session(venv_backend="none", requires=["develop"])
def types(session: nox.Session) -> None:
    """Check the types."""
    run_python(session, "-m", "mypy")


@nox.session(venv_backend="none", requires=["develop"])
def docs(session: nox.Session) -> None:
    """Build the documentation; warnings are errors."""
    shutil.rmtree("docs/_build", ignore_errors=True)
    run_python(session, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", "docs/_build/html")


@nox.session(venv_backend="none", requires=["develop"])
def tests(session: nox.Session) -> None:
    """Run the tests and doctests; arguments after ``--`` go to pytest."""
    # All tests of a file run in one process, which shares imports and reference runs.
    # One more process than there are cores: tests wait for the processes that they start.
    workers = str(min(4, (os.cpu_count() or 1) + 1))
    parallel = ["-n", workers, "--dist", "loadfile", "--no-loadscope-reorder"]
    # DeepSpeed is built when it is installed, so its tests have a session of their own.
    run_python(
        session, "-m", "pytest", *(session.posargs or [*parallel, "--ignore=tests/deepspeed"])
    )


@nox.session(default=False, venv_backend="none", requires=["develop"])
def faults(session: nox.Session) -> None:
    """Inject many more faults than ``tests``: ``nox -s faults -- --kills 100 --seed 2``.

    Arguments after ``--`` go to ``tests/faults/kill.py``. ``PA_FAULTS_CASES`` is the number of
    generated cases per test, 10,000 by default.
    """
    kills = session.posargs or ["--kills", "100", "--cold-kills", "5"]
    run_python(session, "tests/faults/kill.py", *kills)
    os.environ.setdefault("PA_FAULTS_CASES", "10000")
    run_python(session, "-m", "pytest", "tests/faults", "tests/plugins/lab/test_verify_resume.py")


@nox.session(default=False, venv_backend="none", requires=["develop"])
def families(session: nox.Session) -> None:
    """Check the losses of transformers' models, and write the page with their table.

    Words after ``--`` choose models by their names, which are then only printed.
    """
    run_python(session, "docs/transformers_losses.py", *session.posargs)


@nox.session(default=False, venv_backend="none", requires=["develop"])
def demo(session: nox.Session) -> None:
    """Train the digits example."""
    run_python(session, "examples/digits/train.py", *session.posargs)


@nox.session(default=False, reuse_venv=True)
def deepspeed(session: nox.Session) -> None:
    """Install DeepSpeed and run its tests on the CPU."""
    session.install("-e", ".", *groups("test"), "setuptools", "wheel", "torch")
    # accelerate requires transformers for DeepSpeed.
    packages = ["deepspeed", "transformers"]
    session.install("--no-build-isolation", *packages, env={"DS_BUILD_OPS": "0"})
    session.run("python", "-m", "pytest", "tests/deepspeed", *session.posargs)


@nox.session(default=False, reuse_venv=True)
def bench(session: nox.Session) -> None:
    """Install other frameworks, and compare the cost of a step with theirs.

    Arguments after ``--`` go to the first of the four programs, ``overhead.py``.
    """
    session.install("-r", "benchmarks/requirements.txt")
    session.run("python", "benchmarks/overhead.py", *session.posargs)
    session.run("python", "-m", "benchmarks.distributed")
    session.run("python", "-m", "benchmarks.speedups")
    session.run("python", "benchmarks/loading.py")


@nox.session(default=False, reuse_venv=True)
def looks(session: nox.Session) -> None:
    """Run the same job in other frameworks, and take the pictures of the docs and the README.

    ``nox -s looks -- --only pa_core`` runs it in one of them. It needs Chromium.
    """
    session.install("-r", "benchmarks/side_by_side/requirements.txt")
    session.run("python", "-m", "benchmarks.side_by_side", *session.posargs)
    session.run("python", "-m", "benchmarks.side_by_side.pictures")


@nox.session(default=False, reuse_venv=True)
def build(session: nox.Session) -> None:
    """Build the sdist and the wheel of each distribution into ``dist``, and check them."""
    session.install("build", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "scripts/check_dist.py", "versions")
    for path in DISTRIBUTIONS:
        session.run("python", "-m", "build", "--outdir", "dist", path)
    session.run("python", "scripts/check_dist.py", "artefacts", "dist")
    session.run("twine", "check", "--strict", *artefacts("*"))


@nox.session(default=False, reuse_venv=False, requires=["build"])
def release(session: nox.Session) -> None:
    """Build and check all distributions, then train with the wheels in a fresh environment."""
    # Given as files, the project's own distributions never come from an index.
    session.install(*artefacts("*.whl"), "scikit-learn")
    session.env["PYTHONPATH"] = ""
    session.run("python", "scripts/check_dist.py", "installed")
    session.run("pa", "plugins")
    session.run("python", "examples/digits/train.py", "--epochs", "2")


def artefacts(pattern: str) -> list[str]:
    """The files in ``dist`` that match the pattern."""
    return [str(path) for path in sorted((ROOT / "dist").glob(pattern))]
