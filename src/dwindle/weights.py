"""Transforms that hang on the weights of a Keras model.

A transform maps a layer's raw variable to the weight that the layer computes with::

    weight = transform_n(... transform_1(raw variable))

Masks, shared values and fake quantization are transforms. They hang on the weight, not around the layer: the
transformed model has the same layers, names, inputs and outputs, trains with plain ``fit`` or with a custom loop
(no callback), and saves and loads as ``.keras``. A layer that carries transforms is an instance of a subclass of its
own class, made on the fly, in which the weight's attribute (``kernel``, ``recurrent_kernel``, ...) is a property.

The way in is the model's config: `attach` builds a new model from the config of the old one, in which the chosen
layers are replaced, and copies every variable. The model that came in is never changed.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np

from dwindle.errors import ConfigError, UnsupportedModelError, did_you_mean

# The kinds of transforms and where each lives; a new technique on weights adds one line.
TRANSFORM_KINDS: dict[str, str] = {
    "l1": "dwindle.pruning.regularization:L1Penalty",
    "keep_zeros": "dwindle.weights:KeepZeros",
    "mask": "dwindle.pruning.masks:MagnitudeMask",
    "fake_quantize_bias": "dwindle.quantization.fake_quantization:FakeQuantizedBias",
    "fake_quantize": "dwindle.quantization.fake_quantization:FakeQuantizedWeight",
}


class Transform:
    """One step on the way from a raw variable to the weight that the layer uses.

    Subclasses are small value objects: what they are told is in `get_config`, what they learn is in `state`
    variables that the layer owns, saves and loads.
    """

    kind: ClassVar[str]
    #: Where in the stack the transform stands: masks (10) before shared values (20) before quantization (30).
    order: ClassVar[int]

    def state(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the initial value of each state variable for a weight of this shape."""
        del shape
        return {}

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
        """Return ``weight * mask``."""
        del layer
        return weight * keras.ops.cast(state["mask"], weight.dtype)


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
        if cls.__module__.split(".")[0] == "keras" and cls.__name__ in LAYER_TABLE:
            return LAYER_TABLE[cls.__name__]
    return ()


def _raw(layer: Any, weight: str) -> Any | None:
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
            raw = _raw(owner, spec.weight)
            if raw is not None:
                shape = tuple(int(size) for size in raw.shape)
                axes = tuple(sorted(axis % len(shape) for axis in spec.channel_axes))
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


# --- layers that carry transforms ---------------------------------------------------------------------------------


