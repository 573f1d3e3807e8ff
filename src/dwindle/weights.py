"""Transforms that hang on the weights of a Keras model.

A transform maps a layer's raw variable to the weight that the layer computes with::

    weight = transform_n(... transform_1(raw variable))

Masks, shared values and fake quantization are transforms. They hang on the weight, not around the layer: the
transformed model has the same layers, names, inputs and outputs, trains with plain ``fit`` or with a custom loop
(no callback), and saves and loads as ``.keras``. A layer that carries transforms is an instance of a subclass of its
own class, made on the fly (`dwindle.transformed_layers`), in which the weight's attribute (``kernel``,
``recurrent_kernel``, ...) is a property. `dwindle.attaching` puts such layers into a model.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np

from dwindle.errors import ConfigError, UnsupportedModelError, did_you_mean

# The kinds of transforms and where each lives; a new technique on weights adds one line.
TRANSFORM_KINDS: dict[str, str] = {
    "l1": "dwindle.pruning.regularization:L1Penalty",
    "keep_zeros": "dwindle.weights:KeepZeros",
    "mask": "dwindle.pruning.masks:Mask",
    "proximal_l1": "dwindle.pruning.regularization:ProximalL1",
    "shared": "dwindle.clustering.shared_values:SharedValues",
    "fake_quantize_bias": "dwindle.quantization.fake_quantization:FakeQuantizedBias",
    "fake_quantize": "dwindle.quantization.fake_quantization:FakeQuantizedWeight",
    "tied": "dwindle.lifting.shared_constants:TiedWeight",
}


def quotient(value: Any, divisor: float) -> Any:
    """Return ``value / divisor`` in float32, rounded as IEEE 754 says, which decides how values at ties round.

    TensorFlow's graph optimizers multiply with the rounded reciprocal of a constant instead; in 64 bits that comes out
    the same.
    """
    if keras.backend.backend() != "tensorflow":
        return value / divisor
    return keras.ops.cast(keras.ops.cast(value, "float64") / divisor, "float32")


class Transform:
    """One step on the way from a raw variable to the weight that the layer uses.

    Subclasses are small value objects: what they are told is in `get_config`, what they learn is in `state`
    variables that the layer owns, saves and loads.
    """

    kind: ClassVar[str]
    #: Where in the stack the transform stands: masks (10) before shared values (20) before quantization (30).
    order: ClassVar[int]
    #: Names of the state variables that gradients train.
    trained: tuple[str, ...] = ()
    #: Scale of the layer's input where the layer computes on integers outside training, as an 8-bit kernel does.
    counted: float | None = None

    def state(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the initial value of each state variable for a weight of this shape."""
        del shape
        return {}

    def prepare(self, raw: Any, state: Mapping[str, Any]) -> None:
        """Say what optimizers need to know of the raw variable or the state variables, once they are made."""
        del raw, state

    def beside(self, others: Sequence[Transform]) -> Transform:
        """Return the transform to use where ``others`` hang on the same weight."""
        del others
        return self

    def refit(self, weight: np.ndarray, state: Mapping[str, Any], others: Sequence[Transform]) -> None:
        """Bring the state up to date after another transform has changed what enters this one."""
        del weight, state, others

    def apply(self, weight: Any, state: Mapping[str, Any], layer: Any) -> Any:
        """Return the transformed weight (same shape and dtype); ``layer`` is the layer that carries it."""
        del state, layer
        return weight

    def update(self, weight: Any, state: Mapping[str, Any]) -> None:
        """Advance the state by one training step; ``weight`` is what enters this transform."""

    def penalty(self, weight: Any, state: Mapping[str, Any]) -> Any | None:
        """Return a scalar that training adds to the loss, or None."""
        del weight, state
        return None

    def counts(self, weight: Any, state: Mapping[str, Any], layer: Any) -> tuple[Any, Any] | None:
        """Return the weight in whole steps and the size of a step, for a layer that computes on integers; else None."""
        del weight, state, layer
        return None

    def get_config(self) -> dict[str, Any]:
        """Return plain data from which `from_config` makes an equal object."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Transform:
        """Make the transform from what `get_config` returned."""
        return cls(**config)

    def to_dict(self) -> dict[str, Any]:
        """Return the config with its kind."""
        return {"kind": self.kind, **self.get_config()}


class KeepZeros(Transform):
    """Hold the zeros that a weight has where they are, so that they survive further training.

    Args:
        mask: 0/1 array of the weight's shape; not part of the config but of the layer's variables.
    """

    kind: ClassVar[str] = "keep_zeros"
    order: ClassVar[int] = 5

    def __init__(self, *, mask: np.ndarray | None = None) -> None:
        self.mask = mask

    def state(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the mask."""
        return {"mask": np.ones(shape, np.float32) if self.mask is None else np.asarray(self.mask, np.float32)}

    def apply(self, weight: Any, state: Mapping[str, Any], layer: Any) -> Any:
        """Return the weight where the mask is 1, and 0 elsewhere."""
        del layer
        # Not a product: autograd would keep the mask itself, which a later call of a shared layer may change.
        return keras.ops.where(state["mask"] > 0.5, weight, keras.ops.zeros_like(weight))


