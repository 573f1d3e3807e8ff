"""Pruning: remove weights that matter least, at once or over a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from dwindle.attaching import attach, attached, weight_value
from dwindle.errors import ConfigError, UnsupportedModelError, check_choice
from dwindle.pruning.channel_groups import Group, Groups, groups
from dwindle.pruning.channels import ChannelOptions, ChannelPlan, plan_channels, prune_channels
from dwindle.pruning.masks import MagnitudeMask, keep_largest, removed_count
from dwindle.pruning.regularization import L1Penalty
from dwindle.pruning.schedules import Constant, PolynomialDecay, Schedule, schedule_from_dict
from dwindle.weights import Slot, Transform, model_slots, select, walk_layers

__all__ = [
    "ChannelOptions", "ChannelPlan", "Constant", "Group", "Groups", "PolynomialDecay", "groups", "plan_channels",
    "prune", "prune_channels",
]  # fmt: skip

CRITERIA = ("magnitude",)
SCOPES = ("layer", "global")
STRUCTURES = ("element", "channel")


def prune(
    model: keras.Model,
    sparsity: float = 0.8,
    structure: str = "element",
    criterion: str = "magnitude",
    scope: str = "layer",
    schedule: Schedule | dict[str, Any] | None = None,
    layers: str | Sequence[str] | None = None,
    *,
    l1: float = 0.0,
    data: Any = None,
    **channel_options: Any,
) -> keras.Model:
    """Return a twin of ``model`` in which a fraction of the weights is zero, and stays zero in training.

    Without a schedule the weights of least magnitude are removed at once. With one they are removed while the twin
    trains with plain ``fit`` or a custom loop. Calling it again on the twin with a higher sparsity removes more of
    what is left: train, prune, train, prune. Zeros make a file smaller once it is compressed; they do not make it
    faster.

    Args:
        model: A built functional or sequential model, nested and shared layers included; it is not changed.
        sparsity: Fraction of zeros in the pruned weights, in [0, 1). 0 with ``l1`` only regularizes.
        structure: ``"element"``: single weights. ``"channel"``: whole channels, which are cut out: the result is a
            smaller model; see `dwindle.pruning.channels.prune_channels` for its criteria and options.
        criterion: ``"magnitude"``: the smallest ``|w|`` go first.
        scope: ``"layer"``: each weight tensor reaches the target; ``"global"``: all of them together do.
        schedule: A `Constant` or `PolynomialDecay`; None removes at once.
        layers: Shell-style patterns of layer names (``nested/layer`` in nested models). None: all dense, convolution
            and recurrent kernels; depthwise kernels and embeddings only when named.
        l1: Factor of an L1 penalty on the chosen weights while training.
        data: Labelled samples, for criteria that need them.
        **channel_options: With ``structure="channel"``, the options of `prune_channels`.

    Returns:
        A new model, not compiled, with the same names, inputs and outputs.

    Raises:
        ConfigError: For a value out of range, or a pattern that matches nothing.
        UnsupportedModelError: For a subclassed model, or one without weights to prune.

    Example:
        >>> import keras, dwindle as dw
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> pruned = dw.prune(model, sparsity=0.75)
        >>> int((dw.finalize(pruned).layers[0].kernel.numpy() == 0).sum())
        24

    References:
        Han et al. 2015, arXiv 1506.02626; Zhu and Gupta 2017, arXiv 1710.01878.
    """
    if structure == "channel":
        if schedule is not None or l1 != 0:
            raise ConfigError("`schedule` and `l1` act on single weights; with `structure` 'channel' leave them out")
        criterion = "l2" if criterion == "magnitude" else criterion
        return prune_channels(
            model, sparsity, criterion=criterion, scope=scope, layers=layers, data=data, **channel_options
        )
    if channel_options:
        raise ConfigError(f"`{next(iter(channel_options))}` is an option of `structure` 'channel' only")
    _check(sparsity, structure, criterion, scope, l1)
    if isinstance(schedule, dict):
        schedule = schedule_from_dict(schedule)
    slots = _chosen(model, layers)
    values = {key: np.abs(weight_value(model, *key)) for key in slots}
    targets = _targets(values, sparsity, scope)
    calls = _calls_per_step(model)
    new: dict[tuple[str, str], list[Transform]] = {}
    before = {
        key: next((t for t in transforms if t.kind == "mask"), None) for key, transforms in attached(model).items()
    }
    for key in slots:
        transforms: list[Transform] = []
        if sparsity > 0:
            # Zeros of an earlier pruning have magnitude 0 and so stay first in line.
            first = removed_count(values[key].size, targets[key]) if schedule is None else 0
            mask = keep_largest(values[key], first) if schedule is None else None
            if mask is None and before.get(key) is not None:
                mask = (values[key] > 0).astype(np.float32)
            transforms.append(
                MagnitudeMask(sparsity=targets[key], schedule=schedule, calls_per_step=calls.get(key[0], 1), mask=mask)
            )
        if l1 > 0:
            transforms.append(L1Penalty(strength=l1))
        new[key] = transforms
    return attach(model, new)


def _check(sparsity: float, structure: Any, criterion: Any, scope: Any, l1: float) -> None:
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ConfigError(f"`sparsity` is {sparsity!r}; it must be a fraction of zeros in [0, 1), such as 0.8")
    if not l1 >= 0:
        raise ConfigError(f"`l1` is {l1!r}; it must be 0 or above, such as 1e-4")
    if sparsity == 0 and l1 == 0:
        raise ConfigError("`sparsity` and `l1` are both 0, so there is nothing to do; pass one of them")
    check_choice("structure", structure, STRUCTURES)
    check_choice("criterion", criterion, CRITERIA)
    check_choice("scope", scope, SCOPES)


def _chosen(model: keras.Model, layers: str | Sequence[str] | None) -> dict[tuple[str, str], Slot]:
    from dwindle.weights import check_model

    check_model(model)
    by_path = model_slots(model)
    chosen = select(list(by_path), layers)
    slots = {(path, slot.key): slot for path in chosen for slot in by_path[path] if slot.prunable or layers is not None}
    if not slots:
        raise UnsupportedModelError(
            f"`model` ({model.name}) has no dense, convolution or recurrent kernels to prune"
            + (f"; name these to prune them all the same: {', '.join(by_path)}" if by_path else "")
        )
    return slots


def _targets(values: dict[tuple[str, str], np.ndarray], sparsity: float, scope: str) -> dict[tuple[str, str], float]:
    """Return each weight's own sparsity: the same for all, or from one ranking over all of them."""
    if scope == "layer":
        return dict.fromkeys(values, sparsity)
    sizes = [value.size for value in values.values()]
    together = np.concatenate([value.ravel() for value in values.values()])
    mask = keep_largest(together, removed_count(together.size, sparsity))
    parts = np.split(mask, np.cumsum(sizes)[:-1])
    return {key: float(1.0 - part.mean()) for key, part in zip(values, parts, strict=True)}


def _calls_per_step(model: keras.Model) -> dict[str, int]:
    """Return how often the model calls each of its layers, for layers that it shares."""
    config = model.get_config()
    entries = config.get("graph", config).get("layers", [])
    counts = {entry["config"].get("name"): max(1, len(entry.get("inbound_nodes", []) or [])) for entry in entries}
    return {path: counts.get(path, 1) for path, _ in walk_layers(model)}