class TransformedLayer:
    """Mixin of the classes made on the fly by `transformed_class`; never instantiated by itself."""

    _dwindle_transforms: dict[str, list[Transform]]
    _dwindle_calls: int

    def build(self, *args: Any, **kwargs: Any) -> None:
        """Build the layer, then create the state variables of its transforms."""
        super().build(*args, **kwargs)  # type: ignore[misc]
        states: dict[str, list[dict[str, Any]]] = {}
        for key, transforms in self._dwindle_transforms.items():
            owner, weight = _resolve(self, key)
            raw = _raw(owner, weight)
            if raw is None:
                raise UnsupportedModelError(f"layer `{self.name}` has no weight `{key}`")  # type: ignore[attr-defined]
            shape = tuple(int(size) for size in raw.shape)
            states[key] = [self._make_state(key, transform, shape) for transform in transforms]
            if owner is not self:
                _view(owner, weight, functools.partial(self.effective, key))
        self.__dict__["_dwindle_states"] = states

    def _make_state(self, key: str, transform: Transform, shape: tuple[int, ...]) -> dict[str, Any]:
        variables = {}
        for name, value in transform.state(shape).items():
            variables[name] = self.add_weight(  # type: ignore[attr-defined]
                name=f"{key.replace('/', '_')}_{transform.kind}_{name}",
                shape=value.shape,
                dtype=str(value.dtype),
                initializer=_Given(value),
                trainable=False,
            )
        return variables

    def transforms(self, key: str) -> tuple[Transform, ...]:
        """Return the transforms of one weight, in the order in which they apply."""
        return tuple(self._dwindle_transforms[key])

    def effective_before(self, key: str, *, order: int) -> np.ndarray:
        """Return the weight after the transforms that come before ``order`` in the stack."""
        return np.asarray(keras.ops.convert_to_numpy(self.effective(key, order=order)))

    def effective(self, key: str, *, order: int | None = None) -> Any:
        """Return the weight after all its transforms, or after those below ``order``."""
        owner, weight = _resolve(self, key)
        value = _raw(owner, weight)
        states = self.__dict__.get("_dwindle_states")
        if states is None or key not in states:
            return value
        value = keras.ops.convert_to_tensor(value)
        for transform, state in zip(self._dwindle_transforms[key], states[key], strict=True):
            if order is None or transform.order < order:
                value = transform.apply(value, state, self)
        return value

    def _dwindle_step(self) -> None:
        """Advance every transform by one training step and add the penalties."""
        for key, transforms in self._dwindle_transforms.items():
            owner, weight = _resolve(self, key)
            value = keras.ops.convert_to_tensor(_raw(owner, weight))
            for transform, state in zip(transforms, self.__dict__["_dwindle_states"][key], strict=True):
                transform.update(value, state)
                penalty = transform.penalty(value, state)
                if penalty is not None:
                    self.add_loss(penalty)  # type: ignore[attr-defined]
                value = transform.apply(value, state, self)

    def get_config(self) -> dict[str, Any]:
        """Return the config of the layer as it would be without transforms, and the transforms."""
        base = self._dwindle_base  # type: ignore[attr-defined]
        return {
            "name": self.name,  # type: ignore[attr-defined]
            "layer": {
                "module": _api_module(base),
                "class_name": base.__name__,
                "config": super().get_config(),  # type: ignore[misc]
                "registered_name": None if _is_stock(base) else keras.saving.get_registered_name(base),
            },
            "transforms": {key: [t.to_dict() for t in ts] for key, ts in self._dwindle_transforms.items()},
        }

    def save_own_variables(self, store: Any) -> None:
        """Save raw variables and transform states, in order."""
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Load what `save_own_variables` wrote."""
        keras.layers.Layer.load_own_variables(self, store)


def _api_module(cls: type) -> str:
    """Return the module that Keras writes for a class: the public one for its own layers."""
    return "keras.layers" if _is_stock(cls) else cls.__module__


def _is_stock(cls: type) -> bool:
    return cls.__module__.startswith("keras.")


class _Given(keras.initializers.Initializer):
    """Initializer that returns a given array."""

    def __init__(self, value: np.ndarray) -> None:
        self.value = value

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        del shape
        return keras.ops.convert_to_tensor(self.value, dtype=dtype)


def _resolve(layer: Any, key: str) -> tuple[Any, str]:
    *path, weight = key.split("/")
    for name in path:
        layer = vars(layer)[name]
    return layer, weight


def _weight_property(weight: str, base: type, effective: Callable[[Any], Any]) -> property:
    """Make the property that stands in for a weight's attribute."""
    inherited = inspect.getattr_static(base, weight, None)

    def getter(self: Any) -> Any:
        if not self.built and isinstance(inherited, property):
            return inherited.fget(self)  # type: ignore[misc]
        return effective(self)

    def setter(self: Any, value: Any) -> None:
        vars(self)[weight] = value  # Layer.__setattr__ has tracked the variable already

    return property(getter, setter)


@functools.lru_cache(maxsize=None)
def transformed_class(base: type, weights: tuple[str, ...]) -> type:
    """Return the subclass of a layer class in which ``weights`` are transformed.

    Args:
        base: A Keras layer class.
        weights: Attribute names of the layer's own weights that carry transforms.
    """
    signature = inspect.signature(base.call)  # type: ignore[attr-defined]
    takes_training = "training" in signature.parameters
    parameters = list(signature.parameters.values())
    if not takes_training:
        extra = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None)
        tail = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
        parameters = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD] + [extra, *tail]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        training = kwargs.get("training")
        if not takes_training:
            kwargs.pop("training", None)
        if training:
            self._dwindle_step()
        return base.call(self, *args, **kwargs)  # type: ignore[attr-defined]

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        TransformedLayer.build(self, *args, **kwargs)

    build.__signature__ = inspect.signature(base.build)  # type: ignore[attr-defined]
    members: dict[str, Any] = {"call": call, "build": build, "_dwindle_base": base, "__module__": __name__}
    for weight in weights:
        members[weight] = _weight_property(weight, base, lambda self, key=weight: self.effective(key))
    cls = type(base.__name__, (TransformedLayer, base), members)
    keras.saving.register_keras_serializable("dwindle", "Transformed")(cls)
    # The registry resolves the name for every such class to `Transformed`, whose from_config makes the right one.
    keras.saving.register_keras_serializable("dwindle", "Transformed")(Transformed)
    return cls


