"""What a student is told by the inside of a teacher: hints, attention maps, relations between samples, contrast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np

from dwindle.distillation.objectives import Objective
from dwindle.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class FeatureObjective(Objective):
    """An objective that looks at what layers give out.

    Attributes:
        student: Name of the student's layer, ``nested/layer`` in a nested model.
        teacher: Name of the teacher's layer; None: the same name.
    """

    student: str | None = None
    teacher: str | None = None

    @property
    def layers(self) -> tuple[str, str] | None:
        """Names of the student's and the teacher's layer; None where it looks at outputs."""
        return None if self.student is None else (self.student, self.teacher or self.student)

    def check(self, ours: Sequence[int | None], theirs: Sequence[int | None]) -> None:
        """Raise `ConfigError` if features of these shapes (batch axis included) can't be compared."""

    def projection(self, theirs: Sequence[int | None]) -> keras.layers.Layer | None:
        """Return an unbuilt layer that is learned along and brings the student's features to the teacher's size."""
        del theirs
        return None

    def distance(self, ours: Any, theirs: Any) -> Any:
        """Return the distance of each sample, shape ``(batch,)``; ``ours`` has gone through the projection."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Hints(FeatureObjective):
    """``mean((project(student) - teacher)^2) / 2`` over a layer's features.

    ``project`` is a learned linear map of the channels, a 1x1 convolution, which is thrown away afterwards. Where maps
    differ in height or width, the teacher's are resized to the student's.

    References:
        Romero et al. 2015, FitNets, arXiv 1412.6550, equation 3; there in a phase of its own, and with a convolution
        that also makes up for the size of the maps.
    """

    kind: ClassVar[str] = "hints"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student is None:
            raise ConfigError("`student` of Hints is None; name the student's layer whose features are compared")

    def check(self, ours: Sequence[int | None], theirs: Sequence[int | None]) -> None:
        """Raise if ranks differ, or sizes do along an axis that can't be resized."""
        fits = len(ours) == len(theirs) and (len(ours) == 4 or tuple(ours[1:-1]) == tuple(theirs[1:-1]))
        if not fits:
            raise ConfigError(
                f"`{self.student}` of the student gives {tuple(ours)} and `{self.layers and self.layers[1]}` of the "
                f"teacher gives {tuple(theirs)}; hints need the same axes, of which height and width may differ in size"
            )

    def projection(self, theirs: Sequence[int | None]) -> keras.layers.Layer:
        """Return a linear map to the teacher's channels."""
        return keras.layers.Dense(int(theirs[-1] or 0), dtype="float32", name="hint")

    def distance(self, ours: Any, theirs: Any) -> Any:
        """Return half the mean squared difference."""
        ops = keras.ops
        difference = ours - _resized(theirs, ours.shape)
        return ops.mean(difference**2, axis=tuple(range(1, len(ours.shape)))) / 2


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(FeatureObjective):
    """``sum((a_s / |a_s| - a_t / |a_t|)^2)`` with ``a`` the mean over channels of ``|feature|^power``: where they look.

    Needs no projection: channels are gone. Where maps differ in height or width, the teacher's is resized.

    Attributes:
        power: The exponent, 2 as in the paper's experiments.

    References:
        Zagoruyko and Komodakis 2017, arXiv 1612.03928, equation 2 with the squared norm, as in the authors' code.
    """

    kind: ClassVar[str] = "attention"
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student is None:
            raise ConfigError("`student` of AttentionMaps is None; name the student's layer whose maps are compared")

    def check(self, ours: Sequence[int | None], theirs: Sequence[int | None]) -> None:
        """Raise if there are no places to attend to."""
        same = len(ours) == 3 and tuple(ours[1:2]) == tuple(theirs[1:2])
        if len(ours) != len(theirs) or (len(ours) != 4 and not same):
            raise ConfigError(
                f"`{self.student}` of the student gives {tuple(ours)} and `{self.layers and self.layers[1]}` of the "
                f"teacher gives {tuple(theirs)}; attention maps need (batch, height, width, channels) of both, or "
                "(batch, steps, channels) with the same number of steps"
            )

    def distance(self, ours: Any, theirs: Any) -> Any:
        """Return the squared distance of the two maps, each of length 1."""
        ops = keras.ops
        maps = []
        for features in (ours, _resized(theirs, ours.shape)):
            found = ops.mean(ops.maximum(ops.abs(features), 1e-12) ** self.power, axis=-1)
            found = ops.reshape(
                found, (-1, int(found.shape[1]) * int(found.shape[2]) if len(found.shape) == 3 else int(found.shape[1]))
            )
            maps.append(found / ops.sqrt(ops.maximum(ops.sum(found**2, axis=1, keepdims=True), 1e-24)))
        return ops.sum((maps[0] - maps[1]) ** 2, axis=1)


