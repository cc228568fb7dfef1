"""What a loss is a mean over: found by watching how it is calculated.

A loss such as ``cross_entropy(logits.view(-1, n), labels.view(-1))`` is a mean over the labels that
it doesn't ignore. Which function makes the loss that a model returns, and of which entry of the
batch its target is a view, can be seen in one forward pass, without reading any value. A loss that
is made in another way is unknown, and isn't guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_OF_CLASSES = (functional.cross_entropy, functional.nll_loss)
_OF_BINARY = (
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
)
_OF_ELEMENTS = (
    *_OF_BINARY,
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
)
_OF_SAMPLES = (functional.ctc_loss,)
_SIGNATURES = {
    function: inspect.signature(function)
    for function in (*_OF_CLASSES, *_OF_ELEMENTS, *_OF_SAMPLES)
}

# The names of functions and methods, without underscores: `__iadd__` and `add_` are "iadd", "add".
_CASTS = {
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "long", "int", "cpu", "cuda"),
    *("view", "view_as", "reshape", "flatten", "ravel", "squeeze", "unsqueeze", "contiguous"),
    *("clone", "detach"),
}
_TESTS = {"eq", "ne", "gt", "ge", "bool"}
_OF_ONE = {"mean", "sum"}
_SCALES = {"mul", "rmul", "imul", "multiply", "truediv", "itruediv", "div", "divide"}
_ELEMENTWISE = {
    *("sub", "rsub", "square", "abs", "pow", "mul", "rmul", "div", "truediv", "exp", "log"),
    *("sqrt", "log1p", "relu", "softplus", "logsigmoid", "neg", "add", "radd"),
}
_READS = {"item", "tolist", "numpy", "__float__", "__int__", "__index__"}
_SUMS = {"add", "radd", "iadd", "sub", "isub"}
_CHANGES = {"setitem", "set"} | {
    f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")
}
"""Functions that change their first argument, in addition to those whose name ends with ``_``."""


@dataclass(frozen=True)
class _Test:
    """A condition on each element of an entry of the batch, such as ``attention_mask == 1``."""

    entry: str
    is_shifted: bool
    name: str
    number: float | None

    def of(self, batch: Mapping[str, Any]) -> Tensor:
        values = batch[self.entry]
        if self.is_shifted:
            values = values[..., 1:]
        return getattr(values, self.name)(*(() if self.number is None else (self.number,)))


@dataclass(frozen=True)
class _View:
    """The elements of an entry of the batch, in any order and type.

    Attributes:
        entry: its name.
        is_shifted: whether the first of each row is left out.
        padding: the number that was added at the end of each row.
        limit: the number to which larger ones were reduced.
        where: which elements were selected; None for all.
    """

    entry: str
    is_shifted: bool = False
    padding: float | None = None
    limit: float | None = None
    where: _Test | None = None


@dataclass(frozen=True)
class _Elements:
    """A tensor with one element for each of an entry, such as ``(logits - labels) ** 2``."""

    view: _View


@dataclass(frozen=True)
class Term:
    """A mean that a loss consists of.

    Attributes:
        kind: ``"samples"``; ``"classes"`` for a mean over the elements of `target` that aren't
            ignored; ``"elements"`` for one over all of them.
        target: what of the batch; None for a mean over samples.
        ignored: the class that doesn't count, or ``"limit"`` for those that don't exist.
        weights: how much an element of each class counts, shape ``(classes,)``; None for 1.
    """

    kind: str
    target: _View | None = None
    ignored: int | str | None = None
    weights: Tensor | None = None

    def count(self, batch: Mapping[str, Any], num_classes: int | None) -> int | Tensor:
        """The number of items in a batch, or their weight.

        It is on the batch's device, of shape ``()``, unless the shape tells.
        """
        target = self.target
        assert target is not None
        values = batch[target.entry]
        if target.is_shifted:
            values = values[..., 1:]
        if self.kind == "elements":
            return values.numel() if target.where is None else target.where.of(batch).sum()
        counts = values < num_classes if self.ignored == "limit" else values != self.ignored
        if target.where is not None:
            counts = counts & target.where.of(batch)
        if self.weights is None:
            return counts.sum()
        of_elements = self.weights.detach()[values.masked_fill(~counts, 0).long()]
        return (of_elements * counts).sum()


@dataclass(frozen=True)
class Known:
    """The means that a loss is the sum of, each with a constant factor.

    Attributes:
        terms: the means.
        factors: the fractions that they were multiplied by, which might depend on a batch's shape.
    """

    terms: frozenset[Term]
    factors: tuple[float, ...] = ()

    @property
    def has_weights(self) -> bool:
        """Whether it is a weighted mean."""
        return any(term.weights is not None for term in self.terms)

    def describe(self) -> str:
        """The value of the setting ``loss_mean`` that it corresponds to, or a text like it."""
        (term, *others) = self.terms
        if others:
            entries = {term.target.entry for term in self.terms if term.target is not None}
            return " and ".join(sorted(entries, reverse=True))
        if term.target is None:
            return "samples"
        name = f"shifted_{term.target.entry}" if term.target.is_shifted else term.target.entry
        if term.weights is not None:
            return f"{name} by the weights of their classes"
        selected_by = term.target.entry if term.target.where is None else term.target.where.entry
        if selected_by == term.target.entry:
            return name
        return selected_by if term.kind == "elements" else f"{name} in {selected_by}"


@dataclass(frozen=True)
class Unknown:
    """Why it isn't known what a loss is a mean over.

    Attributes:
        reason: a clause.
        is_sum: whether it is a sum over samples or labels, and so no mean at all.
    """

    reason: str
    is_sum: bool = False


_Followed = _View | _Test | _Elements | Known | Unknown


class LossWatch(TorchFunctionMode):
    """Follows, within its block, the entries of a batch into losses, and the losses into their sum.

    Nothing is read from a device, and no result is changed.

    Attributes:
        targets: the entries that were targets of losses, and whether these left out the first of
            each row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.targets: set[tuple[str, bool]] = set()
        # By identity. The tensors are kept, so that no other one gets the same identity.
        self._known: dict[int, tuple[Tensor, _Followed]] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._factors: list[float] = []
        self._has_read = False  # whether a number was read from a tensor

    def follow(self, batch: Mapping[str, Any]) -> None:
        """Follow the tensors of a batch."""
        for name, value in batch.items():
            if isinstance(value, Tensor):
                self._set(value, _View(name))
                self._shapes[name] = value.shape

    def result(self, loss: Tensor) -> Known | Unknown:
        """What `loss` is a mean over."""
        found = self._get(loss)
        if isinstance(found, Unknown):
            return found
        if not isinstance(found, Known):
            return Unknown("it isn't the result of one of torch's loss functions")
        terms = found.terms
        are_one_per_sample = all(
            term.kind == "classes" and term.ignored == "limit" for term in terms
        )
        if len(terms) > 1 and not are_one_per_sample:
            return Unknown("it is the sum of means over different items")
        return replace(found, factors=tuple(self._factors))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            result = func(*args, **kwargs)
            term = self._term(func, args, kwargs, result)
            if term is not None:
                self._set(result, term)
            return result
        full_name: str = getattr(func, "__name__", "")
        name = full_name.strip("_")
        self._has_read |= full_name in _READS
        found = self._found(name, args, kwargs)
        result = func(*args, **kwargs)
        is_method = full_name.startswith("__")
        if (name in _CHANGES if is_method else full_name.endswith("_")) and args:
            self._forget(args[0])
        if "out" in kwargs:
            self._forget(kwargs["out"])
        if isinstance(result, Tensor):
            change = None if found is None else found(result)
            if change is not None:
                self._set(result, change)
            else:
                self._known.pop(id(result), None)
        return result

    def _get(self, value: Any) -> _Followed | None:
        return self._known.get(id(value), (None, None))[1]

    def _set(self, tensor: Tensor, known: _Followed) -> None:
        self._known[id(tensor)] = tensor, known

    def _forget(self, changed: Any) -> None:
        """Forget what shares memory with a tensor that was changed in place."""
        if not isinstance(changed, Tensor):
            return
        memory = _memory(changed)
        for key, (tensor, _) in list(self._known.items()):
            if tensor is changed or (memory is not None and _memory(tensor) == memory):
                del self._known[key]

    def _found(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Tensor], _Followed | None] | None:
        """What the result of a call is, as a function of the result; None for nothing known."""
        if not args or not isinstance(args[0], Tensor):
            return None
        found = self._get(args[0])
        if name in _ELEMENTWISE:
            followed = [_elements(self._get(arg), arg) for arg in args if isinstance(arg, Tensor)]
            candidates = [pair for pair in followed if pair is not None]
            if candidates:
                return lambda result: next(
                    (elements for elements, shape in candidates if shape == result.shape), None
                )
        if isinstance(found, _Elements):
            if name == "mean" and len(args) == 1 and not kwargs:
                return lambda result: Known(frozenset([Term("elements", found.view)]))
            if name == "sum" and len(args) == 1 and not kwargs:
                return lambda result: Unknown("it is a sum, which grows with the batch", True)
            is_kept = name in ("to", "float", "contiguous", "clone", "detach")
            return lambda result: found if is_kept else None
        if isinstance(found, _View):
            return lambda result: self._view(found, name, args, kwargs, result)
        if isinstance(found, _Test):
            is_index = name == "nonzero" and args[0].ndim == 1 and not kwargs
            return lambda result: found if name in _CASTS or is_index else None
        if name in _SUMS and len(args) > 1:
            other = self._get(args[1])
            is_followed = isinstance(found, Known | Unknown), isinstance(other, Known | Unknown)
            if any(is_followed):
                added = _added(found, other, args[1] if is_followed[0] else args[0])
                return lambda result: added
            return None
        if found is None:
            return None
        if name in _CASTS or (name in _OF_ONE and args[0].numel() == 1):
            return lambda result: found
        if name in _SCALES:
            if isinstance(found, Known):
                is_float = len(args) > 1 and isinstance(args[1], float)
                may_be_read = is_float and self._has_read
                if may_be_read or not _is_constant(args[1:], len(found.terms)):
                    return lambda result: Unknown("its factor may depend on the batch")
                self._factors += [args[1]] if is_float else []
            is_divided = "div" in name or not _is_constant(args[1:], 1)
            if isinstance(found, Unknown) and found.is_sum and is_divided:
                return lambda result: Unknown("it is a sum that is divided by another number")
            return lambda result: found
        return None

    def _view(
        self,
        view: _View,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Tensor,
    ) -> _View | _Test | None:
        given = args[0]
        if name in _CASTS:
            return view
        if name in _TESTS and view == _View(view.entry, view.is_shifted):
            number = args[1] if len(args) > 1 else kwargs.get("other")
            if number is None or isinstance(number, int | float):
                return _Test(view.entry, view.is_shifted, name, number)
        if name == "clamp":
            low, high = [*args[1:], None, None][:2]
            low, high = kwargs.get("min", low), kwargs.get("max", high)
            if low == 0 and isinstance(high, int) and view == _View(view.entry):
                return replace(view, limit=high)
        if name == "pad" and not view.is_shifted:
            pad, *rest = args[1:] if len(args) > 1 else (kwargs.get("pad"),)
            mode = kwargs.get("mode", rest[0] if rest else "constant")
            value = kwargs.get("value", rest[1] if len(rest) > 1 else None)
            if list(pad or ()) == [0, 1] and mode == "constant":
                return replace(view, padding=value or 0)
        test = self._get(args[-1])
        if isinstance(test, _Test):
            is_whole = args[-1].dtype == torch.bool and args[-1].shape == given.shape
            is_mask = name in ("getitem", "masked_select") and len(args) == 2 and is_whole
            # DeBERTa gathers the samples that have a label.
            is_gathered = name == "gather" and args[1] == 0 and given.ndim == 1
            is_plain = view == _View(view.entry, test.is_shifted)
            return replace(view, where=test) if (is_mask or is_gathered) and is_plain else None
        if name == "getitem" and _is_slice(args[1]):
            if result.shape.numel() == given.shape.numel():
                return view
            *rows, length = self._shapes[view.entry] or (0,)
            row = length if view.padding is None else length + 1
            is_as_given = given.shape == (*rows, row) and not view.is_shifted
            if is_as_given and _leaves_first_out(args[1], given, result):
                return replace(view, is_shifted=True)
        return None

    def _term(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Tensor,
    ) -> _Elements | Known | Unknown | None:
        """What the result of one of torch's loss functions is a mean over."""
        bound = _SIGNATURES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        name = getattr(func, "__name__", "")
        target = self._get(given.get("target"))
        if isinstance(target, _View):
            self.targets.add((target.entry, target.is_shifted))
        if given["reduction"] == "sum":
            return Unknown(f"its {name} is a sum, which grows with the batch", is_sum=True)
        if given["reduction"] != "mean":
            if result.ndim and (found := _elements(target, given["target"])) is not None:
                return found[0] if found[1] == result.shape else None
            return Unknown(f"its {name} isn't reduced to a mean by torch")
        if func in _OF_SAMPLES:
            return Known(frozenset([Term("samples")]))
        is_of_classes = func in _OF_CLASSES and not given["target"].is_floating_point()
        weights = given.get("weight")
        # The weights of probabilities and of binary targets don't change what the mean is over.
        if weights is not None and func not in (*_OF_CLASSES, *_OF_BINARY):
            return Unknown(f"its {name} has weights")
        if not isinstance(target, _View):
            return Unknown(f"the target of its {name} isn't an entry of the batch")
        if not is_of_classes:
            is_plain = target.padding is None and target.limit is None
            if not is_plain:
                return Unknown(f"the target of its {name} is padded or clamped")
            if given["input"].shape != given["target"].shape:
                return Unknown(f"its {name} broadcasts its target")
            return Known(frozenset([Term("elements", target)]))
        ignored = given["ignore_index"]
        if target.padding is not None and target.padding != ignored:
            return Unknown("its labels are padded with one that counts")
        if target.limit is None:
            term = Term("classes", replace(target, padding=None), ignored, weights)
            return Known(frozenset([term]))
        if target.limit != ignored or ignored != given["input"].shape[1]:
            return Unknown("its labels are clamped to one that counts")
        term = Term("classes", replace(target, limit=None), "limit", weights)
        return Known(frozenset([term]))


