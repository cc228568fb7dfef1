"""Look into a user's data: which random generators they hold, and what changes from epoch to epoch.

The search follows attributes, lists, tuples, dictionaries, closures, and the global variables that
a function of the user's names. It runs no code of the user's, and it is bounded, so it may miss
something in a very large object.
"""

from __future__ import annotations

import dis
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from hashlib import blake2b
from types import BuiltinMethodType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from pa_core.data.digest import batch_digest
from pa_core.data.rng import key_at

Generator = random.Random | np.random.Generator | np.random.RandomState | torch.Generator

_MOST_OBJECTS = 5000
_MOST_ITEMS = 256  # of a list or dictionary
_SMALL = 16  # elements of a tensor or an array that may count something
_LIBRARIES = {"torch", "numpy", "builtins", *sys.stdlib_module_names} - {"__main__"}
"""Their classes and functions hold nothing of the user's."""


def find_generators(*roots: Any, without: Iterable[Any] = ()) -> list[Generator]:
    """The random generators that objects hold, in the order of the search, each once.

    The global ones of Python, NumPy and torch aren't among them.

    Args:
        roots: the objects.
        without: objects whose generators don't count.
    """
    found = (value for _, value in _walk(roots, without))
    return [value for value in found if _is_generator(value) and _can_be_seeded(value)]


class OwnGenerators:
    """The generators that objects hold, to be seeded for each batch that is fetched from them.

    Some datasets create theirs when they fetch the first sample. So the search is repeated after
    the first batch, and in a copy that another process makes.

    Args:
        roots: the objects.
    """

    def __init__(self, *roots: Any) -> None:
        self._roots = roots
        self._found: list[Generator] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_found": None}

    def __bool__(self) -> bool:
        return bool(self._found)

    def seed(self, key: int) -> None:
        """Seed them; those of the first call are searched for."""
        if self._found is None:
            self._found = find_generators(*self._roots)
        if self._found:
            seed_generators(self._found, key)

    def have_grown(self) -> bool:
        """Search again; returns whether there are new ones, which have not been seeded."""
        before, self._found = self._found, find_generators(*self._roots)
        return not {id(one) for one in self._found} <= {id(one) for one in before or ()}


def find_unseedable(*roots: Any) -> dict[str, Any]:
    """The random generators that objects hold and that can't be seeded, by where they are."""
    return {
        path: value
        for path, value in _walk(roots)
        if _is_generator(value) and not _can_be_seeded(value)
    }


def find_loaders(*roots: Any) -> list[Any]:
    """The data loaders that objects hold, and their iterators."""
    kinds = DataLoader, _BaseDataLoaderIter
    return [value for _, value in _walk(roots) if isinstance(value, kinds)]


def seed_generators(generators: Iterable[Generator], key: int) -> None:
    """Seed generators from a key; each draws other numbers."""
    for number, generator in enumerate(generators):
        own = key_at(key, number) if number else key
        if isinstance(generator, random.Random):
            generator.seed(own)
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, np.random.RandomState):
            generator.seed(own & 0xFFFFFFFF)
        else:
            bits: Any = generator.bit_generator
            bits.state = type(bits)(own).state


def digest_of_values(*roots: Any, without: Iterable[Any] = ()) -> str:
    """A digest of the numbers and texts that objects hold, such as a count of epochs.

    Args:
        roots: the objects.
        without: objects whose content doesn't count.
    """
    digest = blake2b(digest_size=16)
    for path, value in _walk(roots, without):
        if _is_value(value):
            digest.update(f"{path} {batch_digest(value)}\n".encode())
    return digest.hexdigest()


def _is_generator(value: Any) -> bool:
    return isinstance(value, Generator)


def _can_be_seeded(value: Any) -> bool:
    if isinstance(value, random.SystemRandom):
        return False
    return not isinstance(value, torch.Generator) or value.device.type == "cpu"


def _is_value(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.device.type == "cpu" and value.numel() <= _SMALL
    if isinstance(value, np.ndarray):
        return value.size <= _SMALL and not value.dtype.hasobject
    return isinstance(value, bool | int | float | str | np.generic)


def _walk(roots: Iterable[Any], without: Iterable[Any] = ()) -> Iterator[tuple[str, Any]]:
    """Everything that objects hold, breadth first, each object once, with its path."""
    roots = [root for root in roots if root is not None]
    queue = deque((type(root).__name__, root) for root in roots)
    global_generators = (random._inst, np.random.mtrand._rand, torch.default_generator)
    seen = set(map(id, (*global_generators, *roots, *without)))
    kept = []  # what the search itself has made must not pass its id on to another object
    while queue and len(seen) < _MOST_OBJECTS:
        path, value = queue.popleft()
        yield path, value
        if _is_generator(value) or isinstance(value, Tensor | np.ndarray):
            continue
        for name, inner in _inner(value):
            if inner is None or isinstance(inner, ModuleType | type):
                continue
            if not _is_value(inner):
                if id(inner) in seen:
                    continue
                seen.add(id(inner))
                kept.append(inner)
            queue.append((f"{path}{name}", inner))


def _inner(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds directly, with the way from it."""
    if isinstance(value, str | bytes | bool | int | float | np.generic):
        return
    if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
        for key in list(value)[:_MOST_ITEMS] if len(value) <= _MOST_ITEMS else ():
            yield f"[{key!r}]", value[key]
    elif isinstance(value, list | tuple | deque):
        if len(value) <= _MOST_ITEMS:
            yield from ((f"[{number}]", item) for number, item in enumerate(value))
    elif isinstance(value, partial):
        yield from ((f".{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif isinstance(value, BuiltinMethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, GeneratorType):  # one that continues from epoch to epoch
        names = value.gi_frame.f_locals if value.gi_frame is not None else {}
        yield from ((f"({name})", item) for name, item in list(names.items()))
    elif isinstance(value, FunctionType):
        yield from _inner_of_function(value)
    else:
        yield from _inner_of_object(value)


def _inner_of_object(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, those of its classes, and the functions of its classes."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        attributes = {}
    for name, item in list(attributes.items()):
        yield f".{name}", item
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            try:
                yield f".{name}", object.__getattribute__(value, name)
            except AttributeError:
                continue
        if _is_of_user(cls):
            for name, item in list(vars(cls).items()):
                if isinstance(item, property):
                    item = item.fget
                elif isinstance(item, staticmethod | classmethod):
                    item = item.__func__
                if not name.startswith("__") or (
                    isinstance(item, FunctionType) and name not in ("__init__", "__new__")
                ):
                    yield f".{name}", item


def _inner_of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function of the user's reads: its closure, its defaults, and global variables."""
    if not _is_of_user(function):
        return
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield f"({name})", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for item in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield "(default)", item
    for name in dict.fromkeys(_global_names(function.__code__)):
        if name in function.__globals__:
            yield f"({name})", function.__globals__[name]


def _global_names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "STORE_GLOBAL"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _is_of_user(owner: Any) -> bool:
    return str(getattr(owner, "__module__", None)).partition(".")[0] not in _LIBRARIES
