"""The plugin manager: order, arguments, notes on exceptions, and plugins that pluggy can't take."""

from __future__ import annotations

import asyncio
import functools
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pa_core import hookimpl, hookspec
from pa_core.callbacks import TrainerCallback
from pa_core.errors import (
    PluginConflictError,
    PluginLoadError,
    PluginNotFoundError,
    PluginValidationError,
    StopTrainingError,
    TrainingStateError,
)
from pa_core.plugins.discovery import PluginSource, load_plugin
from pa_core.plugins.manager import PluginManager
from tests.fake_plugins import site_in

STEP = {"trainer": "the trainer", "batch": "the batch", "batch_output": {"loss": 1}, "step": 3}


def manager_of(*plugins, defaults=None) -> PluginManager:
    manager = PluginManager(defaults)
    for plugin in plugins:
        manager.register(plugin)
    return manager


def bound(manager, hook) -> Any:
    return manager.bind(hook)


def calls_of(manager, hook, **arguments):
    """What a hook returns, bound and through the relay."""
    return bound(manager, hook)(**arguments), getattr(manager.hook, hook)(**arguments)


def says(name, log, hook="on_init_end", **options):
    """A plugin that logs its name when it is called."""

    class Plugin:
        pass

    plugin = Plugin()
    setattr(plugin, hook, hookimpl(**options)(lambda: log.append(name)))
    return plugin


# -- Order ----------------------------------------------------------------------------------------


def test_plugins_are_called_in_the_order_in_which_they_were_registered():
    log = []
    manager = manager_of(*(says(name, log) for name in "abc"))
    calls_of(manager, "on_init_end", trainer=None)
    assert log == [*"abc"] * 2


def test_tryfirst_and_trylast_are_honoured_and_equals_keep_their_order():
    log = []
    defaults = says("core", log, tryfirst=True)
    manager = manager_of(
        says("last 1", log, trylast=True),
        says("normal 1", log),
        says("first 1", log, tryfirst=True),
        says("last 2", log, trylast=True),
        says("normal 2", log),
        says("first 2", log, tryfirst=True),
        defaults=defaults,
    )
    calls_of(manager, "on_init_end", trainer=None)
    expected = ["first 1", "first 2", "normal 1", "normal 2", "last 1", "last 2", "core"]
    assert log == expected * 2
    assert len(manager.implementations("on_init_end")) == 7


def surrounds(name, log, **options):
    class Plugin:
        @hookimpl(wrapper=True, **options)
        def run_training(self, trainer):
            log.append(f"{name} opens")
            try:
                return (yield)
            finally:
                log.append(f"{name} closes")

    return Plugin()


def test_the_first_wrapper_is_the_outermost():
    log = []
    manager = manager_of(
        surrounds("a", log),
        says("run", log, "run_training"),
        surrounds("b", log),
        surrounds("c", log, tryfirst=True),
    )
    bound(manager, "run_training")(trainer=None)
    assert log == [
        *("c opens", "a opens", "b opens", "run"),
        *("b closes", "a closes", "c closes"),
    ]
    names = [found.wrapper for found in manager.implementations("run_training")]
    assert names == [True, True, True, False]


def test_the_first_result_that_is_not_none_ends_a_provider():
    log = []

    class Gives:
        def __init__(self, value):
            self.value = value

        @hookimpl
        def create_scheduler(self):
            log.append(self.value)
            return self.value

    manager = manager_of(Gives(None), Gives(0), Gives(2))
    assert calls_of(manager, "create_scheduler", trainer=None) == (0, 0)
    assert log == [None, 0] * 2
    assert calls_of(manager_of(Gives(None)), "create_scheduler", trainer=None) == (None, None)


def test_the_hosts_own_implementation_is_called_last_and_is_not_a_plugin():
    class Core:
        @hookimpl(trylast=True)
        def create_scheduler(self, trainer):
            return "the core's"

    class Plugin:
        @hookimpl(trylast=True)
        def create_scheduler(self, trainer):
            return trainer

    manager = manager_of(Plugin(), defaults=Core())
    assert calls_of(manager, "create_scheduler", trainer=None) == ("the core's", "the core's")
    assert calls_of(manager, "create_scheduler", trainer=1) == (1, 1)
    assert list(manager.by_name) == ["Plugin"]


# -- Binding --------------------------------------------------------------------------------------


def test_a_hook_without_implementations_is_bound_to_none():
    assert manager_of(says("a", [])).bind("on_exception") is None


def test_an_unknown_hook_cannot_be_bound():
    with pytest.raises(AttributeError, match="'on_trian_step_end'. Did you mean 'on_train_step_en"):
        PluginManager().bind("on_trian_step_end")


