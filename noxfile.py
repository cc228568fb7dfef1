"""One session for each thing that can be checked or run: ``nox -l`` lists them.

Plain ``nox`` runs all checks. The sessions that need torch share the environment of ``develop``, so
that its gigabytes are installed once; ``nox -R`` runs them again without installing anything.
"""

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "docs", "tests"]  # the quickest first

ROOT = Path(__file__).parent
DISTRIBUTIONS = [
    ".",
    *sorted(str(path.parent) for path in Path("plugins").glob("*/pyproject.toml")),
]


def groups(*names: str) -> list[str]:
    """Requirements of these dependency groups; pip itself knows groups from 25.1 on only."""
    return list(nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), *names))


def run_python(session: nox.Session, *args: str) -> None:
    """Run a Python command in the environment of ``develop``, on one thread per process."""
    folder = "Scripts" if os.name == "nt" else "bin"
    python = ROOT / ".nox" / "develop" / folder / "python"
    session.run(str(python), *args, env={"OMP_NUM_THREADS": "1"}, external=True)


@nox.session(default=False, reuse_venv=True)
def develop(session: nox.Session) -> None:
    """Make the environment that the others share: all distributions, editable, and the tools."""
    editable = [arg for path in DISTRIBUTIONS for arg in ("-e", path)]
    session.install(*editable, *groups("test", "types", "docs"))


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Lint and check the format; ``nox -s lint -- --fix`` mends what can be mended."""
    session.install(*groups("lint"))
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")


@nox.session(venv_backend="none", requires=["develop"])
def types(session: nox.Session) -> None:
    """Check the types."""
    run_python(session, "-m", "mypy")


@nox.session(venv_backend="none", requires=["develop"])
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    shutil.rmtree("docs/_build", ignore_errors=True)
    run_python(session, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", "docs/_build/html")


@nox.session(venv_backend="none", requires=["develop"])
def tests(session: nox.Session) -> None:
    """Run the tests and doctests; what follows ``--`` goes to pytest."""
    # A file stays on one process, which shares its imports and the runs that are compared with.
    together = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
    run_python(session, "-m", "pytest", *(session.posargs or together))


@nox.session(default=False, venv_backend="none", requires=["develop"])
def faults(session: nox.Session) -> None:
    """Break runs for long: ``nox -s faults -- --kills 100 --seed 2``, then the other faults.

    What follows ``--`` goes to ``tests/faults/kill.py``. ``PA_FAULTS_CASES`` says how many cases
    each test tries that makes up its own, ten thousand by default.
    """
    kills = session.posargs or ["--kills", "100", "--cold-kills", "5"]
    run_python(session, "tests/faults/kill.py", *kills)
    os.environ.setdefault("PA_FAULTS_CASES", "10000")
    run_python(session, "-m", "pytest", "tests/faults", "tests/plugins/lab/test_verify_resume.py")


@nox.session(default=False, venv_backend="none", requires=["develop"])
def demo(session: nox.Session) -> None:
    """Train the digits example."""
    run_python(session, "examples/digits/train.py", *session.posargs)


@nox.session(default=False, reuse_venv=True)
def deepspeed(session: nox.Session) -> None:
    """Run the tests of DeepSpeed on the CPU, which installs it."""
    session.install("-e", ".", *groups("test"), "setuptools", "wheel", "torch")
    # accelerate looks for transformers, too, before it starts DeepSpeed.
    wanted = ["deepspeed", "transformers"]
    session.install("--no-build-isolation", *wanted, env={"DS_BUILD_OPS": "0"})
    session.run("python", "-m", "pytest", "tests/deepspeed", *session.posargs)


@nox.session(default=False, reuse_venv=True)
def bench(session: nox.Session) -> None:
    """Compare the cost of a step with that of other frameworks, which are installed for it.

    What follows ``--`` goes to the first of the three programs, ``overhead.py``.
    """
    session.install("-r", "benchmarks/requirements.txt")
    session.run("python", "benchmarks/overhead.py", *session.posargs)
    session.run("python", "-m", "benchmarks.distributed")
    session.run("python", "-m", "benchmarks.speedups")


@nox.session(default=False, reuse_venv=True)
def build(session: nox.Session) -> None:
    """Build the sdist and the wheel of each distribution into ``dist``."""
    session.install("build")
    shutil.rmtree("dist", ignore_errors=True)
    for path in DISTRIBUTIONS:
        session.run("python", "-m", "build", "--outdir", "dist", path)
