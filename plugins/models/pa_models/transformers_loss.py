"""Losses and predictions of models that compute their own loss, like those of transformers."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from pa_models.loss_mean import Known, LossWatch, Unknown
from pa_models.transformers_call import call_model, is_required, makes_decoder_inputs

if TYPE_CHECKING:
    from pa_core import Trainer

IGNORED = -100
"""The label of tokens that the loss ignores, in transformers as in ``cross_entropy``."""

LOSS_MEANS = ("samples", "labels", "shifted_labels", "attention_mask")
"""The names that the setting ``loss_mean`` accepts."""

CountItems = Callable[[Mapping[str, Any], Any], Any]


_MAX_KINDS = 256
"""How many kinds of batches are remembered of a model: some may have a new text in each."""


class Found(NamedTuple):
    """What was found about the loss of a kind of batch.

    Attributes:
        known: what it is a mean over; None for samples, or as declared.
        shifts_labels: whether it compares each label with the output before it; None if unknown.
    """

    known: Known | None
    shifts_labels: bool | None


class BatchLosses:
    """Calculates the losses of batches that are mappings, and counts what they are means over.

    The first forward pass with each kind of batch is watched, to see what the loss is a mean over.

    Args:
        loss_mean: one of `LOSS_MEANS`, or a function of the batch and the model's output that
            returns the number of items; None to find it.
    """

    def __init__(self, loss_mean: str | CountItems | None = None) -> None:
        self._declared = loss_mean
        self._found: WeakKeyDictionary[nn.Module, dict[Any, Found]] = WeakKeyDictionary()
        self._loss_funcs: dict[int, Any] = {}
        self._uneven: Tensor | None = None

    def calculate(
        self, trainer: Trainer, batch: Mapping[str, Any], label_smoothing: float = 0.0
    ) -> dict[str, Any]:
        """Call the model with the batch's entries as arguments, and use the loss that it returns.

        If the trainer has a loss function, its loss is used instead.

        Args:
            trainer: the trainer with the model.
            batch: its entries are the model's arguments.
            label_smoothing: the fraction of the target that is spread over all classes.

        Returns:
            ``loss`` (shape ``()``), ``model_outputs`` (what the model returns), ``batch_size``,
            and, unless the loss is a mean over samples, ``num_items_in_batch``. ``log`` has the
            losses that the model returns besides, such as the ``aux_loss`` of a mixture of experts,
            and with label smoothing the parts of the loss: ``unsmoothed_loss``, and
            ``uniform_loss`` for a uniform target.
            ``shifts_labels`` says whether the loss compares each label with the output before it,
            if that is known. If it ignores other labels than those of -100, ``ignored_label`` is
            the class, and ``counts_label`` says of each label whether it counts.

        Raises:
            ValueError: if the model returns no loss, if the batch isn't made of tensors, or if it
                isn't known what the loss is a mean over.
        """
        _check_batch(batch)
        if label_smoothing and trainer.loss_func is not None:
            raise ValueError(
                "label_smoothing applies to the model's own loss, but the Trainer has a loss_func: "
                "smooth the labels there, or give loss_func=None"
            )
        model = trainer.get_model(keep_torch_compile=False)
        kind = (
            model.training,
            id(trainer.loss_func),
            *((name, _kind_of(value)) for name, value in batch.items()),
        )
        found = self._found.setdefault(model, {})
        first = found[kind].known if kind in found else None
        if first is not None and first.factors:
            kind = (*kind, *(value.shape for _, value in _tensors(batch)))
        if kind not in found:
            outputs, loss, seen, shifts_targets = _run_watched(trainer, model, batch)
            if first is not None and isinstance(seen, Known) and seen.factors != first.factors:
                seen = Unknown("its factor depends on the batch")
            known = self._check(seen, trainer, batch)
            shifts_labels = self._knows_shift(known, shifts_targets)
            if len(found) >= _MAX_KINDS:
                found.clear()
            found[kind] = Found(known, shifts_labels)
            self._loss_funcs[id(trainer.loss_func)] = trainer.loss_func  # keeps its id its own
        else:
            known, shifts_labels = found[kind]
            if known is not None and known.has_weights:
                # The function may change its weights, so it is watched each time, not the model.
                watch = LossWatch()
                watch.follow(batch)
                outputs, loss = _run(trainer.model, trainer.loss_func, batch, watch)
                known = self._check(watch.result(loss), trainer, batch)
            else:
                outputs, loss = _run(trainer.model, trainer.loss_func, batch)
        log = _other_losses(outputs)
        if label_smoothing:
            is_shifted = self._shifts_labels(known, batch)
            excess = _uniform_excess(outputs, batch, is_shifted=is_shifted)
            log |= {"unsmoothed_loss": loss, "uniform_loss": (loss + excess).detach()}
            loss = loss + label_smoothing * excess
        result = {"loss": loss, "model_outputs": outputs, "batch_size": get_batch_size(batch)}
        if shifts_labels is not None:
            result["shifts_labels"] = shifts_labels
        result |= _ignored_labels(known, batch)
        if log:
            result["log"] = log
        items = self._count(known, batch, outputs)
        if items is not None:
            result["num_items_in_batch"] = items
        return result

    def found(self, model: nn.Module) -> list[Known | None]:
        """What the losses of each kind of batch are means over; None for samples, or as declared.

        Args:
            model: without wrappers.
        """
        return [found.known for found in self._found.get(model, {}).values()]

    def forget(self, *, training: bool) -> None:
        """Watch again how losses are calculated: a model may do it otherwise in another epoch.

        Args:
            training: whether to forget the losses in training mode, or those in evaluation mode.
        """
        for found in self._found.values():
            for kind in [kind for kind in found if kind[0] == training]:
                del found[kind]

    def check_positions(self) -> None:
        """Raise if a batch had positions of an answer of which only one is in the sequence.

        On a CPU, it is raised at once; on another device here, which synchronises with it.
        """
        uneven, self._uneven = self._uneven, None
        if uneven is not None and bool(uneven):
            raise ValueError(
                "For some samples, only one of their positions is in the sequence, so that the "
                "loss isn't a mean over one number of samples: set both positions to the "
                "sequence's length to ignore a sample, or both to positions in it"
            )

    def _check(
        self, seen: Known | Unknown, trainer: Trainer, batch: Mapping[str, Any]
    ) -> Known | None:
        """What the loss is a mean over; None for what was declared, or for a mean over samples.

        Raises:
            ValueError: if it isn't known, or if the declared value is wrong.
        """
        declared = self._declared
        is_given = trainer.loss_func is not None
        loss = (
            "the loss_func"
            if is_given
            else f"the loss of {type(trainer.get_model(keep_torch_compile=False)).__name__}"
        )
        if isinstance(seen, Known) and seen.has_weights and not is_given:
            seen = Unknown("it is weighted by class, so the sum of its labels' weights counts")
        if isinstance(seen, Unknown):
            if callable(declared) or (declared is not None and not seen.is_sum):
                return None
            if is_given and not seen.is_sum and not _has_token_labels(batch):
                return None  # by contract a mean over samples
            raise ValueError(_ask(loss, seen))
        if declared is None:
            return seen
        wanted = _name_of(seen, batch)
        if not callable(declared) and wanted is not None and declared != wanted:
            raise ValueError(
                f'loss_mean = "{declared}" is wrong: {loss} is a mean over {wanted}. Remove '
                "loss_mean, since this is known"
            )
        return None

    def _count(
        self, known: Known | None, batch: Mapping[str, Any], outputs: Any
    ) -> int | float | Tensor | None:
        """The number of items that the loss is a mean over; None for samples."""
        declared = self._declared
        if callable(declared):
            items: int | float | Tensor = declared(batch, outputs)
            return items
        if declared is not None:
            return _count_declared(declared, batch)
        if known is None:
            return None
        logits = _get(outputs, "start_logits")
        num_classes = logits.shape[1] if isinstance(logits, Tensor) else None
        counts = [term.count(batch, num_classes) for term in known.terms if term.target is not None]
        if len(counts) > 1:
            first, *others = counts
            uneven = sum(first != other for other in others) > 0
            assert isinstance(uneven, Tensor)
            self._uneven = uneven if self._uneven is None else self._uneven | uneven
            if uneven.is_cpu:
                self.check_positions()
        return counts[0] if counts else None

    def _knows_shift(self, known: Known | None, shifts_targets: bool | None) -> bool | None:
        """Whether the loss compares each label with the output before it; None if unknown.

        Args:
            known: what it is a mean over.
            shifts_targets: what the targets of its terms say.
        """
        if known is None:
            of_names = {"labels": False, "shifted_labels": True}
            declared = self._declared if isinstance(self._declared, str) else ""
            return of_names.get(declared, shifts_targets)
        targets = {(one.entry, one.is_shifted) for term in known.terms if (one := term.target)}
        return _shifts(targets) if len(targets) == 1 else None

    def _shifts_labels(self, known: Known | None, batch: Mapping[str, Any]) -> bool:
        """Whether the loss ignores the first label of each sequence.

        Raises:
            ValueError: if the loss isn't a mean over labels.
        """
        name = self._declared if known is None else _name_of(known, batch)
        if known is not None and name is None and len(known.terms) == 1:
            (term,) = known.terms
            if term.target is not None and term.target.entry == "labels":
                name = "labels"  # one for each sample
        if name == "samples" and not _has_token_labels(batch):
            name = "labels"
        if name not in ("labels", "shifted_labels"):
            raise ValueError("Labels can be smoothed only if the loss is a mean over labels")
        return name == "shifted_labels" and "shift_labels" not in batch


def get_batch_size(batch: Mapping[str, Any]) -> int:
    """The length of the batch's tensors.

    Raises:
        ValueError: if the batch has no tensor with at least one dimension.
    """
    for _, value in _tensors(batch):
        if value.ndim:
            return len(value)
    raise ValueError(f"A batch with {', '.join(map(repr, batch)) or 'nothing'} has no tensors")


def _run(
    model: nn.Module,
    loss_func: Callable[..., Any] | None,
    batch: Mapping[str, Any],
    watch: LossWatch | None = None,
) -> tuple[Any, Tensor]:
    """The model's output and the loss: that of the loss function, or the model's own.

    Args:
        model: the model.
        loss_func: the trainer's loss function, if it has one.
        batch: the model's arguments, and the labels for the loss function.
        watch: watches the loss function, but not the model.
    """
    if loss_func is None:
        outputs = call_model(model, batch)
        loss = _get(outputs, "loss")
        if loss is None:
            raise ValueError(
                f"{type(_inner(model)).__name__} returned no loss for a batch with "
                f"{', '.join(map(repr, batch))}. Models compute it from 'labels': add them in the "
                "dataset or the collate function, give the Trainer a loss_func, or override the "
                "trainer's calculate_train_batch_loss"
            )
        return outputs, loss
    if _expects_batch(loss_func):
        outputs = call_model(model, batch)
        with _watched_by(watch):
            return outputs, loss_func(outputs, batch)
    inputs, inner = batch, _inner(model)
    if not (is_required(inner, "labels") or makes_decoder_inputs(inner, batch)):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
    outputs = call_model(model, inputs)
    logits = outputs if isinstance(outputs, Tensor) else _get(outputs, "logits")
    if logits is None or "labels" not in batch:
        missing = "the model returns no logits" if logits is None else "the batch has no 'labels'"
        raise ValueError(
            f"The loss_func can't be called as loss_func(logits, labels), since {missing}. Name "
            "its second parameter 'batch' to have it called as loss_func(outputs, batch), or give "
            "loss_func=None to use the model's own loss"
        )
    try:
        with _watched_by(watch):
            return outputs, loss_func(logits, batch["labels"])
    except Exception as error:
        error.add_note(
            "loss_func was called as loss_func(logits, labels). If its second parameter is named "
            "'batch', it is called as loss_func(outputs, batch)"
        )
        raise


@contextmanager
def _watched_by(watch: LossWatch | None) -> Iterator[None]:
    """Watch what is called; compiled functions, which can't be watched, run as written."""
    if watch is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"), watch:
        yield