def test_the_relay_calls_any_hook_by_name_and_checks_its_arguments():
    hook = manager_of(says("a", [])).hook
    assert hook.on_exception(trainer=None, exception=None) == []
    assert hook.create_scheduler(trainer=None) is None
    for name in ("on_train_step_end", "create_train_dataloader"):
        with pytest.raises(TypeError, match=f"The hook {name} needs batch"):
            getattr(hook, name)(trainer=None)
    with pytest.raises(AttributeError, match="'on_int_end'. Did you mean 'on_init_end'"):
        _ = hook.on_int_end


def test_the_version_grows_when_plugins_or_hooks_are_added_or_removed():
    class Specs:
        @staticmethod
        @hookspec
        def on_lunch(trainer):
            """Lunch."""

    manager = PluginManager()
    versions = [manager.version]
    for change in (
        lambda: manager.register(says("a", []), "a"),
        lambda: manager.add_hookspecs(Specs),
        lambda: manager.unregister("a"),
    ):
        change()
        versions.append(manager.version)
    assert versions == sorted(set(versions))


def test_callers_follow_a_change_of_the_plugins():
    log = []
    manager = manager_of(says("a", log))
    manager.register(says("b", log), "b")
    calls_of(manager, "on_init_end", trainer=None)
    manager.unregister("Plugin")
    calls_of(manager, "on_init_end", trainer=None)
    assert log == ["a", "b", "a", "b", "b", "b"]


# -- What plugins may be --------------------------------------------------------------------------


class Counts(TrainerCallback):
    def __init__(self):
        self.count = 0

    def on_init_end(self, trainer):
        self.count += 1


def test_an_instance_a_class_and_a_module_are_plugins():
    module = ModuleType("some.plugin_module")
    module.seen = []
    module.on_init_end = hookimpl(lambda trainer: module.seen.append(trainer))  # noqa: PLW0108
    instance = Counts()
    manager = manager_of(instance, Counts, module)
    bound(manager, "on_init_end")(trainer=1)
    assert list(manager.by_name) == ["Counts", "Counts:2", "plugin_module"]
    assert manager.by_name["Counts"] is instance
    assert [manager.by_name[name].count for name in ("Counts", "Counts:2")] == [1, 1]
    assert module.seen == [1]


def test_a_file_with_functions_is_a_plugin_and_so_is_a_file_with_one_class(tmp_path, monkeypatch):
    with site_in(tmp_path, monkeypatch) as site:
        functions = site.module(
            "functions",
            """
            from pa_core import hookimpl
            seen = []
            @hookimpl
            def on_init_end(trainer):
                seen.append(trainer)
            """,
        )
        one_class = site.module(
            "one_class",
            """
            from pa_core import TrainerCallback
            class Watch(TrainerCallback):
                seen = []
                def on_init_end(self, trainer):
                    self.seen.append(trainer)
            """,
        )
        manager = PluginManager()
        for file in (functions, one_class):
            source = PluginSource(file.stem, str(file), "file")
            manager.register(load_plugin(source), file.stem, source)
        calls_of(manager, "on_init_end", trainer=5)
        assert [plugin.seen for plugin in manager.by_name.values()] == [[5, 5], [5, 5]]


def test_static_and_class_methods_may_be_marked_on_either_side_of_their_decorator():
    log = []

    class Plugin:
        @staticmethod
        @hookimpl
        def on_init_end(trainer):
            log.append("static, marked inside")

        @hookimpl
        @staticmethod
        def on_train_epoch_start(trainer):
            log.append("static, marked outside")

        @classmethod
        @hookimpl
        def on_train_epoch_end(cls, trainer):
            log.append(cls.__name__)

    manager = manager_of(Plugin())
    for hook in ("on_init_end", "on_train_epoch_start", "on_train_epoch_end"):
        calls_of(manager, hook, trainer=None)
    assert log[::2] == log[1::2] == ["static, marked inside", "static, marked outside", "Plugin"]


def test_a_callback_may_have_marked_functions_and_functions_of_its_instance():
    class Plugin(TrainerCallback):
        @hookimpl
        def create_scheduler(self, trainer):
            return "mine"

        @hookimpl(specname="on_train_epoch_end")
        def record(self, trainer):
            return "recorded"

    plugin = Plugin()
    vars(plugin)["on_init_end"] = lambda trainer: "of the instance"
    manager = manager_of(plugin)
    assert calls_of(manager, "create_scheduler", trainer=None) == ("mine", "mine")
    assert calls_of(manager, "on_train_epoch_end", trainer=None) == (["recorded"], ["recorded"])
    assert bound(manager, "on_init_end")(trainer=None) == ["of the instance"]


def test_only_overridden_methods_are_implementations():
    class Base(TrainerCallback):
        def on_init_end(self, trainer):
            return "base"

    class Derived(Base):
        pass

    manager = manager_of(Derived())
    assert bound(manager, "on_init_end")(trainer=None) == ["base"]
    assert [name for name in manager.hooks if manager.bind(name)] == ["on_init_end"]


