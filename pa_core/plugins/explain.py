"""The order of the calls in the loop and who implements each hook, as data and as text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.plugins.implementations import code_of

if TYPE_CHECKING:
    from pa_core.plugins.implementations import Hook, Implementation
    from pa_core.plugins.manager import PluginManager

LOOP = """
Trainer(...)
    create_optimizer
    create_accelerator
    on_init_end
train(...)
    create_train_dataloader
    create_eval_dataloader
    create_scheduler
    run_training
        training_run_start
        on_training_run_start
        for each epoch
            train_epoch_start
            on_train_epoch_start
            for each micro-batch
                on_train_step_start
                calculate_train_batch_loss
                on_backward_start
                backward_step
                on_backward_end
                if the accumulated batch is complete
                    on_optimizer_step_start
                    optimizer_step
                    scheduler_step
                    optimizer_zero_grad
                    on_optimizer_step_end
                on_train_step_end
            train_epoch_end
            on_train_epoch_end
            register_eval_models
            for each evaluation dataset and model
                eval_epoch_start
                on_eval_epoch_start
                for each batch
                    on_eval_step_start
                    calculate_eval_batch_loss
                    on_eval_step_end
                eval_epoch_end
                on_eval_epoch_end
            training_run_epoch_end
            on_training_run_epoch_end
        training_run_end
        on_training_run_end
    if the run is stopped early
        on_stop_training_error
    if any other exception is raised
        on_exception
evaluate(...)
    run_evaluation
        evaluation_run_start
        on_evaluation_run_start
        evaluation_run_end
        on_evaluation_run_end
predict(...)
    calculate_predictions
when a training state is saved or loaded
    on_save_training_state
    on_save_training_state_error
    on_load_training_state
when something is looked up by name
    register_schedulers
    register_models
    register_metrics
"""
"""The loop in the order of the calls: hooks, methods of the Trainer, and the phases around them."""


def describe_loop(
    plugins: PluginManager,
    *,
    trainer_class: type | None = None,
    settings_file: Path | None = None,
) -> dict[str, Any]:
    """Describe the loop and everything that it calls, as plain data.

    Args:
        plugins: the plugins.
        trainer_class: the trainer's class, searched for overridden methods; None for
            `pa_core.Trainer` itself.
        settings_file: the file that lists the plugins.

    Returns:
        ``settings``: the file. ``trainer``: the class and its ``overrides``. ``loop``: a list of
        steps in the order of the calls, each with ``name``, ``depth`` and ``kind``, which is
        ``"text"``, ``"method"``, ``"event"``, ``"provider"``, ``"run"``, ``"registry"``, or
        ``"hook"`` for a plugin's own. A hook has its ``implementations`` in the order of the calls,
        a provider also ``decides``, which is whose value is used, and why. A method has
        ``overridden``: the override, or None.
    """
    overrides = {one["method"]: one for one in _overrides(trainer_class)}
    hooks = plugins.hooks
    steps = []
    named = set()
    for line in LOOP.strip().splitlines():
        name = line.strip()
        depth = (len(line) - len(name)) // 4
        named.add(name)
        steps.append(_step(name, depth, plugins, hooks, overrides))
    own = [name for name in hooks if name not in named]
    if own:
        steps.append({"name": "hooks of plugins", "depth": 0, "kind": "text"})
        steps += [_step(name, 1, plugins, hooks, overrides) for name in own]
    return {
        "settings": settings_file and str(settings_file),
        "trainer": {
            "class": _qualified(trainer_class) if trainer_class else "pa_core.trainer.Trainer",
            "overrides": list(overrides.values()),
        },
        "loop": steps,
    }


def _step(
    name: str,
    depth: int,
    plugins: PluginManager,
    hooks: Mapping[str, Hook],
    overrides: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    step: dict[str, Any] = {"name": name, "depth": depth, "kind": _kind(name, name in hooks)}
    if name in hooks:
        found = plugins.implementations(name)
        step["implementations"] = [_describe(one) for one in found]
        if step["kind"] == "provider":
            step["decides"] = _decides(found, overrides.get(name) or overrides.get(f"_{name}"))
    elif step["kind"] == "method":
        step["overridden"] = overrides.get(name)
    return step


def _kind(name: str, is_hook: bool) -> str:
    if not name.isidentifier():
        return "text"
    kinds = {"on": "event", "run": "run", "register": "registry"}
    kinds |= {"create": "provider", "calculate": "provider"}
    return kinds.get(name.partition("_")[0], "hook") if is_hook else "method"


def _describe(found: Implementation) -> dict[str, Any]:
    return {
        "plugin": found.name,
        "origin": found.source.origin,
        "distribution": found.source.distribution,
        "version": found.source.version,
        "target": found.source.target,
        "file": found.file,
        "line": found.line,
        "wrapper": found.wrapper,
        "order": found.order,
        "runs_on": found.runs_on,
    }


def _decides(found: list[Implementation], override: dict[str, Any] | None) -> dict[str, Any]:
    """Whose value of a provider is used, and why."""
    if override is not None:
        why = f"{override['class']} overrides it; plugins are called where it calls super()"
        return {"who": override["class"], "why": why}
    first = next((one for one in found if not one.wrapper), None)
    if first is None:
        return {"who": None, "why": "no plugin implements it, so the Trainer uses its argument"}
    if first.name == "pa_core":
        return {"who": "pa_core", "why": "the core's default, as no plugin implements it"}
    return {
        "who": first.name,
        "why": f"plugin {first.name} is called first; if it returns None, the next one",
    }


def _overrides(trainer_class: type | None) -> Iterator[dict[str, Any]]:
    """The Trainer's methods that a subclass overrides, and where."""
    lineage = inspect.getmro(trainer_class) if trainer_class is not None else ()
    seen = set()
    core = next((kind for kind in lineage if kind.__module__ == "pa_core.trainer"), None)
    for kind in lineage[: lineage.index(core)] if core is not None else ():
        for name, value in vars(kind).items():
            if name in seen or name.startswith("__") or not hasattr(core, name):
                continue
            seen.add(name)
            code = code_of(value) if callable(value) else None
            yield {
                "method": name,
                "class": _qualified(kind),
                "file": code and code.co_filename,
                "line": code and code.co_firstlineno,
            }


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# -- As text --------------------------------------------------------------------------------------