def _run_watched(
    trainer: Trainer, model: nn.Module, batch: Mapping[str, Any]
) -> tuple[Any, Tensor, Known | Unknown, bool | None]:
    """As `_run`, what the loss is a mean over, and whether its terms shift the labels.

    The code of compiled modules can't be watched, so the model also runs as it was written.
    """
    watch, loss_func = LossWatch(), trainer.loss_func
    if _is_compiled(trainer.model):
        with _unchanged(model), torch.no_grad(), _watched_by(watch):
            watch.follow(batch)
            _, watched = _run(model, loss_func, batch)
        outputs, loss = _run(trainer.model, loss_func, batch)
        return outputs, loss, watch.result(watched), _shifts(watch.targets)

    # Wrappers may pass on other tensors, so what the model itself gets and returns is followed.
    own: list[Any] = []
    handles = [
        model.register_forward_pre_hook(lambda _, __, given: watch.follow(given), with_kwargs=True),
        model.register_forward_hook(lambda _, __, outputs: own.append(_get(outputs, "loss"))),
    ]
    try:
        # Compiled functions that the model calls run as they were written; they differ by rounding.
        with _watched_by(watch):
            watch.follow(batch)
            outputs, loss = _run(trainer.model, loss_func, batch)
    finally:
        for handle in handles:
            handle.remove()
    watched = own[0] if loss_func is None and own and isinstance(own[0], Tensor) else loss
    return outputs, loss, watch.result(watched), _shifts(watch.targets)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the model's buffers and the random generators on exit."""
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    states = random.getstate(), np.random.get_state()
    devices = {parameter.device for parameter in model.parameters()}
    try:
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer  # the module may have replaced the tensor
                if buffer is not None and value is not None:
                    buffer.copy_(value)