def test_methods_of_the_base_class_of_callbacks_are_not_implementations():
    class Base:
        _is_trainer_callback = True

        def on_init_end(self, trainer): ...

    class Mine(Base):
        def on_exception(self, trainer, exception): ...

    manager = manager_of(Mine())
    assert [name for name in manager.hooks if manager.bind(name)] == ["on_exception"]


@pytest.mark.parametrize("wrong", [len, "metrics"])
def test_a_function_or_a_name_is_not_a_plugin(wrong):
    with pytest.raises(
        PluginValidationError, match="is not a plugin; a plugin is a class, an inst"
    ):
        PluginManager().register(wrong)


def test_a_class_that_cannot_be_built_is_reported_with_its_reason():
    class Needs:
        def __init__(self, more): ...

    with pytest.raises(PluginLoadError, match=r"Needs can't be built.*'more'. Give an instance"):
        PluginManager().register(Needs)


# -- Arguments ------------------------------------------------------------------------------------


def returns_arguments():
    """Functions that take a step's arguments in different ways, each with what it then gets."""
    t, b, o, s = STEP.values()
    rest = {"batch": b, "batch_output": o, "step": s}

    def nothing():
        return ()

    def a_subset_in_another_order(step, trainer):
        return step, trainer

    def all_of_them(trainer, batch, batch_output, step):
        return trainer, batch, batch_output, step

    def everything(**kwargs):
        return kwargs

    def the_trainer_and_the_rest(trainer, **kwargs):
        return trainer, kwargs

    def some_and_the_rest(trainer, step, **kwargs):
        return trainer, step, kwargs

    def an_odd_first_name(t, batch):
        return t, batch

    def an_odd_first_name_and_the_rest(t, **kwargs):
        return t, kwargs

    def defaults(trainer, batch=None, step=-1):
        return trainer, batch, step

    def by_keyword_only(trainer, *, step, batch=None):
        return trainer, step, batch

    def by_position_only(trainer, step, /, batch):
        return trainer, step, batch

    def packed(*args, **kwargs):
        return args, kwargs

    return [
        (nothing, ()),
        (a_subset_in_another_order, (s, t)),
        (all_of_them, (t, b, o, s)),
        (everything, STEP),
        (the_trainer_and_the_rest, (t, rest)),
        (some_and_the_rest, (t, s, {"batch": b, "batch_output": o})),
        (an_odd_first_name, (t, b)),
        (an_odd_first_name_and_the_rest, (t, rest)),
        (defaults, (t, b, s)),
        (by_keyword_only, (t, s, b)),
        (by_position_only, (t, s, b)),
        (packed, ((t,), rest)),
    ]


@pytest.mark.parametrize(
    ("function", "expected"), returns_arguments(), ids=lambda value: getattr(value, "__name__", "")
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_implementation_gets_the_arguments_that_it_takes(function, expected, wrapped):
    @functools.wraps(function)
    def passing_on(*args, **kwargs):
        return function(*args, **kwargs)

    class Callback(TrainerCallback):
        on_train_step_end = staticmethod(passing_on if wrapped else function)

    class Marked:
        on_train_step_end = staticmethod(hookimpl(passing_on if wrapped else function))

    for plugin in (Callback(), Marked()):
        assert calls_of(manager_of(plugin), "on_train_step_end", **STEP) == ([expected], [expected])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda trainer, bach: 0, "takes bach.* Did you mean 'batch'. It offers trainer, batch, b"),
        (lambda bacth: 0, "takes bacth.* Did you mean 'batch'"),
        (lambda trainer, loss=None: 0, "takes loss, which the hook doesn't offer"),
        (lambda trainer, *, loss: 0, "takes loss, which the hook doesn't offer"),
    ],
)
def test_an_unknown_argument_is_reported_with_the_nearest(function, message):
    class Plugin(TrainerCallback):
        on_train_step_end = staticmethod(function)

    with pytest.raises(PluginValidationError, match=f"'Plugin'.*on_train_step_end {message}"):
        PluginManager().register(Plugin)


def test_a_registry_has_no_trainer():
    class Plugin:
        @hookimpl
        def register_models(self, anything):
            return {}

    with pytest.raises(PluginValidationError, match="takes anything.*It offers no arguments"):
        PluginManager().register(Plugin)


# -- Mistakes -------------------------------------------------------------------------------------


def test_an_unknown_event_is_reported_with_plugin_and_nearest_hook():
    class Mistyped(TrainerCallback):
        def on_trian_step_end(self, trainer): ...

    with pytest.raises(PluginValidationError, match=r"'Mistyped'.*'on_trian_step_end'. Did you me"):
        PluginManager().register(Mistyped)


def test_a_marked_function_without_a_hook_is_reported():
    class Mistyped:
        @hookimpl
        def crate_scheduler(self, trainer): ...

    with pytest.raises(PluginValidationError, match="Did you mean 'create_scheduler'?"):
        PluginManager().register(Mistyped)


