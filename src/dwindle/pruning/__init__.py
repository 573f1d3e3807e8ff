"""Pruning: remove weights that matter least, at once or over a schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from dwindle.errors import ConfigError, did_you_mean
from dwindle.pruning.channel_groups import Group, Groups, groups
from dwindle.pruning.channels import ChannelOptions, ChannelPlan, plan_channels, prune_channels
from dwindle.pruning.criteria import CRITERIA, Criterion
from dwindle.pruning.depth import drop_blocks
from dwindle.pruning.schedules import Constant, PolynomialDecay, Schedule
from dwindle.pruning.single_weights import prune_weights

__all__ = [
    "CRITERIA", "ChannelOptions", "ChannelPlan", "Constant", "Criterion", "Group", "Groups", "PolynomialDecay",
    "Schedule", "drop_blocks", "groups", "plan_channels", "prune", "prune_channels",
]  # fmt: skip


def prune(
    model: keras.Model,
    sparsity: float | None = None,
    structure: Any = "element",
    criterion: Any = "magnitude",
    scope: str = "layer",
    schedule: Schedule | dict[str, Any] | None = None,
    layers: str | Sequence[str] | None = None,
    *,
    l1: float = 0.0,
    data: Any = None,
    loss: Any = None,
    **channel_options: Any,
) -> keras.Model:
    """Return a twin of ``model`` in which a fraction of the weights is zero, and stays zero in training.

    Without a schedule the weights of least magnitude are removed at once. With one they are removed while the twin
    trains with plain ``fit`` or a custom loop. Calling it again on the twin with a higher sparsity removes more of
    what is left: train, prune, train, prune. Zeros make a file smaller once it is compressed; they do not make it
    faster.

    Args:
        model: A built functional or sequential model, nested and shared layers included; it is not changed.
        sparsity: Fraction of zeros in the pruned weights, in [0, 1): ``round(sparsity * n)`` of ``n``, and never all of
            a layer. None: 0.8, or what the pattern says. 0 with ``l1`` only regularizes.
        structure: ``"element"``: single weights. ``(rows, columns)``: blocks of the kernel as a matrix of inputs by
            outputs; of blocks, the sparsity counts blocks. ``"2:4"``: 2 zeros of each 4 neighbours along the input
            channels. ``"channel"``: whole channels, which are cut out: the result is a smaller model; see
            `dwindle.pruning.channels.prune_channels` for its criteria and options. ``"depth"``: whole residual blocks,
            of which the sparsity is a share; see `dwindle.pruning.depth.drop_blocks`.
        criterion: What goes first: a name in `dwindle.pruning.CRITERIA`, or one of its objects with settings, such as
            ``Taylor(samples=500)``. ``"magnitude"``; ``"l1"`` and ``"proximal"``, which train towards zeros;
            ``"movement"``, which learns in training; ``"taylor"``, ``"fisher"``, ``"snip"`` from labelled ``data``;
            ``"wanda"`` from ``data``; ``"random"``.
        scope: ``"layer"``: each weight tensor reaches the target; ``"global"``: all of them together do. One ranking at
            the start then says what each of them loses. Patterns are the same in both. Channels have a third,
            ``"balanced"``: layers give the more the more their channels take.
        schedule: A `Constant` or `PolynomialDecay`, or the dict of one; None removes at once.
        layers: Shell-style patterns of layer names (``nested/layer`` in nested models). None: all dense, convolution
            and recurrent kernels that the structure fits; depthwise kernels and embeddings only when named.
        l1: Factor of an L1 penalty on the chosen weights while training.
        data: Samples, in any form that `dwindle.read_data` takes, for criteria that need them.
        loss: Loss for criteria that need one; None: the compiled one, else one that suits the labels.
        **channel_options: With ``structure="channel"``, the options of `prune_channels`; with ``"depth"``, those of
            `drop_blocks`.

    Returns:
        A new model, not compiled, with the same names, inputs and outputs.

    Raises:
        ConfigError: For a value out of range, a structure that does not fit, or a pattern that matches nothing.
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
            model, 0.8 if sparsity is None else sparsity, criterion=criterion, scope=scope, layers=layers, data=data,
            **({} if loss is None else {"loss": loss}), **channel_options,
        )  # fmt: skip
    if structure == "depth":
        return _shallower(model, sparsity, criterion, scope, schedule, layers, l1, data, loss, channel_options)
    if channel_options:
        raise ConfigError(f"`{next(iter(channel_options))}` is an option of `structure` 'channel' or 'depth' only")
    return prune_weights(
        model, sparsity, structure=structure, criterion=criterion, scope=scope, schedule=schedule, layers=layers, l1=l1,
        data=data, loss=loss,
    )  # fmt: skip


def _shallower(
    model: keras.Model, sparsity: float | None, criterion: Any, scope: str, schedule: Any, layers: Any, l1: float,
    data: Any, loss: Any, options: dict[str, Any],
) -> keras.Model:  # fmt: skip
    """Return what `drop_blocks` makes of the arguments of `prune`."""
    given = {"scope": scope != "layer", "schedule": schedule is not None, "l1": l1 != 0, "loss": loss is not None}
    if any(given.values()):
        name = next(name for name, is_given in given.items() if is_given)
        raise ConfigError(f"`{name}` acts on weights and channels; with `structure` 'depth' leave it out")
    check_options(drop_blocks, options, "structure", "depth")
    if sparsity is None and layers is None and "count" not in options:
        sparsity = 0.5
    if sparsity is not None and "count" in options:
        raise ConfigError("`sparsity` and `count` are both given; pass one of them")
    if sparsity is not None and not 0 < sparsity < 1:
        raise ConfigError(f"`sparsity` is {sparsity!r}; it must be a share of the blocks in (0, 1), such as 0.25")
    return drop_blocks(model, fraction=sparsity, layers=layers, data=data, criterion=criterion, **options)


def check_options(function: Callable[..., Any], options: Mapping[str, Any], argument: str, value: str) -> None:
    """Raise unless a function takes all of these keyword arguments.

    Raises:
        ConfigError: With the nearest name that it takes.
    """
    known = inspect.signature(function).parameters
    for name in options:
        if name not in known:
            raise ConfigError(f"`{name}` is no option of `{argument}` {value!r}{did_you_mean(name, known)}")