@dataclass(frozen=True, kw_only=True)
class Relations(FeatureObjective):
    """How samples of a batch lie to each other: distances of pairs and angles of triplets, compared by Huber's loss.

    ``distances * mean_j h(d_ij / mean d) + angles * mean_jk h(cos of the angle at i between j and k)``. Sizes of the
    features may differ, so that a teacher with other classes can teach: without ``student`` the outputs are compared.
    Angles cost the batch size cubed.

    Attributes:
        distances: Weight of the pairs.
        angles: Weight of the triplets; the paper's ratio is 1 to 2.

    References:
        Park et al. 2019, Relational Knowledge Distillation, arXiv 1904.05068, equations 5 to 9.
    """

    kind: ClassVar[str] = "relations"
    distances: float = 1.0
    angles: float = 2.0

    def distance(self, ours: Any, theirs: Any) -> Any:
        """Return the share of each sample, at whose place the first of a pair and the corner of an angle stand."""
        ops = keras.ops
        flat = [ops.reshape(features, (ops.shape(features)[0], -1)) for features in (ours, theirs)]
        gaps = [features[None] - features[:, None] for features in flat]
        lengths = [ops.sqrt(ops.maximum(ops.sum(gap**2, axis=-1), 1e-12)) for gap in gaps]
        found: Any = 0.0
        if self.distances:
            scaled = []
            for length in lengths:
                other = ops.cast(length > 2e-6, "float32")
                scaled.append(other * length / (ops.sum(length * other) / ops.maximum(ops.sum(other), 1.0) + 1e-12))
            found = found + self.distances * ops.mean(_huber(scaled[0] - scaled[1]), axis=1)
        if self.angles:
            ways = [gap / ops.maximum(length, 1e-6)[..., None] for gap, length in zip(gaps, lengths, strict=True)]
            cosines = [ops.matmul(way, ops.transpose(way, (0, 2, 1))) for way in ways]
            found = found + self.angles * ops.mean(_huber(cosines[0] - cosines[1]), axis=(1, 2))
        return found


@dataclass(frozen=True, kw_only=True)
class Contrast(FeatureObjective):
    """``-log(exp(s_i . t_i / tau) / sum_j exp(s_i . t_j / tau))``: a sample is to be told from the rest of its batch.

    ``t`` is the teacher's features and ``s`` a learned linear map of the student's, both averaged over places and made
    length 1. Axes and sizes may differ. A batch of ``n`` that can't be told apart costs ``log n``.

    Attributes:
        tau: Temperature of the comparison, above 0.

    References:
        van den Oord et al. 2018, arXiv 1807.03748, equation 4, between a student and a teacher as in Tian et al. 2020,
        Contrastive Representation Distillation, arXiv 1910.10699; there with a memory of other samples, and a map of
        the teacher's features too.
    """

    kind: ClassVar[str] = "contrast"
    tau: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student is None:
            raise ConfigError("`student` of Contrast is None; name the student's layer whose features are compared")
        if self.tau == 0:
            raise ConfigError("`tau` of Contrast is 0; it must be above 0, such as 0.1")

    def projection(self, theirs: Sequence[int | None]) -> keras.layers.Layer:
        """Return a linear map to the teacher's channels."""
        return keras.layers.Dense(int(theirs[-1] or 0), dtype="float32", name="contrast")

    def distance(self, ours: Any, theirs: Any) -> Any:
        """Return the cross-entropy of finding the teacher's sample by the student's."""
        ops = keras.ops
        sides = []
        for features in (ours, theirs):
            pooled = (
                ops.mean(features, axis=tuple(range(1, len(features.shape) - 1))) if features.ndim > 2 else features
            )
            sides.append(pooled / ops.sqrt(ops.maximum(ops.sum(pooled**2, axis=1, keepdims=True), 1e-12)))
        alike = ops.matmul(sides[0], ops.transpose(sides[1])) / self.tau
        return ops.logsumexp(alike, axis=1) - ops.diagonal(alike)