def test_all_mistakes_of_a_plugin_are_reported_at_once():
    class Mistyped(TrainerCallback):
        def on_trian_step_end(self, trainer): ...

        def on_init_end(self, trainer, what): ...

    with pytest.raises(PluginValidationError, match=r"on_init_end takes what.*on_trian_step_end"):
        PluginManager().register(Mistyped)


def test_a_forgotten_mark_is_reported():
    class Forgotten:
        def on_init_end(self, trainer): ...

    class Empty:
        pass

    class OnCallback(TrainerCallback):
        def create_scheduler(self, trainer): ...

    with pytest.raises(PluginValidationError, match="on_init_end has a hook's name, but isn't mar"):
        PluginManager().register(Forgotten)
    with pytest.raises(PluginValidationError, match="create_scheduler has a hook's name"):
        PluginManager().register(OnCallback)
    with pytest.raises(PluginValidationError, match="no function marked with @hookimpl"):
        PluginManager().register(Empty)


def test_methods_that_do_not_begin_with_on_are_not_checked():
    class Helpful(TrainerCallback):
        ongoing = True

        def train_step_end(self, anything): ...

    assert manager_of(Helpful()).bind("on_train_step_end") is None


def test_an_old_hookwrapper_and_a_wrapper_without_yield_are_refused():
    class Old:
        @hookimpl(hookwrapper=True)
        def run_training(self, trainer):
            yield

    class Plain:
        @hookimpl(wrapper=True)
        def run_training(self, trainer):
            return None

    class OfRegistry:
        @hookimpl(wrapper=True)
        def register_models(self):
            return (yield)

    with pytest.raises(PluginValidationError, match="old-style hookwrapper"):
        PluginManager().register(Old)
    with pytest.raises(PluginValidationError, match="has no yield"):
        PluginManager().register(Plain)
    with pytest.raises(PluginValidationError, match="a registry can't be wrapped"):
        PluginManager().register(OfRegistry)


async def _coroutine(trainer): ...


async def _async_generator(trainer):
    yield


def _generator(trainer):
    yield


@functools.wraps(_generator)
def _decorated_generator(*args):
    return _generator(*args)


class _Called:
    async def __call__(self, trainer): ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_Called(), "on_init_end is async"),
        (_coroutine, "on_init_end is async; .* use a plain def"),
        (_async_generator, "on_init_end is async"),
        (functools.partial(_coroutine), "on_init_end is async"),
        (_generator, r"on_init_end has a yield.* Mark a wrapper @hookimpl\(wrapper=True\)"),
        (_decorated_generator, "on_init_end has a yield"),
    ],
)
def test_a_coroutine_or_a_generator_is_refused(function, message):
    class Callback(TrainerCallback):
        on_init_end = staticmethod(function)

    class Marked:
        on_init_end = staticmethod(hookimpl(function))

    for plugin in (Callback, Marked):
        with pytest.raises(PluginValidationError, match=f"'{plugin.__name__}'.*{message}"):
            PluginManager().register(plugin)


@pytest.mark.parametrize("unfinished", [_coroutine, _async_generator, _generator])
def test_an_event_that_returns_what_has_not_run_is_an_error(unfinished):
    def event(trainer):
        return unfinished(trainer)

    manager = manager_of(type("Returns", (), {"on_init_end": staticmethod(hookimpl(event))}))
    message = "on_init_end returned a .*, of which nothing has run"
    with pytest.raises(TypeError, match=message) as caught:
        manager.hook.on_init_end(trainer=None)
    assert "in hook on_init_end of plugin 'Returns'" in caught.value.__notes__[0]


def test_a_provider_may_return_a_generator_but_no_coroutine():
    def create(trainer):
        return _generator(trainer)

    def create_later(trainer):
        return _coroutine(trainer)

    names = ["create_train_dataloader", "create_eval_dataloader"]
    functions = (create, create_later)
    methods = {n: staticmethod(hookimpl(f)) for n, f in zip(names, functions, strict=True)}
    hook = manager_of(type("Creates", (), methods)).hook
    arguments = {"trainer": None, "batch_size": 1}
    assert list(hook.create_train_dataloader(**arguments, train_dl_kwargs=None)) == [None]
    with pytest.raises(TypeError, match="create_eval_dataloader returned a coroutine"):
        hook.create_eval_dataloader(**arguments, eval_dl_kwargs=None)


def test_a_decorator_that_runs_a_coroutine_makes_it_a_plain_function():
    @functools.wraps(_coroutine)
    def runs(trainer):
        asyncio.run(_coroutine(trainer))
        return "ran"

    manager = manager_of(type("Runs", (), {"on_init_end": staticmethod(hookimpl(runs))}))
    assert calls_of(manager, "on_init_end", trainer=None) == (["ran"], ["ran"])


