"""Mistakes of first scripts, settings and plugins, and the errors that they get.

`docs/errors.py` makes the page "Errors you may meet" of them. Each is a function whose body is run
as a script: ``model``, ``loss_func``, ``optimizer`` and ``data`` are its arguments, and a settings
file may belong to it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pa_core import Trainer, TrainerCallback, hookimpl

FOLDER = "/home/me/project"
"""What the page calls the folder of the script."""


@dataclass(frozen=True)
class Mistake:
    """A mistake.

    Attributes:
        section: of the page.
        title: the mistake in a few words.
        make: its body is the script.
        expected: what the message must contain.
        files: the text of other files in the script's folder, by name.
    """

    section: str
    title: str
    make: Callable[..., object]
    expected: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """The script."""
        source = textwrap.dedent(inspect.getsource(self.make))
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef)
        lines = source.splitlines()[function.body[0].lineno - 1 :]
        first = function.body[0]
        if isinstance(first, ast.ClassDef | ast.FunctionDef) and first.decorator_list:
            lines = source.splitlines()[first.decorator_list[0].lineno - 1 :]
        return _spaced(textwrap.dedent("\n".join(lines))) + "\n"

    @functools.cached_property
    def error(self) -> BaseException:
        """The error that the script gets; a warning counts as one."""
        namespace = {
            "__name__": "train",
            **{name: globals()[name] for name in _IMPORTED},
            "model": (model := nn.Linear(4, 2)),
            "loss_func": nn.CrossEntropyLoss(),
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "data": TensorDataset(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long)),
        }
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            for file, text in {"pyproject.toml": "[tool.pa-core]\n", **self.files}.items():
                (folder / file).write_bytes(text.encode(_ENCODING.get(file, "utf-8")))
            variables = {k: v for k, v in os.environ.items() if not k.startswith("PA_CORE_")}
            variables["PA_CORE_CONFIG"] = str(folder / "pyproject.toml")
            with (
                chdir(folder),
                redirect_stdout(StringIO()),
                redirect_stderr(StringIO()),
                warnings.catch_warnings(),
                # Whatever is installed here, the page is that of pa-core alone.
                mock.patch("importlib.metadata.entry_points", return_value=()),
                mock.patch.dict(os.environ, variables, clear=True),
            ):
                warnings.simplefilter("error")
                try:
                    exec(compile(self.code, "train.py", "exec", dont_inherit=True), namespace)  # noqa: S102
                except Exception as error:  # noqa: BLE001 - whatever it gets
                    self._forget(error, folder)
                    return error
        raise AssertionError(f"{self.title}: no error")

    @staticmethod
    def _forget(error: BaseException, folder: Path) -> None:
        """Forget the frames, which hold the run's objects, and where the folder was."""
        error.__traceback__ = error.__context__ = error.__cause__ = None
        error.args = tuple(_moved(one, folder) for one in error.args)
        if hasattr(error, "__notes__"):
            error.__notes__ = [_moved(note, folder) for note in error.__notes__]

    @property
    def message(self) -> str:
        """The error as Python prints it: its type, its text, and its notes."""
        error = self.error
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


def _spaced(code: str) -> str:
    """A script with two blank lines around functions and classes, as at the top of a module."""
    lines, parts, end, was_block = code.splitlines(), list[str](), 0, False
    for statement in ast.parse(code).body:
        is_block = isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        gap = statement.lineno - 1 - end
        parts += [""] * (2 if end and (is_block or was_block) else gap)
        was_block, start, end = is_block, statement.lineno - 1, statement.end_lineno or 0
        parts += lines[start:end]
    return "\n".join(parts)


def _moved(value: Any, folder: Path) -> Any:
    return value.replace(str(folder), FOLDER) if isinstance(value, str) else value


_ENCODING = {"utf16.toml": "utf-16"}
_IMPORTED = ("torch", "nn", "DataLoader", "TensorDataset", "Trainer", "TrainerCallback", "hookimpl")

MISTAKES: list[Mistake] = []

_section = ""


def section(name: str) -> None:
    """Start a section of the page."""
    global _section  # noqa: PLW0603
    _section = name