@keras.saving.register_keras_serializable("dwindle", "Transformed")
class Transformed:
    """What ``dwindle>Transformed`` in a saved config stands for; `from_config` returns the real layer."""

    def get_config(self) -> dict[str, Any]:
        """Never called; Keras asks registered classes to have it."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a layer of the class made on the fly, with its transforms, from `TransformedLayer.get_config`."""
        plain = keras.saving.deserialize_keras_object(config["layer"])
        transforms = {key: [transform_from_dict(t) for t in ts] for key, ts in config["transforms"].items()}
        own = tuple(sorted(key for key in transforms if "/" not in key))
        made = transformed_class(type(plain), own)
        layer = super(TransformedLayer, made).from_config.__func__(made, config["layer"]["config"])  # type: ignore[misc]
        layer.__dict__["_dwindle_transforms"] = {
            key: sorted(ts, key=lambda t: t.order) for key, ts in transforms.items()
        }
        return layer


@functools.lru_cache(maxsize=None)
def _view_class(base: type, weights: tuple[str, ...]) -> type:
    """Return the subclass of an inner layer's class that shows transformed weights."""
    members: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    for weight in weights:
        members[weight] = _weight_property(weight, base, lambda self, key=weight: vars(self)["_dwindle_views"][key]())
    return type(base.__name__, (base,), members)


def _view(inner: Any, weight: str, effective: Callable[[], Any]) -> None:
    """Make an inner layer, already built, use ``effective()`` as its weight."""
    views = vars(inner).setdefault("_dwindle_views", {})
    base = type(inner) if not views else type(inner).__mro__[1]
    views[weight] = effective
    inner.__class__ = _view_class(base, tuple(sorted(views)))


# --- rebuilding models ---------------------------------------------------------------------------------------------


def rebuild(
    model: keras.Model, edit: Callable[[str, dict[str, Any]], dict[str, Any]], *, copy_states: bool = True
) -> keras.Model:
    """Build a new model from the config of ``model``, with every layer's config passed through ``edit``.

    All raw variables are copied, and the states of transforms that are in both models.

    Args:
        model: A built functional or sequential model; it is not changed.
        edit: Called with a layer's path and serialized config; returns the config to use.
        copy_states: Whether states of transforms that both have are copied.

    Returns:
        A new model, not compiled.
    """
    check_model(model)

    def edit_config(config: dict[str, Any], prefix: str) -> dict[str, Any]:
        layers = []
        for entry in config["layers"]:
            inner = entry.get("config", {})
            if isinstance(inner, dict) and "layers" in inner:
                entry = {**entry, "config": edit_config(inner, f"{prefix}{inner['name']}/")}
            else:
                edited = edit(f"{prefix}{inner['name']}", entry)
                entry = {key: edited.get(key, entry.get(key)) for key in {**entry, **edited}}
            layers.append(entry)
        return {**config, "layers": layers}

    config = model.get_config()
    if "graph" in config:  # a lifted model keeps its functional config under this key
        config = {**config, "graph": edit_config(config["graph"], "")}
    else:
        config = edit_config(config, "")
    new = type(model).from_config(config)
    if not new.built:
        new.build(model.input_shape)
    copy_variables(model, new, copy_states=copy_states)
    if hasattr(model, "float_file"):
        new.float_file = model.float_file
    return new


def copy_variables(source: keras.Model, target: keras.Model, *, copy_states: bool = True) -> None:
    """Copy raw variables, and the states of transforms that both models have, from ``source`` to ``target``."""
    olds, news = dict(walk_layers(source)), dict(walk_layers(target))
    for path, new in news.items():
        old = olds[path]
        pairs = list(zip(_raw_variables(old), _raw_variables(new), strict=True))
        if copy_states:
            before, after = _states(old), _states(new)
            pairs += [(before[key], after[key]) for key in after if key in before]
        for from_variable, to_variable in pairs:
            to_variable.assign(from_variable)


def _states(layer: Any) -> dict[tuple[str, str, str], Any]:
    found = {}
    for key, states in layer.__dict__.get("_dwindle_states", {}).items():
        for transform, state in zip(layer.__dict__["_dwindle_transforms"][key], states, strict=True):
            for name, variable in state.items():
                found[key, transform.kind, name] = variable
    return found