def test_an_async_wrapper_is_refused():
    class Plugin:
        @hookimpl(wrapper=True)
        async def run_training(self, trainer):
            yield

    with pytest.raises(PluginValidationError, match="run_training is async"):
        PluginManager().register(Plugin)


def test_implementing_a_deprecated_hook_warns_with_the_place_of_the_implementation():
    class Specs:
        @hookspec(warn_on_impl=DeprecationWarning("on_lunch is now on_dinner"))
        def on_lunch(self, trainer): ...

    class Plugin:
        @hookimpl
        def on_lunch(self, trainer): ...

    manager = PluginManager()
    manager.add_hookspecs(Specs())
    with pytest.warns(DeprecationWarning, match="on_lunch is now on_dinner") as caught:
        manager.register(Plugin)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.hook.on_lunch(trainer=None)


def test_nothing_is_half_registered_after_an_error():
    class Half(TrainerCallback):
        def on_init_end(self, trainer):
            pytest.fail("called, though its registration failed")

        def on_trian_step_end(self, trainer): ...

    log = []
    manager = manager_of(says("a", log))
    version = manager.version
    with pytest.raises(PluginValidationError):
        manager.register(Half(), "half")
    assert list(manager.by_name) == list(manager.sources) == ["Plugin"]
    assert manager.version == version
    calls_of(manager, "on_init_end", trainer=None)
    assert manager.register(Counts(), "half") == "half"


def test_a_name_and_a_plugin_are_registered_once():
    plugin = Counts()
    manager = PluginManager()
    manager.register(plugin, "counts")
    with pytest.raises(PluginConflictError, match="'counts' is taken.*such as 'counts:2'"):
        manager.register(Counts(), "counts")
    with pytest.raises(PluginConflictError, match="registered already, as 'counts'"):
        manager.register(plugin, "again")
    with pytest.raises(PluginNotFoundError, match="'conts'. Did you mean 'counts'"):
        manager.unregister("conts")
    assert manager.unregister("counts") is plugin
    assert manager.register(plugin, "again") == "again"


# -- Plugins that look odd ------------------------------------------------------------------------


def test_a_property_is_not_evaluated_by_registration_or_by_an_event_of_its_name():
    class Lazy(TrainerCallback):
        @property
        def on_init_end(self):
            pytest.fail("evaluated")

        @functools.cached_property
        def on_gpu(self):
            pytest.fail("evaluated")

        @property
        def data(self):
            pytest.fail("evaluated")

    manager = manager_of(Lazy())
    assert manager.bind("on_init_end") is None
    manager.call_event("data", None)
    manager.call_event("on_gpu", None)


def test_plugins_that_are_equal_unhashable_or_falsy_work_like_any_other():
    log = []

    @dataclass
    class Equal:  # a dataclass is unhashable, and equal to every other with its values
        name: str = "x"

        @hookimpl
        def on_init_end(self):
            log.append(self.name)

        def __bool__(self):
            return False

    first, second = Equal(), Equal()
    manager = manager_of(first, second)
    calls_of(manager, "on_init_end", trainer=None)
    assert log == ["x"] * 4
    assert manager.unregister("Equal:2") is second
    second.name = "gone"
    calls_of(manager, "on_init_end", trainer=None)
    assert log == ["x"] * 6
    assert list(manager.by_name.values()) == [first]


def test_an_object_that_makes_up_attributes_claims_no_hooks():
    class MakesUp:
        def __getattr__(self, name):
            return {"wrapper": True}

        def __call__(self): ...

    module = ModuleType("with_an_odd_value")
    module.odd = MakesUp()
    module.on_init_end = hookimpl(lambda: 1)
    assert calls_of(manager_of(module), "on_init_end", trainer=None) == ([1], [1])


# -- Blame ----------------------------------------------------------------------------------------


class Fails(TrainerCallback):
    def on_init_end(self, trainer):
        raise ZeroDivisionError("of the plugin")


def test_an_exception_keeps_type_and_traceback_and_gets_one_note():
    manager = PluginManager()
    source = PluginSource("fails", "pa_fails:Fails", "installed", "pa-fails", "1.2.3")
    manager.register(Fails(), "fails:here", source)
    for call in (bound(manager, "on_init_end"), manager.hook.on_init_end):
        with pytest.raises(ZeroDivisionError) as caught:
            call(trainer=None)
        note = "in hook on_init_end of plugin 'fails:here' (pa-fails 1.2.3)"
        assert caught.value.__notes__ == [note]
        last = traceback.extract_tb(caught.value.__traceback__)[-1]
        assert last.line == 'raise ZeroDivisionError("of the plugin")'