def _huber(difference: Any) -> Any:
    ops = keras.ops
    size = ops.abs(difference)
    return ops.where(size < 1, difference**2 / 2, size - 0.5)


def _resized(maps: Any, shape: Sequence[int | None]) -> Any:
    """Return maps with the height and width of a shape."""
    if len(shape) != 4 or tuple(maps.shape[1:3]) == tuple(shape[1:3]):
        return maps
    return keras.ops.image.resize(maps, (int(shape[1] or 0), int(shape[2] or 0)), "bilinear", antialias=True)


def find_layer(model: keras.Model, path: str, argument: str) -> keras.layers.Layer:
    """Return a layer by its name, ``nested/layer`` inside of a nested model.

    Raises:
        ConfigError: If there is none, with the nearest name.
    """
    found: Any = model
    for name in path.split("/"):
        layers = {layer.name: layer for layer in getattr(found, "layers", ())}
        if name not in layers:
            raise ConfigError(
                f"`{argument}` names the layer {path!r}, which `{model.name}` does not have{did_you_mean(name, layers)}"
                f"; its layers are {', '.join(layers)}"
            )
        found = layers[name]
    return found


@contextmanager
def watched(layers: Mapping[str, keras.layers.Layer]) -> Iterator[dict[str, Any]]:
    """Give a dict that holds what each layer gave out in its last call inside the ``with``.

    Args:
        layers: The layers, by any key. They are as they were afterwards.
    """
    seen: dict[str, Any] = {}
    by_layer: dict[int, tuple[keras.layers.Layer, list[str]]] = {}
    for key, layer in layers.items():
        by_layer.setdefault(id(layer), (layer, []))[1].append(key)

    def watch(layer: keras.layers.Layer, keys: list[str]) -> None:
        call = layer.call

        def called(*args: Any, **kwargs: Any) -> Any:
            made = call(*args, **kwargs)
            for key in keys:
                seen[key] = keras.tree.flatten(made)[0]
            return made

        layer.call = called

    try:
        for layer, keys in by_layer.values():
            watch(layer, keys)
        yield seen
    finally:
        for layer, _ in by_layer.values():
            vars(layer).pop("call", None)


def zeros_for(model: keras.Model) -> Any:
    """Return two samples of zeros, as arrays in the form that a model takes; 8 where a size is free.

    Raises:
        ConfigError: If the model does not know its inputs.
    """
    if not getattr(model, "inputs", None):
        raise ConfigError(
            f"`{model.name}` does not know its inputs; make it a functional model, such as dw.lift(model)"
        )
    arrays = [
        np.zeros((2, *(size or 8 for size in tensor.shape[1:])), keras.backend.standardize_dtype(tensor.dtype))
        for tensor in model.inputs
    ]
    structure = getattr(model, "input", None)  # which a sequential model does not have
    if isinstance(structure, dict | list | tuple):
        return keras.tree.pack_sequence_as(structure, arrays)
    return arrays[0] if len(arrays) == 1 else arrays
