"""Layer-wise learning-rate decay for any model, based on the names of its parameters."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from pa_core.plugin import named_parameters
from pa_models.layer_groups import groups_as_text, print_on_main

if TYPE_CHECKING:
    from torch import nn


def layer_depths(model: nn.Module) -> dict[str, int]:
    """The depth of each parameter; 0 for those before the first block.

    A block is a numbered part of a name: ``encoder.layer.3`` of
    ``encoder.layer.3.output.dense.weight``, ``layer2.0`` of a ResNet, ``4`` of an `nn.Sequential`.
    Parameters before the first block (embeddings, a stem) have depth 0, those after the last block
    (a norm, a head) the greatest depth. A tied parameter has the depth of its first name: the
    embeddings of a language model have depth 0 even if its head is tied to them.

    Args:
        model: the model; the order of its parameters is that of their definition.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> layer_depths(model)
    {'0.weight': 0, '0.bias': 0, '2.weight': 1, '2.bias': 1}
    """
    blocks: dict[str, int] = {}
    for name, _ in named_parameters(model):
        block = _block(name)
        if block is not None:
            blocks.setdefault(block, len(blocks))
    names = [name for name, _ in named_parameters(model)]
    first = next((i for i, name in enumerate(names) if _block(name) is not None), len(names))
    depths = {}
    for i, name in enumerate(names):
        block = _block(name)
        if block is not None:
            depths[name] = blocks[block] + 1
        else:
            depths[name] = 0 if i < first else len(blocks) + 1
    used = {depth: number for number, depth in enumerate(sorted(set(depths.values())))}
    return {name: used[depth] for name, depth in depths.items()}


def param_groups_layer_decay(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    layer_decay: float = 0.75,
    no_weight_decay: Collection[str] | None = None,
    *,
    verbose: bool = True,
) -> list[dict[str, Any]]:
    r"""Parameter groups with learning rates that decrease from the last layer to the first.

    Of :math:`n` layers, layer :math:`i` has the learning rate :math:`lr \cdot d^{\,n - 1 - i}` with
    the decay :math:`d`, as in `BEiT <https://arxiv.org/abs/2106.08254>`_. Biases, norms and other
    one-dimensional parameters have no weight decay.

    Args:
        model: any model; see `layer_depths` for its layers. Frozen parameters are excluded.
        lr: the learning rate of the last layer.
        weight_decay: for weights with two or more dimensions.
        layer_decay: above 0 and at most 1, which means no decay.
        no_weight_decay: names of parameters without weight decay; by default those that the model's
            method ``no_weight_decay`` returns, which timm's models have.
        verbose: whether to print the layers with their learning rates, on the main process.

    Returns:
        Groups for an optimizer, from the first layer to the last. Each has a ``name``, such as
        ``"layer_0_no_decay"``.

    Raises:
        ValueError: for a decay out of range, or if the model has no trainable parameter.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay!r}")
    if no_weight_decay is None:
        names_of_model = getattr(model, "no_weight_decay", None)
        no_weight_decay = names_of_model() if callable(names_of_model) else ()
    depths = layer_depths(model)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named_parameters(model):
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in no_weight_decay
        depth = depths[name]
        group = groups.setdefault(
            (depth, decays),
            {
                "params": [],
                "name": f"layer_{depth}_{'decay' if decays else 'no_decay'}",
                "lr": lr * layer_decay ** (max(depths.values()) - depth),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    if verbose:
        layers: dict[int, tuple[str, list[nn.Parameter], str]] = {}
        for depth, decays in sorted(groups):
            group = groups[depth, decays]
            layer = layers.setdefault(depth, (f"layer {depth}", [], f"lr {group['lr']:.3g}"))
            layer[1].extend(group["params"])
        print_on_main(f"Layers of {type(model).__name__}:", *groups_as_text(model, layers.values()))
    return [groups[key] for key in sorted(groups)]


def _block(name: str) -> str | None:
    """The name up to its first number; None if it has none."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if index is None else ".".join(parts[: index + 1])