def test_an_exception_through_nested_hooks_blames_the_plugin_that_raised_it_alone():
    class Outer(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            bound(trainer, "on_init_end")(trainer=trainer)

    class Around:
        @hookimpl(wrapper=True)
        def on_train_epoch_end(self, trainer):
            return (yield)

    for plugins in ((Outer, Fails), (Around, Outer, Fails)):
        manager = manager_of(*plugins)
        with pytest.raises(ZeroDivisionError) as caught:
            bound(manager, "on_train_epoch_end")(trainer=manager)
        assert len(caught.value.__notes__) == 1
        assert "in hook on_init_end of plugin 'Fails'" in caught.value.__notes__[0]


def test_a_wrapper_is_blamed_for_its_own_exceptions_and_for_no_other():
    class Core:
        @hookimpl(trylast=True)
        def run_training(self, trainer):
            if trainer == "core fails":
                raise ZeroDivisionError

    class Around:
        @hookimpl(wrapper=True)
        def run_training(self, trainer):
            if trainer == "opening fails":
                raise KeyError("opening")
            try:
                return (yield)
            finally:
                if trainer == "closing fails":
                    raise KeyError("closing")

    run = bound(manager_of(Around, defaults=Core()), "run_training")
    with pytest.raises(ZeroDivisionError) as caught:
        run(trainer="core fails")
    assert not hasattr(caught.value, "__notes__")
    for place in ("opening fails", "closing fails"):
        with pytest.raises(KeyError) as own:
            run(trainer=place)
        assert len(own.value.__notes__) == 1
        assert "in hook run_training of plugin 'Around'" in own.value.__notes__[0]


def test_a_wrapper_that_forgets_to_return_leaves_the_result_as_it_is():
    class Forgets:
        @hookimpl(wrapper=True)
        def create_scheduler(self, trainer):
            yield

    class Replaces:
        @hookimpl(wrapper=True)
        def create_scheduler(self, trainer):
            return f"{(yield)}, replaced"

    class Gives:
        @hookimpl
        def create_scheduler(self, trainer):
            return "given"

    assert bound(manager_of(Gives, Forgets), "create_scheduler")(trainer=None) == "given"
    result = bound(manager_of(Gives, Forgets, Replaces), "create_scheduler")(trainer=None)
    assert result == "given, replaced"


def test_a_wrapper_that_yields_twice_or_not_is_blamed():
    class Twice:
        @hookimpl(wrapper=True)
        def run_training(self, trainer):
            yield
            yield

    class Never:
        @hookimpl(wrapper=True)
        def run_training(self, trainer):
            if trainer:
                yield

    for wrapper in (Twice, Never):
        with pytest.raises(RuntimeError, match="must yield exactly once") as caught:
            bound(manager_of(wrapper), "run_training")(trainer=None)
        assert f"of plugin '{wrapper.__name__}'" in caught.value.__notes__[0]


@pytest.mark.parametrize("error", [StopTrainingError, KeyboardInterrupt])
def test_stopping_adds_no_note(error):
    class Stops(TrainerCallback):
        def on_init_end(self, trainer):
            raise error

    with pytest.raises(error) as caught:
        bound(manager_of(Stops), "on_init_end")(trainer=None)
    assert not hasattr(caught.value, "__notes__")


# -- Other events ---------------------------------------------------------------------------------


def test_call_event_gives_each_implementation_the_arguments_that_it_takes():
    seen = []

    class Plugin(TrainerCallback):
        def on_train_step_end(self, trainer, step):
            seen.append((trainer, step))

    manager = manager_of(Plugin)
    arguments = dict(STEP)
    trainer = arguments.pop("trainer")
    manager.call_event("on_train_step_end", trainer, **arguments)
    assert seen == [(trainer, 3)]
    with pytest.raises(TypeError, match="on_train_step_end needs batch_output, step"):
        manager.call_event("on_train_step_end", trainer, batch=1)


def test_an_event_by_any_name_reaches_every_plugin_with_such_a_method_in_order():
    log = []

    class First(TrainerCallback):
        @hookimpl(optionalhook=True)
        def on_lunch(self, trainer, dish):
            log.append((self, trainer, dish))

    class Second(TrainerCallback):
        def lunch(self, trainer, **kwargs):
            log.append((self, trainer, kwargs))

    class Third(TrainerCallback):
        lunch = None  # no method

    first, second = First(), Second()
    manager = manager_of(first, second, Third)
    manager.call_event("on_lunch", 1, dish="soup")
    manager.call_event("lunch", 1, dish="pie")
    manager.call_event("dinner", 1)
    assert log == [(first, 1, "soup"), (second, 1, {"dish": "pie"})]


def test_an_exception_in_an_event_by_any_name_is_blamed_too():
    class Cook(TrainerCallback):
        def lunch(self, trainer):
            raise ValueError("burnt")

    with pytest.raises(ValueError, match="burnt") as caught:
        manager_of(Cook).call_event("lunch", None)
    assert "in hook lunch of plugin 'Cook'" in caught.value.__notes__[0]


class LunchPlugin:
    """Specifies its own hook."""

    @hookspec(firstresult=True)
    def choose_dish(self, trainer, menu):
        """Choose a dish of the menu."""

    @hookimpl
    def on_init_end(self, trainer):
        return bound(trainer, "choose_dish")(trainer=trainer, menu=["soup", "pie"])


class Guest:
    @hookimpl(optionalhook=True)
    def choose_dish(self, menu):
        return menu[-1]


@pytest.mark.parametrize("plugins", [(LunchPlugin, Guest), (Guest, LunchPlugin)])
def test_a_plugin_may_specify_hooks_that_others_implement_in_either_order(plugins):
    manager = manager_of(*plugins)
    assert bound(manager, "on_init_end")(trainer=manager) == ["pie"]
    assert manager.hook.choose_dish(trainer=None, menu=[1, 2]) == 2
    lunch = manager.unregister("LunchPlugin")
    manager.register(lunch)
    assert bound(manager, "on_init_end")(trainer=manager) == ["pie"]
    manager.register(LunchPlugin)  # another one, under another name
    assert bound(manager, "on_init_end")(trainer=manager) == ["pie", "pie"]


def test_an_implementation_that_does_not_match_a_later_hookspec_is_an_error_that_changes_nothing():
    class Odd:
        @hookimpl(optionalhook=True)
        def choose_dish(self, trainer, wine):
            return wine

    manager = manager_of(Odd)
    with pytest.raises(PluginValidationError, match=r"'Odd'.*choose_dish takes wine.* menu"):
        manager.register(LunchPlugin)
    assert "choose_dish" not in manager.hooks
    assert list(manager.by_name) == ["Odd"]


def test_hookspecs_are_added_once_and_have_plain_arguments():
    class Again:
        @hookspec
        def on_init_end(self, trainer): ...

    class WithDefault:
        @hookspec
        def on_lunch(self, trainer, dish="soup"): ...

    class Historic:
        @hookspec(historic=True)
        def on_lunch(self, trainer): ...

    with pytest.raises(PluginConflictError, match="'on_init_end' .* is specified already"):
        PluginManager().add_hookspecs(Again())
    with pytest.raises(PluginValidationError, match="'on_lunch'.*dish must be plain"):
        PluginManager().add_hookspecs(WithDefault())
    with pytest.raises(PluginValidationError, match="historic"):
        PluginManager().add_hookspecs(Historic())
    with pytest.raises(PluginValidationError, match="no function marked with @hookspec"):
        PluginManager().add_hookspecs(object())


@pytest.mark.parametrize("form", ["a class", "an object", "a module"])
def test_hookspecs_may_be_in_a_class_an_object_or_a_module(form):
    module = ModuleType("specs")
    module.choose_dish = hookspec(firstresult=True)(lambda trainer, menu: None)

    class Specs:
        @hookspec(firstresult=True)
        def choose_dish(self, trainer, menu): ...

    manager = PluginManager()
    manager.add_hookspecs({"a class": Specs, "an object": Specs(), "a module": module}[form])
    manager.register(Guest)
    assert manager.hooks["choose_dish"].arguments == ("trainer", "menu")
    assert calls_of(manager, "choose_dish", trainer=None, menu=[1, 2]) == (2, 2)


def test_without_events_plugins_only_provide_and_later_ones_do_everything():
    log = []
    provides = says("provides", log, "create_train_dataloader")
    quiet = [
        says(hook, log, hook)
        for hook in ("on_init_end", "run_evaluation", "create_scheduler", "register_models")
    ]
    manager = manager_of(provides, *quiet, surrounds("a", log), defaults=says("core", log))
    trial = manager.without_events()
    later = [says("later", log, hook) for hook in ("on_init_end", "create_scheduler")]
    for plugin in later:
        trial.register(plugin)
    calls_of(trial, "on_init_end", trainer=None)
    calls_of(trial, "create_scheduler", trainer=None)
    assert log == ["later", "core", "later", "core", "later", "later"]
    log.clear()
    trial.hook.create_train_dataloader(trainer=None, batch_size=1, train_dl_kwargs=None)
    trial.registry("register_models")
    assert trial.bind("run_training") is trial.bind("run_evaluation") is None
    assert log == ["provides", "register_models"]
    log.clear()
    calls_of(manager, "on_init_end", trainer=None)  # which is as before
    assert log == ["on_init_end", "core"] * 2
    assert len(manager.by_name) == 6


# -- Registries -----------------------------------------------------------------------------------


class Registers:
    def __init__(self, names):
        self.names = names

    @hookimpl
    def register_models(self):
        return self.names


def test_a_registry_finds_by_name_and_merges():
    manager = manager_of(Registers({"a": int}), Registers(None), Registers({"b": str}))
    assert manager.find("register_models", "b") is str
    assert manager.owner("register_models", "b").startswith("the plugin 'Registers:3' (")
    assert dict(manager.registry("register_models")) == {"a": int, "b": str}


def test_a_registered_value_that_cannot_be_called_is_an_error_that_names_the_plugin():
    message = "register_models of the plugin 'Registers' .* registers 'a' as 1; it must be a func"
    with pytest.raises(PluginValidationError, match=message):
        manager_of(Registers({"a": 1})).find("register_models", "a")


def test_a_registry_looks_a_value_up_only_on_access():
    class Costly(dict):
        def __getitem__(self, key):
            assert key == "cheap", "looked up"
            return super().__getitem__(key)

    manager = manager_of(Registers(Costly(cheap=int, costly=str)))
    assert manager.find("register_models", "cheap") is int
    registry = manager.registry("register_models")
    assert sorted(registry) == ["cheap", "costly"]
    assert registry["cheap"] is int


def test_an_unknown_name_is_reported_with_the_nearest():
    manager = manager_of(Registers({"resnet18": 1, "resnet50": 2}))
    message = "No 'resnet81' among the models. Did you mean 'resnet18'.*register resnet18, resnet50"
    with pytest.raises(PluginNotFoundError, match=message):
        manager.find("register_models", "resnet81")
    with pytest.raises(PluginNotFoundError, match="no enabled plugin registers any"):
        PluginManager().find("register_models", "resnet18")


def test_a_name_registered_twice_is_a_conflict_that_names_both_plugins_on_access():
    manager = manager_of(Registers({"a": int, "c": int}), Registers({"a": str, "b": str}))
    assert manager.find("register_models", "b") is str
    with pytest.raises(PluginConflictError, match=r"'a'.*'Registers' .* 'Registers:2'"):
        manager.find("register_models", "a")
    with pytest.raises(PluginConflictError, match=r"'a'.*'Registers' .* 'Registers:2'"):
        manager.registry("register_models")


def test_a_registry_takes_mappings_only():
    with pytest.raises(PluginValidationError, match="'Registers'.*returned a list"):
        manager_of(Registers(["a"])).find("register_models", "a")


# -- State and descriptions -----------------------------------------------------------------------


class Stateful(TrainerCallback):
    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_state_is_saved_and_restored_by_name_whatever_the_order():
    manager = PluginManager()
    manager.register(Stateful(1), "stateful:loss")
    manager.register(Counts())
    manager.register(Stateful(2), "stateful:f1")
    states = manager.state_dict()
    assert states == {"stateful:loss": {"value": 1}, "stateful:f1": {"value": 2}}
    other = PluginManager()
    for name in ("stateful:f1", "stateful:loss"):
        other.register(Stateful(), name)
    other.load_state_dict(states)
    assert {name: plugin.value for name, plugin in other.by_name.items()} == {
        "stateful:f1": 2,
        "stateful:loss": 1,
    }


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_half_of_a_state_is_refused(method):
    class Half(TrainerCallback):
        def on_init_end(self, trainer): ...

    setattr(Half, method, lambda self, *state: {})
    with pytest.raises(PluginValidationError, match="needs both state_dict and load_state_dict"):
        PluginManager().register(Half())


def test_states_that_do_not_match_are_named_and_none_is_restored():
    manager = PluginManager()
    manager.register(Stateful(), "kept")
    manager.register(Stateful(), "missing")
    states = {"kept": {"value": 5}, "mising": {"value": 6}}
    message = "'mising', which isn't enabled. Did you mean 'missing'.*no state of 'missing'"
    with pytest.raises(TrainingStateError, match=message):
        manager.load_state_dict(states)
    with pytest.raises(TrainingStateError, match="no state of 'missing'"):
        manager.load_state_dict(states, allow_extra=True)
    with pytest.raises(TrainingStateError, match="'mising', which isn't enabled"):
        manager.load_state_dict(states, allow_missing=True)
    assert manager.state_dict() == {"kept": {"value": 0}, "missing": {"value": 0}}
    manager.load_state_dict(states, allow_extra=True, allow_missing=True)
    assert manager.by_name["kept"].value == 5


def test_an_exception_in_a_plugins_state_is_blamed_on_it():
    manager = manager_of(Stateful())
    with pytest.raises(KeyError) as caught:
        manager.load_state_dict({"Stateful": {}})
    assert "in load_state_dict of plugin 'Stateful'" in caught.value.__notes__[0]


def test_an_implementation_says_where_it_is():
    (found,) = manager_of(Counts).implementations("on_init_end")
    assert (found.hook, found.name, found.wrapper) == ("on_init_end", "Counts", False)
    assert found.file == __file__
    assert "def on_init_end" in Path(__file__).read_text().splitlines()[found.line - 1]
    assert found.source.origin == "code"
    assert found.source.target == f"{__name__}:Counts"


def test_a_builtin_that_code_gives_has_its_own_name_and_our_distribution():
    from pa_core.callbacks import PrintProgressCallback

    manager = manager_of(PrintProgressCallback, PrintProgressCallback())
    assert list(manager.by_name) == ["print_progress", "print_progress:2"]
    assert {source.distribution for source in manager.sources.values()} == {"pa-core"}