def _shifts(targets: Iterable[tuple[str, bool]]) -> bool | None:
    """Whether the targets of losses are the labels without the first; None for none or both."""
    found = {
        is_shifted or entry == "shift_labels"
        for entry, is_shifted in targets
        if entry in ("labels", "shift_labels")
    }
    return found.pop() if len(found) == 1 else None


def _ask(loss: str, seen: Unknown) -> str:
    text = f"It isn't known what {loss} is a mean over: {seen.reason}. "
    if seen.is_sum:
        text += (
            "Make it a mean, with the model's configuration (as in ctc_loss_reduction='mean') or "
            "the loss function; otherwise"
        )
    else:
        text += (
            f"Set loss_mean in [tool.pa-core.transformers] to one of {', '.join(LOSS_MEANS)}, or"
        )
    return (
        f"{text} set loss_mean to the dotted path of a function of the batch and the outputs that "
        "returns the count of these items (num_items_in_batch). Losses of batches of different "
        "sizes can't be averaged without it"
    )


def _name_of(known: Known, batch: Mapping[str, Any]) -> str | None:
    """The value of ``loss_mean`` for labels of tokens; None for anything else."""
    if known.has_weights:
        return known.describe()
    if len(known.terms) != 1:
        return None
    (term,) = known.terms
    target = term.target
    if term.kind != "classes" or target is None or batch[target.entry].ndim < 2:
        return None
    if target.entry not in ("labels", "shift_labels") or target.where is not None:
        return f"{target.entry} without those that are ignored"
    if term.ignored != IGNORED:
        return f"{target.entry} other than {term.ignored}"
    is_shifted = target.is_shifted or target.entry == "shift_labels"
    return "shifted_labels" if is_shifted else "labels"