def transform_from_dict(data: Mapping[str, Any]) -> Transform:
    """Make a transform from `Transform.to_dict`'s result.

    Raises:
        ConfigError: If the kind is not known.
    """
    config = dict(data)
    kind = config.pop("kind", None)
    if kind not in TRANSFORM_KINDS:
        raise ConfigError(
            f"`kind` of a weight transform is {kind!r}; known are {sorted(TRANSFORM_KINDS)}"
            f"{did_you_mean(kind, TRANSFORM_KINDS)}"
        )
    module, name = TRANSFORM_KINDS[kind].split(":")
    cls: type[Transform] = getattr(importlib.import_module(module), name)
    return cls.from_config(config)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A weight that can carry transforms.

    Attributes:
        layer: Name of the top-level layer in its model.
        path: Attribute path from that layer to the inner layer that owns the weight; empty for the layer itself.
        weight: Attribute name of the weight, such as ``kernel``.
        shape: Shape of the raw variable.
        channel_axes: Axes that count output channels, from the layer table.
        prunable: Whether pruning takes it when no layers are named.
    """

    layer: str
    path: tuple[str, ...]
    weight: str
    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    prunable: bool

    @property
    def key(self) -> str:
        """The slot's name inside its layer, such as ``cell/recurrent_kernel``."""
        return "/".join((*self.path, self.weight))


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """What one weight of a layer class means."""

    weight: str
    channel_axes: tuple[int, ...]
    prunable: bool = True


# Which weights the stock layers have. A custom layer subclassing one of these is covered as well.
LAYER_TABLE: dict[str, tuple[WeightSpec, ...]] = {
    "Dense": (WeightSpec(weight="kernel", channel_axes=(-1,)),),
    "EinsumDense": (WeightSpec(weight="kernel", channel_axes=(-1,)),),
    "Conv1D": (WeightSpec(weight="kernel", channel_axes=(-1,)),),
    "Conv2D": (WeightSpec(weight="kernel", channel_axes=(-1,)),),
    "Conv3D": (WeightSpec(weight="kernel", channel_axes=(-1,)),),
    "Conv1DTranspose": (WeightSpec(weight="kernel", channel_axes=(-2,)),),
    "Conv2DTranspose": (WeightSpec(weight="kernel", channel_axes=(-2,)),),
    "Conv3DTranspose": (WeightSpec(weight="kernel", channel_axes=(-2,)),),
    "DepthwiseConv1D": (WeightSpec(weight="kernel", channel_axes=(-2, -1), prunable=False),),
    "DepthwiseConv2D": (WeightSpec(weight="kernel", channel_axes=(-2, -1), prunable=False),),
    "SeparableConv1D": (
        WeightSpec(weight="depthwise_kernel", channel_axes=(-2, -1), prunable=False),
        WeightSpec(weight="pointwise_kernel", channel_axes=(-1,)),
    ),
    "SeparableConv2D": (
        WeightSpec(weight="depthwise_kernel", channel_axes=(-2, -1), prunable=False),
        WeightSpec(weight="pointwise_kernel", channel_axes=(-1,)),
    ),
    "Embedding": (WeightSpec(weight="embeddings", channel_axes=(-1,), prunable=False),),
    "LSTMCell": (
        WeightSpec(weight="kernel", channel_axes=(-1,)),
        WeightSpec(weight="recurrent_kernel", channel_axes=(-1,)),
    ),
    "GRUCell": (
        WeightSpec(weight="kernel", channel_axes=(-1,)),
        WeightSpec(weight="recurrent_kernel", channel_axes=(-1,)),
    ),
    "SimpleRNNCell": (
        WeightSpec(weight="kernel", channel_axes=(-1,)),
        WeightSpec(weight="recurrent_kernel", channel_axes=(-1,)),
    ),
}


def _specs(layer: Any) -> tuple[WeightSpec, ...]:
    for cls in type(layer).__mro__:
        if "weight_specs" in vars(cls):  # dwindle's own layers say it themselves
            found: tuple[WeightSpec, ...] = vars(cls)["weight_specs"]
            return found
        if cls.__module__.split(".")[0] == "keras" and cls.__name__ in LAYER_TABLE:
            return LAYER_TABLE[cls.__name__]
    return ()


def raw_variable(layer: Any, weight: str) -> Any | None:
    """Return the raw variable behind ``layer.<weight>``, or None if it has none of its own."""
    for name in (weight, f"_{weight}"):
        value = vars(layer).get(name)
        if isinstance(value, keras.Variable):
            return value
    return None