def _elements(found: Any, tensor: Tensor) -> tuple[_Elements, torch.Size] | None:
    """What an elementwise function of a tensor has one element for, and the tensor's shape."""
    if isinstance(found, _View) and found.padding is None:
        return _Elements(replace(found, limit=None)), tensor.shape
    return (found, tensor.shape) if isinstance(found, _Elements) else None


def _added(first: Any, second: Any, other: Any) -> Known | Unknown:
    """What the sum of two losses is a mean over, one of which may be a number."""
    for found in (first, second):
        if isinstance(found, Unknown):
            return found
    if isinstance(first, Known) and isinstance(second, Known):
        return Known(first.terms | second.terms)
    known = first if isinstance(first, Known) else second
    assert isinstance(known, Known)
    if isinstance(other, int | float):
        return known
    return Unknown("a term is added to it that isn't known to be a mean over the same items")


def _is_constant(factors: tuple[Any, ...], terms: int) -> bool:
    """Whether a factor can't be a size of the batch: a fraction, or the number of terms."""
    factor = factors[0] if factors else None
    if isinstance(factor, float):
        return abs(factor) <= 1 or not factor.is_integer()
    return isinstance(factor, int) and abs(factor) in (1, terms)


def _is_slice(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, slice) for part in parts)


def _leaves_first_out(index: Any, given: Tensor, result: Tensor) -> bool:
    """Whether indexing leaves out the first of each row, and nothing else."""
    last = index[-1] if isinstance(index, tuple) else None
    return (
        isinstance(last, slice)
        and (last.start, last.stop, last.step) == (1, None, None)
        and given.ndim > 1
        and result.shape == (*given.shape[:-1], given.shape[-1] - 1)
    )


def _memory(tensor: Tensor) -> int | None:
    """The address of a tensor's memory; None if it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # a subclass without storage
        return None