def _ignored_labels(known: Known | None, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Which labels a known loss ignores, in addition to those of -100."""
    terms = [] if known is None else [term for term in known.terms if term.target is not None]
    if len(terms) != 1 or terms[0].target is None or terms[0].target.entry != "labels":
        return {}
    (term,) = terms
    found: dict[str, Any] = {}
    if isinstance(term.ignored, int) and term.ignored != IGNORED:
        found["ignored_label"] = term.ignored
    if term.target is not None and term.target.where is not None and not term.target.is_shifted:
        found["counts_label"] = term.target.where.of(batch)
    return found


def _count_declared(name: str, batch: Mapping[str, Any]) -> Tensor | None:
    """The number of items of a batch, of shape ``()``; None for samples."""
    if name == "samples":
        return None
    entry = "attention_mask" if name == "attention_mask" else "labels"
    if name == "shifted_labels" and "shift_labels" in batch:
        entry = "shift_labels"
    values = batch.get(entry)
    if not isinstance(values, Tensor):
        raise ValueError(f'loss_mean = "{name}" needs {entry!r} in the batch, as a tensor')
    if entry == "attention_mask":
        return (values != 0).sum()
    if name == "shifted_labels" and entry == "labels":
        values = values[..., 1:]
    return (values != IGNORED).sum()


def _tensors(batch: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in batch.items() if isinstance(value, Tensor)]


def _kind_of(value: Any) -> Any:
    """What of an entry of a batch may decide how the loss is calculated."""
    if isinstance(value, Tensor):
        return value.ndim, value.is_floating_point()
    return value if isinstance(value, bool | int | str | None) else type(value)


def _has_token_labels(batch: Mapping[str, Any]) -> bool:
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point()


def _expects_batch(loss_func: Callable[..., Any]) -> bool:
    """Whether the second parameter of a loss function is called ``batch``."""
    function = loss_func.forward if isinstance(loss_func, nn.Module) else loss_func
    try:
        names = [*inspect.signature(function).parameters]
    except (TypeError, ValueError):  # a builtin
        return False
    return names[1:2] == ["batch"]


def _inner(model: nn.Module) -> nn.Module:
    """The model in the wrappers of distributed training and of `torch.compile`."""
    from pa_core.plugin import unwrap

    return unwrap(model)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        "_orig_mod" in module._modules
        or "_orig_mod" in vars(module)
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _other_losses(outputs: Any) -> dict[str, Tensor]:
    """The losses that a model returns in addition to ``loss``, by name.

    They are entries such as ``aux_loss``, ``router_loss`` or ``contrastive_loss``, and those of
    ``loss_dict``, as object detectors return.
    """
    if not isinstance(outputs, Mapping):
        return {}
    named = {name: value for name, value in outputs.items() if str(name).endswith("_loss")}
    several = outputs.get("loss_dict")
    found = {**named, **(several if isinstance(several, Mapping) else {})}
    return {
        str(name): value.detach()
        for name, value in found.items()
        if isinstance(value, Tensor) and value.numel() == 1 and name != "loss"
    }


def _get(outputs: Any, name: str) -> Any:
    """The loss or the logits of a mapping, an object, or a tuple ``(loss, logits, …)``."""
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    if type(outputs) is tuple and outputs:
        has_loss = isinstance(outputs[0], Tensor) and outputs[0].ndim == 0
        if name == "loss":
            return outputs[0] if has_loss else None
        rest = outputs[1:] if has_loss else outputs
        return rest[0] if name == "logits" and rest else None
    return getattr(outputs, name, None)


def _check_batch(batch: Mapping[str, Any]) -> None:
    wrong = [name for name, value in batch.items() if isinstance(value, list)]
    if "input_ids" in wrong:
        raise ValueError(
            f"{', '.join(map(repr, wrong))} of the batch are lists, but the model expects tensors: "
            "the samples need a collator, as in collate_fn=DataCollatorWithPadding(tokenizer) or "
            "with the setting collator of [tool.pa-core.transformers]"
        )


def _uniform_excess(outputs: Any, batch: Mapping[str, Any], *, is_shifted: bool) -> Tensor:
    """The loss for a uniform target minus the loss for the labels.

    Adding the fraction `label_smoothing` of it to the model's loss gives the smoothed loss of
    `Rethinking the Inception Architecture <https://arxiv.org/abs/1512.00567>`_, and keeps other
    terms of the model's loss, such as the router loss of a mixture of experts.

    Returns:
        Shape ``()``, a mean over the labels that aren't ignored.
    """
    logits, labels = _get(outputs, "logits"), batch.get("shift_labels", batch.get("labels"))
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise ValueError("Label smoothing needs logits in the model's output, and labels")
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Labels of {labels.dtype} and shape {tuple(labels.shape)} for logits of shape "
            f"{tuple(logits.shape)} can't be smoothed: they aren't classes"
        )
    if is_shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != IGNORED
    log_probs = logits.float().log_softmax(-1)
    of_label = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    excess = of_label - log_probs.mean(-1)
    return (excess * mask).sum() / mask.sum().clamp(min=1)
