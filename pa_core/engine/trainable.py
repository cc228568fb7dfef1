"""The parameters that need gradients, where a wrapper has read which ones do.

`DistributedDataParallel` reads it once, when it wraps a model: it waits for a gradient of each
parameter that it knows, and never reduces one that it doesn't. Since hooks may freeze and unfreeze
at any time, a change has to be noticed before the forward pass, and all processes have to agree on
it, without a collective as long as nothing changes:

- Before the last forward pass of an accumulated batch, a process that sees a change announces it in
  the store that the processes share. The backward pass reduces what the wrapper knows, so when it
  is over, every process has announced its change, or has none.
- If all have announced one, they compare them. Gradients that the wrapper doesn't reduce are then
  reduced here, and the model is wrapped again. A parameter that was frozen takes part in this one
  backward pass, since the wrapper waits for it, and its gradient is discarded.
- Otherwise the change is undone until the processes exchange their requests; then all raise.

At the start of each epoch the processes compare their parameters in any case.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pa_core.engine.wrappers import distributed_layer, named_parameters
from pa_core.errors import listed

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

    from pa_core.engine.collectives import Collectives

_BUCKET_STATE = ("error_dict", "p_memory_dict", "q_memory_dict")
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)


class Seen(NamedTuple):
    """The parameters of a model when it was wrapped."""

    names: list[str]
    parameters: list[nn.Parameter]
    flags: list[bool]

    @classmethod
    def of(cls, model: nn.Module) -> Seen:
        """Read them from the model, with or without its wrapper."""
        named = dict(named_parameters(model))
        parameters = list(named.values())
        return cls(list(named), parameters, [p.requires_grad for p in parameters])

    def differs(self) -> bool:
        """Whether a parameter was frozen or unfrozen."""
        return [p.requires_grad for p in self.parameters] != self.flags

    def trainable(self) -> list[str]:
        """The names of the parameters that needed gradients, in order."""
        return [name for name, flag in zip(self.names, self.flags, strict=True) if flag]


@dataclass
class _Change:
    name: str
    parameter: nn.Parameter
    is_trainable: bool
    gradient: Tensor | None = None  # of a frozen parameter, from before it was frozen


class Trainable:
    """Follows the parameters that need gradients, on every process.

    Args:
        processes: connects the processes.
        unwrap: returns a model without any wrapper.
        is_sharded: whether the model is sharded between processes, and so can't be wrapped again.

    Attributes:
        disagreement: what this process has changed alone, until all processes know it.
    """

    _window = 0  # accumulated batches of all trainers so far, which name the entries of the store

    def __init__(
        self,
        processes: Collectives,
        unwrap: Callable[[nn.Module], nn.Module],
        *,
        is_sharded: bool,
    ) -> None:
        self._processes, self._unwrap, self._is_sharded = processes, unwrap, is_sharded
        self._seen: WeakKeyDictionary[nn.Module, Seen] = WeakKeyDictionary()
        self._changes: list[_Change] = []
        self._held: list[int] | None = None  # the parameters of the optimizer when it was checked
        self.disagreement: str | None = None

    def remember(self, model: nn.Module) -> None:
        """Remember the parameters of a model that is wrapped now."""
        self._seen[model] = Seen.of(self._unwrap(model))

    def seen(self, model: nn.Module) -> Seen:
        """The parameters of a model when it was wrapped."""
        if model not in self._seen:  # wrapped by the user
            self.remember(model)
        return self._seen[model]

    def synchronise(self) -> None:
        """Count accumulated batches alike on all processes; called at the start of a run."""
        (Trainable._window,) = self._processes.largest(Trainable._window)
        self.disagreement = None

    # -- At the start of an epoch -----------------------------------------------------------------

    def has_changed(self, model: nn.Module) -> bool:
        """Whether the model has other trainable parameters than the wrapper knows; a collective.

        Raises:
            RuntimeError: if processes differ, naming the parameters.
        """
        seen = self.seen(model)
        now = Seen.of(self._unwrap(model))
        known = set(map(id, seen.parameters))
        described = [
            (name, tuple(p.shape), flag, id(p) in known)
            for name, p, flag in zip(now.names, now.parameters, now.flags, strict=True)
        ]
        digest = int(hashlib.blake2b(repr(described).encode(), digest_size=7).hexdigest(), 16)
        most, least = self._processes.largest(digest, -digest)
        if most != -least:
            everywhere = self._processes.gather_objects(described)
            self._raise_difference([set(each) for each in everywhere])
        return (
            now.flags != seen.flags
            or len(now.parameters) != len(seen.parameters)
            or any(map(operator.is_not, now.parameters, seen.parameters))
        )

    def changed_names(self, model: nn.Module) -> str:
        """The parameters that differ from those that the wrapper knows, as text."""
        seen, now = self.seen(model), Seen.of(self._unwrap(model))
        known = dict(zip(map(id, seen.parameters), seen.flags, strict=True))
        pairs = zip(now.names, now.parameters, strict=True)
        return listed(sorted({name for name, p in pairs if known.get(id(p)) != p.requires_grad}))

    def _raise_difference(self, ranks: list[set[Any]]) -> None:
        differing = {entry[0] for one in ranks for entry in one ^ ranks[0]}
        raise RuntimeError(
            f"Processes differ in {listed(sorted(differing))}: each must freeze, unfreeze or "
            "replace the same parameters. Decide it from what all of them know, or share the "
            "decision with trainer.largest()"
        )

    # -- Around a backward pass -------------------------------------------------------------------

    def begin(self, model: nn.Module) -> bool:
        """Notice a change before the last forward pass of an accumulated batch."""
        Trainable._window += 1
        seen = self.seen(model)
        if not seen.differs():
            return False
        self._changes = [
            _Change(name, parameter, parameter.requires_grad)
            for name, parameter, flag in zip(*seen, strict=True)
            if parameter.requires_grad != flag
        ]
        if self._is_reduced(model):
            self._announced(1)
        for change in self._changes:
            if self._is_sharded:
                change.parameter.requires_grad_(not change.is_trainable)
            elif not change.is_trainable:
                change.gradient, change.parameter.grad = change.parameter.grad, None
                change.parameter.requires_grad_(True)
        return True

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Leave parameters frozen that `begin` has unfrozen, if the pass fails."""
        try:
            yield
        except BaseException:
            for change in self._changes:
                change.parameter.requires_grad_(change.is_trainable)
            self._changes = []
            raise

    def complete(self, model: nn.Module, optimizer: Any) -> bool:
        """Reduce what the wrapper hasn't, after the backward pass.

        Returns:
            Whether the model has to be wrapped again.

        Raises:
            RuntimeError: if processes have changed different parameters, or the optimizer holds
                some that the wrapper doesn't know.
        """
        changes, self._changes = self._changes, []
        if not self._is_sharded:
            self._check_optimizer(model, optimizer)
        if not changes:
            self._discard_late(model)
            return False
        names = listed(sorted({change.name for change in changes}))
        if self._processes.device.type != "cpu":
            torch.accelerator.synchronize(self._processes.device)  # the reduction is still running
        if self._is_reduced(model) and self._announced(0) < self._processes.num_processes:
            for change in changes:
                change.parameter.requires_grad_(not change.is_trainable)
                if change.is_trainable:
                    change.parameter.grad = None
            self.disagreement = names
            return False
        mine = {(change.name, change.is_trainable) for change in changes}
        gathered = self._processes.gather_objects(
            (mine, [_gradient(change) is not None for change in changes])
        )
        if any(other != mine for other, _ in gathered):
            self._raise_difference([other for other, _ in gathered])
        if self._is_sharded:
            for change in changes:
                change.parameter.requires_grad_(change.is_trainable)
            return True
        for change, *ranks in zip(changes, *(has for _, has in gathered), strict=True):
            self._reduce(change, has_gradient=any(ranks))
        return True

    def _check_optimizer(self, model: nn.Module, optimizer: Any) -> None:
        """Refuse parameters that were added to model and optimizer since the wrapper was made."""
        groups = getattr(optimizer, "param_groups", ())
        held = [id(parameter) for group in groups for parameter in group["params"]]
        if held == self._held:
            return
        unknown = set(held).difference(map(id, self.seen(model).parameters))
        if unknown:
            now = Seen.of(self._unwrap(model))
            pairs = zip(now.names, now.parameters, strict=True)
            names = sorted({name for name, parameter in pairs if id(parameter) in unknown})
            raise RuntimeError(
                f"{listed(names) or 'Parameters outside the model'} came to the optimizer within "
                "an epoch, and their gradients aren't reduced over processes: replace modules and "
                "add parameters in on_training_run_start or on_train_epoch_start"
            )
        self._held = held

    def _is_reduced(self, model: nn.Module) -> bool:
        """Whether a backward pass waits for the other processes."""
        return self._is_sharded or distributed_layer(model) is not None

    def _announced(self, count: int) -> int:
        """Add to the number of processes that have seen a change in this accumulated batch."""
        if self._processes.num_processes == 1:
            return 1
        store = torch.distributed.distributed_c10d._get_default_store()
        announced: int = store.add(f"pa_core/trainable/{self._window}", count)
        return announced

    def _reduce(self, change: _Change, *, has_gradient: bool) -> None:
        """Give each process the mean gradient of a parameter, as the wrapper would."""
        parameter, gradient = change.parameter, _gradient(change)
        if has_gradient:
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            gradient = gradient.detach().div(self._processes.num_processes)
            torch.distributed.all_reduce(gradient)
        parameter.requires_grad_(change.is_trainable)
        parameter.grad = gradient

    def _discard_late(self, model: nn.Module) -> None:
        """Discard gradients of parameters that the forward pass itself has unfrozen.

        They haven't been reduced, and other processes can't know of them before the next batch.
        """
        seen = self.seen(model)
        if not all(seen.flags):
            for parameter, flag in zip(seen.parameters, seen.flags, strict=True):
                if not flag and parameter.requires_grad:
                    parameter.grad = None


def _gradient(change: _Change) -> Tensor | None:
    return change.parameter.grad if change.is_trainable else change.gradient


def copy_hooks(old: DistributedDataParallel, new: DistributedDataParallel) -> None:
    """Register the communication hooks and the module hooks of one wrapper on another.

    Raises:
        RuntimeError: for one of torch's built-in communication hooks, which can't be read.
    """
    registered = old._get_ddp_logging_data().get("comm_hook")
    if registered and not old._comm_hooks:
        raise RuntimeError(
            f"The built-in communication hook {registered} can't be registered again after "
            "parameters were frozen or unfrozen: use register_comm_hook with a hook of "
            "torch.distributed.algorithms.ddp_comm_hooks"
        )
    for hook, state in old._comm_hooks:
        for name in _BUCKET_STATE:  # of PowerSGD; the buckets of the new wrapper are others
            getattr(state, name, {}).clear()
        new.register_comm_hook(state, hook)
    for name in _HOOKS:
        getattr(new, name).update(getattr(old, name))