def _raw_variables(layer: Any) -> list[Any]:
    own = {id(variable) for variable in _states(layer).values()}
    return [variable for variable in layer.weights if id(variable) not in own]


def attached(model: keras.Model) -> dict[tuple[str, str], list[Transform]]:
    """Map ``(layer path, weight key)`` to the transforms that hang there."""
    return {
        (path, key): list(transforms)
        for path, layer in walk_layers(model)
        for key, transforms in layer.__dict__.get("_dwindle_transforms", {}).items()
    }


def attach(model: keras.Model, new: Mapping[tuple[str, str], Sequence[Transform]]) -> keras.Model:
    """Return a twin of ``model`` whose named weights carry the given transforms as well.

    A transform replaces one of its own kind on the same weight; otherwise they stack in the order of
    `Transform.order`.

    Args:
        model: A built model; it is not changed.
        new: Maps ``(layer path, weight key)`` to the transforms to add.

    Returns:
        A new model with the same names, inputs, outputs and variables, not compiled.
    """
    wanted: dict[str, dict[str, list[Transform]]] = {}
    for (path, key), transforms in new.items():
        wanted.setdefault(path, {})[key] = list(transforms)
    present: dict[str, dict[str, list[Transform]]] = {}
    for (path, key), transforms in attached(model).items():
        present.setdefault(path, {})[key] = transforms

    def edit(path: str, entry: dict[str, Any]) -> dict[str, Any]:
        if path not in wanted:
            return entry
        merged = {key: list(transforms) for key, transforms in present.get(path, {}).items()}
        for key, transforms in wanted[path].items():
            kinds = {transform.kind for transform in transforms}
            kept = [transform for transform in merged.get(key, []) if transform.kind not in kinds]
            merged[key] = sorted([*kept, *transforms], key=lambda transform: transform.order)
        base = entry["config"]["layer"] if path in present else {
            key: entry.get(key) for key in ("module", "class_name", "config", "registered_name")
        }
        return _transformed_entry(base, merged)

    twin = rebuild(model, edit)
    layers = dict(walk_layers(twin))
    for (path, key), transforms in new.items():
        layer = layers[path]
        slot_states = layer.__dict__["_dwindle_states"][key]
        for transform, state in zip(layer.__dict__["_dwindle_transforms"][key], slot_states, strict=True):
            given = next((t for t in transforms if t.kind == transform.kind), None)
            if given is not None:
                shape = tuple(int(size) for size in _raw_of(layer, key).shape)
                for name, value in given.state(shape).items():
                    state[name].assign(value)
    return twin


def _raw_of(layer: Any, key: str) -> Any:
    owner, weight = _resolve(layer, key)
    return _raw(owner, weight)


def _transformed_entry(base: dict[str, Any], transforms: Mapping[str, Sequence[Transform]]) -> dict[str, Any]:
    return {
        "module": __name__,
        "class_name": base["class_name"],
        "registered_name": "dwindle>Transformed",
        "config": {
            "name": base["config"]["name"],
            "layer": base,
            "transforms": {key: [t.to_dict() for t in ts] for key, ts in transforms.items()},
        },
    }


def effective_weights(model: keras.Model) -> dict[tuple[str, str], np.ndarray]:
    """Map ``(layer path, weight key)`` to the transformed weight, for every weight with transforms."""
    return {
        (path, key): keras.ops.convert_to_numpy(layer.effective(key))
        for path, layer in walk_layers(model)
        for key in layer.__dict__.get("_dwindle_transforms", {})
    }


def weight_value(model: keras.Model, path: str, key: str) -> np.ndarray:
    """Return the weight that the layer computes with, transformed or not, as float32."""
    layer = dict(walk_layers(model))[path]
    if key in layer.__dict__.get("_dwindle_transforms", {}):
        value = layer.effective(key)
    else:
        value = _raw_of(layer, key)
    return np.asarray(keras.ops.convert_to_numpy(value), dtype=np.float32)


def strip(model: keras.Model) -> keras.Model:
    """Return a plain twin of ``model``: no transforms, their effect baked into the weights."""
    baked = effective_weights(model)
    touched = {path for path, _ in baked}
    twin = rebuild(
        model, lambda path, entry: entry["config"]["layer"] if path in touched else entry, copy_states=False
    )
    layers = dict(walk_layers(twin))
    for (path, key), value in baked.items():
        _raw_of(layers[path], key).assign(value)
    return twin