def mistake(
    title: str, *expected: str, **files: str
) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Add a function to the mistakes.

    Args:
        title: the mistake in a few words.
        *expected: what the message must contain.
        **files: the text of other files, by name, with ``_`` for the dot.
    """

    def add(make: Callable[..., object]) -> Callable[..., object]:
        named = {
            name.replace("_", ".") if name != "settings" else "pyproject.toml": textwrap.dedent(
                text
            )
            for name, text in files.items()
        }
        MISTAKES.append(Mistake(_section, title, make, expected, named))
        return make

    return add


# -- The list -------------------------------------------------------------------------------------

section("Data and the loss")


@mistake("The batches are dicts", "dict", "calculate_train_batch_loss", "pip install pa-models")
def dict_batches(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train([{"x": torch.zeros(4), "label": 0}] * 8, num_epochs=1)


@mistake("The evaluation batches are dicts", "evaluation batch is a dict", "calculate_eval_batch")
def dict_evaluation_batches(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.evaluate([{"x": torch.zeros(4), "label": 0}] * 8)


@mistake("The batches have three entries", "3 entries", "pair (inputs, targets)", "override")
def three_entries(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train([(torch.zeros(4), torch.zeros(4), 0)] * 8, num_epochs=1)


@mistake("The batches have no targets", "1 entry", "pair (inputs, targets)")
def no_targets(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(TensorDataset(torch.zeros(8, 4)), num_epochs=1)


@mistake("A loader of samples instead of batches", "Give it a batch_size")
def loader_of_samples(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(DataLoader(data, batch_size=None), num_epochs=1)


@mistake("The model takes several inputs", "a list of 2 as inputs", "override")
def several_inputs(model, loss_func, optimizer, data):
    trainer = Trainer(nn.Bilinear(4, 4, 2), loss_func, torch.optim.SGD)
    trainer.train([((torch.zeros(4), torch.zeros(4)), 0)] * 8, num_epochs=1)


@mistake("A missing loss function", "No loss function (loss_func=None)", "Give the Trainer a loss")
def no_loss(model, loss_func, optimizer, data):
    trainer = Trainer(model, None, optimizer)
    trainer.train(data, num_epochs=1)


@mistake("The loss function is a class", "class CrossEntropyLoss", "CrossEntropyLoss()")
def loss_class(model, loss_func, optimizer, data):
    Trainer(model, nn.CrossEntropyLoss, optimizer)


@mistake("The loss function is a name", "loss_func is 'mse'", "nn.CrossEntropyLoss()")
def loss_name(model, loss_func, optimizer, data):
    Trainer(model, "mse", optimizer)


@mistake("The loss has a value for each sample", "shape (8,)", "scalar tensor")
def loss_of_samples(model, loss_func, optimizer, data):
    trainer = Trainer(model, nn.CrossEntropyLoss(reduction="none"), optimizer)
    trainer.train(data, num_epochs=1)


@mistake("The loss is a number", "loss_func returned float", "scalar tensor")
def loss_number(model, loss_func, optimizer, data):
    trainer = Trainer(model, lambda outputs, targets: outputs.mean().item(), optimizer)
    trainer.train(data, num_epochs=1)


@mistake("The loss is detached from the graph", "loss_func returned a loss without", "detach()")
def loss_detached(model, loss_func, optimizer, data):
    def accuracy(outputs, targets):
        return (outputs.argmax(1) == targets).float().mean()

    trainer = Trainer(model, accuracy, optimizer)
    trainer.train(data, num_epochs=1)


@mistake("The whole model is frozen", "No parameter", "requires_grad_(True)")
def frozen(model, loss_func, optimizer, data):
    model.requires_grad_(False)
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs=1)


@mistake("The dataset is a name", "The train data are 'mnist'", "expected a dataset")
def dataset_name(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train("mnist", num_epochs=1)


@mistake("The dataset is a tuple of tensors", "tuple of 2 tensors", "TensorDataset(*tensors)")
def dataset_tuple(model, loss_func, optimizer, data):
    inputs, targets = torch.zeros(8, 4), torch.zeros(8)
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train((inputs, targets), num_epochs=1)


@mistake("The dataset is a dict of splits", "keys train, test", "data['train']")
def dataset_splits(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train({"train": data, "test": data}, num_epochs=1)


@mistake("The dataset is None", "needs a dataset, not None")
def dataset_none(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(None, num_epochs=1)


@mistake("The dataset is empty", "train dataset is empty")
def dataset_empty(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train([], num_epochs=1)


@mistake("The data are an exhausted iterator", "yielded no batch", "re-iterable loader")
def exhausted(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(iter(DataLoader(data, batch_size=4)), num_epochs=2)


@mistake("Nothing to evaluate on", "evaluate() needs a dataset")
def nothing_to_evaluate(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer).evaluate()


section("The model, the optimizer and the scheduler")


@mistake("The model is a class", "model is the class Linear", "pass an instance: Linear(…)")
def model_class(model, loss_func, optimizer, data):
    Trainer(nn.Linear, loss_func, torch.optim.SGD)


@mistake("Loss and optimizer are swapped", "loss_func is an SGD", "Trainer(model, loss_func, opt")
def swapped(model, loss_func, optimizer, data):
    Trainer(model, optimizer, loss_func)


@mistake("The optimizer is a name", "optimizer is 'adam'", "torch.optim.AdamW(model.parameters()")
def optimizer_name(model, loss_func, optimizer, data):
    Trainer(model, loss_func, "adam")


@mistake("The optimizers are a dict", "as a list, not as a dictionary: optimizer=[body, head]")
def optimizer_dict(model, loss_func, optimizer, data):
    Trainer(model, loss_func, {"body": optimizer, "head": optimizer})


@mistake("Two optimizers share parameters", "both hold weight, bias", "its own parameters")
def optimizers_shared(model, loss_func, optimizer, data):
    Trainer(model, loss_func, [optimizer, torch.optim.Adam(model.parameters())])


@mistake("The optimizer belongs to another model", "2 parameters that aren't in the model")
def optimizer_of_another(model, loss_func, optimizer, data):
    Trainer(nn.Linear(4, 2), loss_func, optimizer)


@mistake("A function creates no optimizer", "create returned None, not an optimizer")
def optimizer_function(model, loss_func, optimizer, data):
    def create(parameters):
        torch.optim.SGD(parameters, lr=0.1)

    Trainer(model, loss_func, create)


@mistake("A missing optimizer", "Training needs an optimizer", "functools.partial")
def no_optimizer(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, None)
    trainer.train(data, num_epochs=1)


@mistake("The scheduler belongs to another optimizer", "another SGD", "would change nothing")
def scheduler_of_another(model, loss_func, optimizer, data):
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, loss_func, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(other, step_size=1)
    trainer.train(data, num_epochs=1, create_scheduler_fn=scheduler)


@mistake("A function creates the scheduler of another optimizer", "another SGD", "change nothing")
def scheduler_function_of_another(model, loss_func, optimizer, data):
    other = torch.optim.SGD(model.parameters(), lr=0.1)

    def create(optimizer):
        return torch.optim.lr_scheduler.StepLR(other, step_size=1)

    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs=1, create_scheduler_fn=create)


@mistake("A function creates no scheduler", "create_scheduler_fn returned None", "stays as it is")
def scheduler_none(model, loss_func, optimizer, data):
    def create(optimizer):
        torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)

    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs=1, create_scheduler_fn=create)


@mistake("The scheduler's arguments are missing", "'step_size'", "partial(StepLR, step_size=10)")
def scheduler_arguments(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs=1, create_scheduler_fn=torch.optim.lr_scheduler.StepLR)


@mistake("No plugin registers the scheduler", "No 'cosine' among the schedulers", "pa-schedulers")
def scheduler_name(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs=1, create_scheduler_fn="cosine")


@mistake("The scheduler is a number", "create_scheduler_fn is 0.1; pass a function of the opt")
def scheduler_number(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs=1, create_scheduler_fn=0.1)


section("Arguments")


@mistake("A fraction of epochs", "num_epochs: 1.5 is not", "write '1.5 epochs'")
def fraction(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs=1.5)


@mistake("A misspelt unit", "num_epochs: '3 epoks' is not", "Did you mean 'epochs'?")
def misspelt_unit(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs="3 epoks")


@mistake("Data and number of epochs are swapped", "num_epochs: a TensorDataset is not a valid")
def swapped_arguments(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(3, data)


@mistake("A batch size of 0", "per_device_batch_size must be a positive integer, not 0")
def batch_size(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs=1, per_device_batch_size=0)


@mistake("Clipping in both ways", "gradient_clip_value or by gradient_clip_norm, not by both")
def clipping(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs=1, gradient_clip_value=1.0, gradient_clip_norm=1.0)


@mistake("Arguments of the loader aren't a dict", "train_dataloader_kwargs is 4; it must be a dict")
def loader_arguments(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs=1, train_dataloader_kwargs=4)


@mistake("A seed that isn't a number", "seed must be an integer, not 'random'")
def seed_text(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer, seed="random")


@mistake("A run history that is a class", "run_history is the class dict; pass an instance")
def history_class(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer, run_history=dict)


@mistake("A plugin instead of a list", "must be a list, not 'early_stopping'", "['early_stopping']")
def plugins_text(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer, plugins="early_stopping")


@mistake("Plugins with their settings as a dict", "must be a list, not a dict", "the arguments of")
def plugins_dict(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer, plugins={"early_stopping": {"watch_metric": "loss"}})


@mistake("A name among the callbacks", "is not a plugin", "plugins=['early_stopping']")
def callback_name(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer, callbacks=["early_stopping"])


section("Settings")


@mistake(
    "A plugin that isn't installed",
    "pyproject.toml: [tool.pa-core] plugins",
    "part of pa-metrics, which is not installed: pip install pa-metrics",
    settings="""
    [tool.pa-core]
    plugins = ["metrics"]
    """,
)
def not_installed(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "A misspelt plugin",
    "unknown plugin 'early_stoping'. Did you mean 'early_stopping'?",
    settings="""
    [tool.pa-core]
    plugins = ["early_stoping"]
    """,
)
def misspelt(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "A table with a similar name",
    "[tool.pa_core]; it must be called [tool.pa-core]",
    settings="""
    [tool.pa_core]
    plugins = ["early_stopping"]
    """,
)
def near_miss(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "A table with the name of a distribution",
    "has a table [tool.pa-metrics]; the settings of a plugin belong in [tool.pa-core.metrics]",
    settings="""
    [tool.pa-core]

    [tool.pa-metrics]
    task = "multiclass"
    """,
)
def distribution_table(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "Misspelt keys and wrong values, all at once",
    "[tool.pa-core.early_stopping] has no key 'watch_metrc'. Did you mean 'watch_metric'?",
    "[tool.pa-core.early_stopping] early_stopping_patience: expected a valid integer, got 'two'",
    "[tool.pa-core.log_metrics] every: '15 minuets' is not a valid duration",
    settings="""
    [tool.pa-core]
    plugins = ["early_stopping"]

    [tool.pa-core.early_stopping]
    watch_metrc = "eval_loss_epoch"
    early_stopping_patience = "two"

    [tool.pa-core.log_metrics]
    every = "15 minuets"
    """,
)
def wrong_values(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "Settings of a plugin that isn't enabled",
    "[tool.pa-core.early_stopping]: 'early_stopping' isn't enabled. Add it to plugins",
    settings="""
    [tool.pa-core.early_stopping]
    early_stopping_patience = 2
    """,
)
def not_enabled(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "A plugin listed twice",
    "'early_stopping' is listed twice",
    "such as 'early_stopping:second'",
    settings="""
    [tool.pa-core]
    plugins = ["early_stopping", "early_stopping"]
    """,
)
def listed_twice(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "A plugin that is off already is disabled",
    "disable: 'early_stopping' is not a built-in plugin that is on by default",
    settings="""
    [tool.pa-core]
    disable = ["early_stopping"]
    """,
)
def disabled(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "A plugin file that doesn't exist",
    f"Plugin file not found: {FOLDER}/watch.py",
    settings="""
    [tool.pa-core]
    plugins = ["watch.py"]
    """,
)
def no_file(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "A class of a module that is in no package",
    "unknown plugin 'watch:Watch'",
    "'watch.py'",
    settings="""
    [tool.pa-core]
    plugins = ["watch:Watch"]
    """,
)
def no_package(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "A plugin file that exits when it is imported",
    "The plugin 'watch'",
    "can't be imported: SystemExit: 2",
    settings="""
    [tool.pa-core]
    plugins = ["watch.py"]
    """,
    watch_py="""
    import sys

    if len(sys.argv) < 1_000:
        sys.exit(2)
    """,
)
def exits(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "A validator that fails",
    "pyproject.toml: [tool.pa-core.watch] can't be validated: KeyError: 0",
    settings="""
    [tool.pa-core]
    plugins = ["watch.py"]

    [tool.pa-core.watch]
    every = 0
    """,
    watch_py="""
    from pydantic import BaseModel, field_validator

    from pa_core import TrainerCallback


    class Watch(TrainerCallback):
        class Settings(BaseModel):
            every: int = 1

            @field_validator("every")
            @classmethod
            def check(cls, every):
                return {1: 100, 2: 50}[every]

        def __init__(self, settings):
            self.every = settings.every
    """,
)
def validator(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer)


@mistake(
    "A settings file in another encoding",
    "utf16.toml can't be read: it is encoded in UTF-16. Save it as UTF-8",
    utf16_toml="""
    [tool.pa-core]
    """,
)
def encoding(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer, settings="utf16.toml")


section("Your own plugins")


@mistake("A misspelt hook", "unknown hook 'on_train_step_ends'. Did you mean 'on_train_step_end'?")
def misspelt_hook(model, loss_func, optimizer, data):
    class Watch:
        @hookimpl
        def on_train_step_ends(self, trainer): ...

    Trainer(model, loss_func, optimizer, plugins=[Watch])


@mistake("An argument that the hook doesn't offer", "takes output", "It offers trainer, batch")
def unknown_argument(model, loss_func, optimizer, data):
    class Watch(TrainerCallback):
        def on_train_step_end(self, trainer, output): ...

    Trainer(model, loss_func, optimizer, callbacks=[Watch])


@mistake("A hook that isn't marked", "has a hook's name, but isn't marked @hookimpl")
def unmarked(model, loss_func, optimizer, data):
    class Watch:
        def create_scheduler(self, trainer): ...

    Trainer(model, loss_func, optimizer, plugins=[Watch])


@mistake("An asynchronous hook", "on_train_step_end is async", "use a plain def")
def asynchronous(model, loss_func, optimizer, data):
    class Watch:
        @hookimpl
        async def on_train_step_end(self, trainer): ...

    Trainer(model, loss_func, optimizer, plugins=[Watch])


@mistake("A hook with a yield", "has a yield", "@hookimpl(wrapper=True)")
def generator(model, loss_func, optimizer, data):
    class Watch:
        @hookimpl
        def run_training(self, trainer):
            yield

    Trainer(model, loss_func, optimizer, plugins=[Watch])


@mistake("A hook that returns a coroutine", "on_train_epoch_end returned a coroutine", "'Watch'")
def coroutine(model, loss_func, optimizer, data):
    async def send(trainer): ...

    class Watch(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            return send(trainer)

    Trainer(model, loss_func, optimizer, callbacks=[Watch]).train(data, num_epochs=1)


@mistake("A wrapper without a yield", "is a wrapper, but has no yield")
def no_yield(model, loss_func, optimizer, data):
    class Watch:
        @hookimpl(wrapper=True)
        def run_training(self, trainer): ...

    Trainer(model, loss_func, optimizer, plugins=[Watch])


@mistake("A class that needs arguments", "can't be built without arguments", "Give an instance")
def needs_arguments(model, loss_func, optimizer, data):
    class Watch(TrainerCallback):
        def __init__(self, folder): ...

    Trainer(model, loss_func, optimizer, callbacks=[Watch])


@mistake("Half of a state", "its state needs both state_dict and load_state_dict")
def half_state(model, loss_func, optimizer, data):
    class Watch(TrainerCallback):
        def state_dict(self):
            return {}

    Trainer(model, loss_func, optimizer, callbacks=[Watch])


@mistake("A collective on the main process only", "runs on the main process only")
def main_only(model, loss_func, optimizer, data):
    class Watch(TrainerCallback):
        runs_on = "main"

        def on_train_epoch_end(self, trainer):
            trainer.gather(torch.zeros(1))

    Trainer(model, loss_func, optimizer, callbacks=[Watch]).train(data, num_epochs=1)


@mistake("A loss that isn't a dict", "calculate_train_batch_loss returned 3, not a dict", "'Mine'")
def provided_loss(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def calculate_train_batch_loss(self, trainer, batch):
            return 3

    Trainer(model, loss_func, optimizer, plugins=[Mine]).train(data, num_epochs=1)


@mistake("A batch size that isn't a number", "returned None as batch_size", "'Mine'")
def provided_size(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def calculate_train_batch_loss(self, trainer, batch):
            outputs = trainer.model(batch[0])
            return {"loss": outputs.mean(), "model_outputs": outputs, "batch_size": None}

    Trainer(model, loss_func, optimizer, plugins=[Mine]).train(data, num_epochs=1)


@mistake("A detached loss of a plugin", "on_backward_start left a loss without", "'Mine'")
def replaced_loss(model, loss_func, optimizer, data):
    class Mine(TrainerCallback):
        def on_backward_start(self, trainer, batch_output):
            batch_output["loss"] = batch_output["loss"].detach()

    Trainer(model, loss_func, optimizer, callbacks=[Mine]).train(data, num_epochs=1)


@mistake("An accelerator of another class", "create_accelerator returned a dict", "'Mine'")
def provided_accelerator(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def create_accelerator(self, trainer):
            return {"cpu": True}

    Trainer(model, loss_func, optimizer, plugins=[Mine])


@mistake("A dataset as a loader", "a TensorDataset, whose items are samples", "'Mine'")
def provided_loader(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def create_train_dataloader(self, trainer):
            return trainer.train_dataset

    Trainer(model, loss_func, optimizer, plugins=[Mine]).train(data, num_epochs=1)


@mistake("An evaluation loader that isn't one", "create_eval_dataloader returned 3", "'Mine'")
def provided_eval_loader(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def create_eval_dataloader(self, trainer):
            return 3

    Trainer(model, loss_func, optimizer, plugins=[Mine]).evaluate(data)


@mistake("An optimizer's class", "create_optimizer returned the class SGD", "'Mine'")
def provided_optimizer(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def create_optimizer(self, trainer):
            return torch.optim.SGD

    Trainer(model, loss_func, None, plugins=[Mine])


@mistake("A scheduler's name", "create_scheduler returned 'cosine'", "'Mine'")
def provided_scheduler(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def create_scheduler(self, trainer):
            return "cosine"

    Trainer(model, loss_func, optimizer, plugins=[Mine]).train(data, num_epochs=1)


@mistake("A wrapper with a wrong result", "create_scheduler returned 3", "'Mine'")
def wrapped_scheduler(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl(wrapper=True)
        def create_scheduler(self, trainer):
            yield
            return 3

    Trainer(model, loss_func, optimizer, plugins=[Mine]).train(data, num_epochs=1)


@mistake("An evaluation loss that isn't a tensor", "calculate_eval_batch_loss returned", "'Mine'")
def provided_eval_loss(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def calculate_eval_batch_loss(self, trainer, batch):
            return {"loss": 0.5, "model_outputs": None, "batch_size": 8}

    Trainer(model, loss_func, optimizer, plugins=[Mine]).evaluate(data)


@mistake("Predictions without samples", "calculate_predictions returned 0.5", "'Mine'")
def provided_predictions(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def calculate_predictions(self, trainer, batch):
            return 0.5

    Trainer(model, loss_func, optimizer, plugins=[Mine]).predict(data)


@mistake("An update that returns nothing", "run_update returned None", "wrapper=True", "'Mine'")
def provided_update(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def run_update(self, trainer):
            trainer.apply_update()

    Trainer(model, loss_func, optimizer, plugins=[Mine]).train(data, num_epochs=1)


@mistake("Two plugins replace the run", "'First' and 'Second' each replace run_training")
def two_runs(model, loss_func, optimizer, data):
    class First:
        @hookimpl
        def run_training(self, trainer):
            return True

    class Second(First): ...

    Trainer(model, loss_func, optimizer, plugins=[First, Second]).train(data, num_epochs=1)


@mistake("An evaluated model that isn't one", "register_eval_models returned 3 as 'ema'", "'Mine'")
def registered_eval_model(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def register_eval_models(self, trainer):
            return {"ema": 3}

    Trainer(model, loss_func, optimizer, plugins=[Mine]).evaluate(data)


@mistake("A registry that is a list", "register_models of the plugin 'Mine'", "returned a list")
def registered_list(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def register_models(self):
            return [nn.Linear]

    Trainer("Linear", loss_func, None, plugins=[Mine])


@mistake("A registered name that can't be called", "registers 'linear' as a list", "'Mine'")
def registered_instance(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def register_schedulers(self):
            return {"linear": [0.1, 0.0]}

    trainer = Trainer(model, loss_func, optimizer, plugins=[Mine])
    trainer.train(data, num_epochs=1, create_scheduler_fn="linear")


@mistake("A registered function with a wrong result", "The model 'tiny' of the plugin 'Mine'")
def registered_model(model, loss_func, optimizer, data):
    class Mine:
        @hookimpl
        def register_models(self):
            return {"tiny": dict}

    Trainer("tiny", loss_func, None, plugins=[Mine])


section("Results and files")


@mistake("A metric that wasn't recorded", "No value of the metric 'loss' was recorded")
def unknown_metric(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer).run_history.get_latest_metric("loss")


@mistake("A value recorded outside a step", "run_history.update_metric()")
def recorded_outside(model, loss_func, optimizer, data):
    Trainer(model, loss_func, optimizer).record_mean("accuracy", torch.ones(()))


@mistake("A training state that doesn't exist", "No training state at states")
def no_state(model, loss_func, optimizer, data):
    trainer = Trainer(model, loss_func, optimizer)
    trainer.train(data, num_epochs=1, resume_from="states")
