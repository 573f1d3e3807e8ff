"""Weight clustering: the weights of a layer share a few values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from dwindle.attaching import attach, attached, weight_value
from dwindle.clustering.biases import round_biases
from dwindle.clustering.initial_values import INITS, check_init, initial_values, nearest, padded
from dwindle.clustering.kmeans import kmeans
from dwindle.clustering.report import Clustered, clusters_of
from dwindle.clustering.shared_values import COMPILED_FROM, GRADIENTS, ZERO_KINDS, SharedValues
from dwindle.errors import ConfigError, UnsupportedModelError, check_choice
from dwindle.weights import Slot, check_model, model_slots, select, walk_layers

__all__ = ["INITS", "Clustered", "SharedValues", "cluster", "clusters_of", "kmeans", "round_biases"]

_REASSIGN, _REASSIGN_SMALL = 100, 10
#: Share of zeros from which zero counts as put there on purpose.
MANY_ZEROS = 0.01


def cluster(
    model: keras.Model,
    clusters: int = 16,
    init: Any = "kmeans",
    per_channel: bool = False,
    layers: str | Sequence[str] | None = None,
    *,
    block: tuple[int, int] | None = None,
    gradient: str = "sum",
    reassign: int | None = None,
    entropy: float = 0.0,
    temperature: float = 0.0,
) -> keras.Model:
    """Return a twin of ``model`` whose weights share at most ``clusters`` values, also while it trains.

    Values and assignments are trained together, with plain ``fit`` or a loop of your own: see
    `dwindle.clustering.shared_values.SharedValues`. A weight with zeros (pruned, or at least 1% of it) keeps 0 as one
    of its values. Fewer values make a file smaller once it is packed or compressed, and no faster.

    Args:
        model: A built functional or sequential model, from `lift` or `quantize` as well; it is not changed.
        clusters: Values of a table, 2 to 65,536 (1 value where ``init`` names it). 16 are 4 bits a weight, before
            entropy coding.
        init: Where the values begin. ``"kmeans"``: least squared error, exact or Lloyd's steps to convergence;
            ``"linear"``: at equal distances; ``"density"``: as dense as the cube root of the weights' density;
            ``"quantile"``: as many weights each; or the values themselves, as many as ``clusters``.
        per_channel: Whether each output channel has values of its own. Folding a BatchNorm into a kernel scales its
            channels: values shared over the whole tensor are then shared per channel only. To share them over a whole
            tensor of the file, cluster what `lift` returns.
        layers: Shell-style patterns of layer names (``nested/layer`` in nested models). None: every dense, convolution,
            recurrent and embedding weight with at least as many entries as ``clusters``.
        block: Instead of ``per_channel``: ``(rows, columns)`` of the kernel, as a matrix of inputs by outputs, that
            share a table; 0 for all of them. ``(0, 8)``: groups of 8 output channels.
        gradient: ``"sum"`` of its weights' gradients for a value, which is the loss's own, or their ``"mean"``.
        reassign: Training steps after which weights go to the value that is nearest by then. None: 10 for tensors below
            16,384 weights, where many that move at once do harm and assigning costs little, else 100. 0: assignments
            stay, and values alone are trained, which is cheaper.
        entropy: What training adds to the loss for each bit that an entropy coder would spend; 1e-7 to 1e-5 is usual.
        temperature: Above 0, training mixes all values, nearer ones more (DKM); 0.1 to 2 is usual. Memory grows with
            weights times ``clusters``.

    Returns:
        A new model, not compiled, with the same names, inputs and outputs. `clusters_of` tells what each weight has.

    Raises:
        ConfigError: For a value out of range, a pattern that matches nothing, or more clusters than every weight has
            entries.
        UnsupportedModelError: For a subclassed model, or one without weights to cluster.

    Warns:
        UserWarning: With the names of weights that have fewer entries than ``clusters`` and are left as they are.

    Example:
        >>> import keras, numpy as np, dwindle as dw
        >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
        >>> shared = dw.cluster(model, clusters=4)
        >>> len(np.unique(dw.finalize(shared).layers[0].kernel.numpy()))
        4

    References:
        Han et al. 2016, Deep Compression, arXiv 1510.00149; Cho et al. 2022, DKM, arXiv 2108.12659.
    """
    init = check_init(init)
    tile = _tile(per_channel, block)
    _check(clusters, init, gradient, reassign, entropy, temperature)
    check_model(model)
    new: dict[tuple[str, str], list[Any]] = {}
    small = []
    for key, slot in _chosen(model, layers).items():
        shared = SharedValues(
            clusters=clusters, tile=tile, outputs=slot.channel_axes, gradient=gradient,
            reassign=_steps(reassign, slot.shape), entropy=entropy, temperature=temperature,
        )  # fmt: skip
        weight = _entering(model, *key)
        groups = shared.tables(weight.shape).groups(weight)
        fewest = min(len(points) for points in groups)
        if fewest < clusters:
            small.append(f"{'/'.join(key)} ({fewest})")
            continue
        held = [t for t in attached(model).get(key, ()) if t.kind in ZERO_KINDS]
        shared.zero = bool(held) or float((weight == 0).mean()) >= MANY_ZEROS
        shared.values = initial_values(groups, clusters, init, keep_zero=shared.zero)
        numbers = [nearest(points, row) for points, row in zip(groups, shared.values, strict=True)]
        shared.numbers = shared.tables(weight.shape).joined(numbers)
        new[key] = [shared]
    if small:
        said = f"`clusters` is {clusters}, more than the weights of a table in {', '.join(small)}"
        if not new:
            raise ConfigError(f"{said}; use fewer")
        warnings.warn(f"{said}; these stay as they are", stacklevel=2)
    return attach(model, new)


def held(weight: np.ndarray, outputs: Sequence[int], *, most: int = 0) -> SharedValues | None:
    """Return what keeps the weights of a clustered tensor together; None for a tensor that is not clustered.

    Args:
        weight: The values, of a whole tensor; folding a BatchNorm may have scaled each channel of it.
        outputs: Axes that count output channels.
        most: Values of a table that some layer is known to have; 0: none is known to be clustered.
    """

    def few(points: np.ndarray) -> int:
        # Chance does not make so few.
        return min(max(256, most), max(len(points) // 4, min(most, len(points) - 1)))

    for tile in ((0, 0), (0, 1)):
        shared = SharedValues(clusters=1, tile=tile, outputs=outputs)
        groups = shared.tables(weight.shape).groups(weight)
        if len(groups) > 1 and len(np.unique(groups[0])) > few(groups[0]):
            continue
        rows = [np.unique(points) for points in groups]
        if any(len(row) > few(points) for row, points in zip(rows, groups, strict=True)):
            continue
        clusters = max(len(row) for row in rows)
        if clusters < 2:
            return None
        zero = float((weight == 0).mean()) >= MANY_ZEROS
        values = np.stack([padded(row, clusters) for row in rows])
        numbers = [np.searchsorted(row, points) for points, row in zip(groups, rows, strict=True)]
        return SharedValues(
            clusters=clusters, tile=tile, outputs=outputs, values=values, zero=zero,
            numbers=shared.tables(weight.shape).joined(numbers),
        )  # fmt: skip
    return None


def _steps(reassign: int | None, shape: Sequence[int]) -> int:
    if reassign is not None:
        return reassign
    return _REASSIGN_SMALL if math.prod(shape) < COMPILED_FROM else _REASSIGN


def _tile(per_channel: bool, block: Any) -> tuple[int, int]:
    if block is None:
        return (0, 1) if per_channel else (0, 0)
    if per_channel:
        raise ConfigError("`per_channel` and `block` both say which weights share values; pass one of them")
    if (
        not isinstance(block, tuple | list)
        or len(block) != 2
        or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in block)
    ):
        raise ConfigError(f"`block` is {block!r}; it must be (rows, columns), such as (0, 8), with 0 for all of them")
    return (block[0], block[1])


def _check(clusters: Any, init: Any, gradient: str, reassign: Any, entropy: float, temperature: float) -> None:
    fewest = 1 if isinstance(init, np.ndarray) else 2
    if isinstance(clusters, bool) or not isinstance(clusters, int) or not fewest <= clusters <= 65536:
        raise ConfigError(f"`clusters` is {clusters!r}; it must be a whole number from {fewest} to 65536, such as 16")
    if isinstance(init, np.ndarray) and len(init) != clusters:
        raise ConfigError(f"`init` has {len(init)} values and `clusters` is {clusters}; pass clusters={len(init)}")
    check_choice("gradient", gradient, GRADIENTS)
    if reassign is not None and (isinstance(reassign, bool) or not isinstance(reassign, int) or reassign < 0):
        raise ConfigError(f"`reassign` is {reassign!r}; it must be a number of steps, such as 100, or 0 for never")
    for name, value, usual in (("entropy", entropy, 1e-6), ("temperature", temperature, 0.5)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ConfigError(f"`{name}` is {value!r}; it must be 0 or above, such as {usual}")
    if temperature > 0 and entropy > 0:
        raise ConfigError("`temperature` and `entropy` are both set; soft assignments have no bits, pass one of them")


def _chosen(model: keras.Model, layers: str | Sequence[str] | None) -> dict[tuple[str, str], Slot]:
    by_path = model_slots(model)
    picked = select(list(by_path), layers)
    tied = {key for key, transforms in attached(model).items() if any(t.kind == "tied" for t in transforms)}
    found = {(path, slot.key): slot for path in picked for slot in by_path[path] if (path, slot.key) not in tied}
    if not found:
        raise UnsupportedModelError(
            f"`model` ({model.name}) has no dense, convolution, recurrent or embedding weights to cluster"
        )
    return found


def _entering(model: keras.Model, path: str, key: str) -> np.ndarray:
    """Return a weight as it will enter the table: masked, and shared already if it is."""
    layer = dict(walk_layers(model))[path]
    stack = layer.__dict__.get("_dwindle_transforms", {}).get(key)
    if stack is None:
        return weight_value(model, path, key)
    if any(t.kind == "shared" for t in stack):
        return np.asarray(layer.effective_before(key, order=SharedValues.order + 1), np.float32)
    return np.asarray(layer.effective_before(key, order=SharedValues.order), np.float32)