def _inner_layers(layer: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield ``(attribute path, inner layer)`` for the layers that ``layer`` holds as attributes, depth first."""
    seen = {id(layer)}

    def walk(owner: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, keras.layers.Layer) and id(value) not in seen:
                seen.add(id(value))
                yield (*path, name), value
                yield from walk(value, (*path, name))

    yield from walk(layer, ())


def layer_slots(layer: Any) -> list[Slot]:
    """List the weights of one built layer, and of the layers inside it, that can carry transforms."""
    found = []
    for path, owner in [((), layer), *_inner_layers(layer)]:
        if isinstance(owner, keras.Model):
            continue
        for spec in _specs(owner):
            raw = raw_variable(owner, spec.weight)
            if raw is not None:
                shape = tuple(int(size) for size in raw.shape)
                axes = tuple(sorted(axis % len(shape) for axis in spec.channel_axes)) if shape else ()
                found.append(
                    Slot(
                        layer=layer.name, path=path, weight=spec.weight, shape=shape, channel_axes=axes,
                        prunable=spec.prunable,
                    )
                )  # fmt: skip
    return found


def walk_layers(model: keras.Model, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, layer)`` for every layer that the model's config names, nested models opened.

    A layer of a nested model has the path ``nested/layer``. Shared layers are yielded once.
    """
    seen: set[int] = set()
    for layer in model.layers:
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        if isinstance(layer, keras.Model):
            yield from walk_layers(layer, f"{prefix}{layer.name}/")
        else:
            yield f"{prefix}{layer.name}", layer


@contextlib.contextmanager
def rebuilding(model: keras.Model) -> Iterator[None]:
    """A context in which a graph like the model's can be built from a config.

    Classes of its layers need no registration, and the graph may be as deep as it is: Keras walks it recursively.
    """
    layers = list(model._flatten_layers())
    unknown = [cls for cls in map(type, layers) if keras.saving.get_registered_name(cls) == cls.__name__]
    own = {cls.__name__: cls for cls in unknown if not cls.__module__.startswith(("keras.", "dwindle."))}
    with keras.saving.custom_object_scope(own), recursion_of(len(layers)):
        yield


@contextlib.contextmanager
def recursion_of(operations: int) -> Iterator[None]:
    """A context in which Keras can walk a chain of that many operations, two calls each, recursively."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 1000 + 4 * operations))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def copy_own_state(old: Any, new: Any) -> None:
    """Copy what a layer holds besides variables and derives as they are loaded: the statistics of ``Normalization``."""
    own = type(new).load_own_variables
    shapes = [[tuple(variable.shape) for variable in layer.variables] for layer in (old, new)]
    if type(old) is not type(new) or own is keras.Layer.load_own_variables or shapes[0] != shapes[1]:
        return
    store: dict[str, Any] = {}
    old.save_own_variables(store)
    # By way of NumPy: JAX's arrays would be shared, and training the one would take the other's away.
    new.load_own_variables({key: keras.ops.convert_to_numpy(value) for key, value in store.items()})


def model_slots(model: keras.Model) -> dict[str, list[Slot]]:
    """Map each layer path of the model to the weights there that can carry transforms."""
    return {path: slots for path, layer in walk_layers(model) if (slots := layer_slots(layer))}


def select(paths: Sequence[str], patterns: str | Sequence[str] | None, argument: str = "layers") -> list[str]:
    """Return the paths that match any of the shell-style patterns; all of them for None.

    Raises:
        ConfigError: If a pattern matches nothing.
    """
    if patterns is None:
        return list(paths)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {path for path in paths if fnmatch.fnmatchcase(path, pattern)}
        if not hits:
            raise ConfigError(
                f"`{argument}` has {pattern!r}, which matches none of the model's layers with weights: "
                f"{', '.join(paths)}{did_you_mean(pattern, paths)}"
            )
        chosen |= hits
    return [path for path in paths if path in chosen]


def check_model(model: Any) -> None:
    """Raise unless ``model`` is a built Keras model that can be rebuilt from its config.

    Raises:
        ConfigError: If it is no Keras model, or not built.
        UnsupportedModelError: If it is a subclassed model, whose graph its config does not hold.
    """
    if not isinstance(model, keras.Model):
        raise ConfigError(f"`model` is a {type(model).__name__}; it must be a keras.Model (dw.load makes one)")
    if not model.built:
        raise ConfigError(f"`model` ({model.name}) is not built: call it once on data, or model.build(input_shape)")
    if not is_graph(model):
        raise UnsupportedModelError(
            f"`model` ({model.name}) is a subclassed {type(model).__name__}, whose layers can't be replaced; "
            "pass dw.lift(model), the same computation as a functional model"
        )


def is_graph(model: keras.Model) -> bool:
    """Whether the model's config holds its whole graph (functional and sequential models)."""
    return "layers" in model.get_config() or hasattr(model, "float_file")