def loop_as_text(data: dict[str, Any]) -> str:
    """The result of `describe_loop` as text."""
    lines = [settings_line(data), f"Trainer: {data['trainer']['class']}"]
    lines += [
        f"    overrides {one['method']} in {one['class']} ({_place(one)})"
        for one in data["trainer"]["overrides"]
    ]
    for step in data["loop"]:
        if step["depth"] == 0:
            lines.append("")
        lines += step_lines(step, step["depth"])
    return "\n".join(lines)


def settings_line(data: dict[str, Any]) -> str:
    """The line that names the file with the plugins."""
    return f"Settings: {data['settings'] or 'none; the built-in defaults are enabled'}"


def step_lines(step: dict[str, Any], depth: int = 0) -> list[str]:
    """A step of the loop, with its implementations below it in the order of the calls."""
    pad = "    " * depth
    title = f"{pad}{step['name']}"
    if "decides" in step:
        title += f"  [{step['decides']['why']}]"
    elif step.get("overridden"):
        title += f"  [{step['overridden']['class']} overrides it]"
    rows = [_cells(one) for one in step.get("implementations", ())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title]
    for number, row in enumerate(rows, 1):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"{pad}  {number:>2}. {'  '.join(cells)}".rstrip())
    return lines


def _cells(one: dict[str, Any]) -> tuple[str, str, str, str]:
    source = f"{one['distribution']} {one['version'] or ''}" if one["distribution"] else ""
    marks = [
        "wraps the others" if one["wrapper"] else "",
        one["order"] or "",
        "main process only" if one["runs_on"] == "main" else "",
    ]
    shown = ", ".join(filter(None, marks))
    return one["plugin"], source.strip() or one["target"], _place(one), shown and f"({shown})"


def _place(one: dict[str, Any]) -> str:
    """File and line, relative to the working directory if the file is below it."""
    if one["file"] is None:
        return "unknown"
    path = Path(one["file"])
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{path}:{one['line']}"
