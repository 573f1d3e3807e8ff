"""Layers that carry transforms: subclasses of the layer's own class, made on the fly."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.weights import Transform, raw_variable, transform_from_dict


class TransformedLayer:
    """Mixin of the classes made on the fly by `transformed_class`; never instantiated by itself."""

    _dwindle_transforms: dict[str, list[Transform]]
    _dwindle_calls: int

    def build(self, *args: Any, **kwargs: Any) -> None:
        """Build the layer, then create the state variables of its transforms."""
        super().build(*args, **kwargs)  # type: ignore[misc]
        states: dict[str, list[dict[str, Any]]] = {}
        for key, transforms in self._dwindle_transforms.items():
            owner, weight = resolve(self, key)
            raw = raw_variable(owner, weight)
            if raw is None:
                raise UnsupportedModelError(f"layer `{self.name}` has no weight `{key}`")  # type: ignore[attr-defined]
            shape = tuple(int(size) for size in raw.shape)
            states[key] = [self._make_state(key, transform, shape) for transform in transforms]
            for transform, state in zip(transforms, states[key], strict=True):
                transform.prepare(raw, state)
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
                trainable=name in transform.trained,
            )
        return variables

    def transforms(self, key: str) -> tuple[Transform, ...]:
        """Return the transforms of one weight, in the order in which they apply."""
        return tuple(self._dwindle_transforms[key])

    def transforms_and_states(self, key: str) -> tuple[tuple[Transform, dict[str, Any]], ...]:
        """Return the transforms of one weight with their variables, in the order in which they apply."""
        return tuple(zip(self._dwindle_transforms[key], self.__dict__["_dwindle_states"][key], strict=True))

    def effective_before(self, key: str, *, order: int) -> np.ndarray:
        """Return the weight after the transforms that come before ``order`` in the stack."""
        return np.asarray(keras.ops.convert_to_numpy(self.effective(key, order=order)))

    def effective(self, key: str, *, order: int | None = None) -> Any:
        """Return the weight after all its transforms, or after those below ``order``."""
        owner, weight = resolve(self, key)
        value = raw_variable(owner, weight)
        states = self.__dict__.get("_dwindle_states")
        if states is None or key not in states:
            return value
        value = keras.ops.convert_to_tensor(value)
        for transform, state in zip(self._dwindle_transforms[key], states[key], strict=True):
            if order is None or transform.order < order:
                counts = transform.counts(value, state, self) if order is None and self._dwindle_counting() else None
                value = transform.apply(value, state, self) if counts is None else counts[0]
        return value

    def counts_of(self, key: str) -> tuple[Any, Any] | None:
        """Return a weight in whole steps of the grid that it is rounded to, and the steps; None where there is none."""
        for transform, state in self.transforms_and_states(key):
            counts = transform.counts(self.effective(key, order=transform.order), state, self)
            if counts is not None:
                return counts
        return None

    def _dwindle_counting(self) -> bool:
        return bool(self.__dict__.get("_dwindle_counts", False))

    def _dwindle_on_integers(self, compute: Callable[[Any], Any], inputs: Any) -> Any | None:
        """Compute as the file's 8-bit kernel does, on whole steps, and scale what it sums; None where it does not.

        Float sums of scaled values err by more than the distance of two sums; sums of small integers are exact.
        """
        scales = [t.counted for t in self._dwindle_transforms.get("kernel", ()) if t.counted is not None]
        if not scales:
            return None
        counts, input_scale = self.counts_of("kernel"), scales[0]
        if counts is None:
            return None
        ops = keras.ops
        activation = vars(self)["activation"]
        self.__dict__.update(_dwindle_counts=True, activation=keras.activations.linear)
        try:
            total = compute(ops.round(inputs / input_scale))
        finally:
            self.__dict__.update(_dwindle_counts=False, activation=activation)
        return activation(total * (ops.reshape(counts[1], (-1,)) * input_scale))

    def _dwindle_step(self) -> None:
        """Advance every transform by one training step and add the penalties."""
        for key, transforms in self._dwindle_transforms.items():
            acting = [number for number, transform in enumerate(transforms) if _acts(type(transform))]
            if not acting:
                continue
            owner, weight = resolve(self, key)
            value = keras.ops.convert_to_tensor(raw_variable(owner, weight))
            for transform, state in self.transforms_and_states(key)[: acting[-1] + 1]:
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


def _acts(cls: type[Transform]) -> bool:
    """Whether a kind of transform does something in a training step besides being applied."""
    return cls.update is not Transform.update or cls.penalty is not Transform.penalty


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


def resolve(layer: Any, key: str) -> tuple[Any, str]:
    """Return the layer that owns the weight of a slot's key, and the weight's attribute name."""
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


@functools.cache
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
            self.__dict__["_dwindle_training"] = True
            try:
                self._dwindle_step()
                return base.call(self, *args, **kwargs)  # type: ignore[attr-defined]
            finally:
                self.__dict__["_dwindle_training"] = False
        if len(args) == 1 and not kwargs.keys() - {"training"}:
            found = self._dwindle_on_integers(lambda value: base.call(self, value, **kwargs), args[0])  # type: ignore[attr-defined]
            if found is not None:
                return found
        return base.call(self, *args, **kwargs)  # type: ignore[attr-defined]

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        TransformedLayer.build(self, *args, **kwargs)

    build.__signature__ = inspect.signature(base.build)  # type: ignore[attr-defined]
    members: dict[str, Any] = {"call": call, "build": build, "_dwindle_base": base, "__module__": __name__}
    for weight in weights:
        members[weight] = _weight_property(weight, base, functools.partial(_own_weight, key=weight))
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
        # Some layers take entries out of the config that they are made from.
        plain = keras.saving.deserialize_keras_object(copy.deepcopy(config["layer"]))
        transforms = {key: [transform_from_dict(t) for t in ts] for key, ts in config["transforms"].items()}
        own = tuple(sorted(key for key in transforms if "/" not in key))
        base: Any = type(plain)
        made = transformed_class(base, own)
        layer = super(TransformedLayer, made).from_config.__func__(made, config["layer"]["config"])  # type: ignore[misc]
        layer.__dict__["_dwindle_transforms"] = {
            key: sorted(ts, key=lambda t: t.order) for key, ts in transforms.items()
        }
        return layer


def _own_weight(layer: Any, key: str) -> Any:
    return layer.effective(key)


def _viewed_weight(layer: Any, key: str) -> Any:
    return vars(layer)["_dwindle_views"][key]()


@functools.cache
def _view_class(base: type, weights: tuple[str, ...]) -> type:
    """Return the subclass of an inner layer's class that shows transformed weights."""
    members: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    for weight in weights:
        members[weight] = _weight_property(weight, base, functools.partial(_viewed_weight, key=weight))
    return type(base.__name__, (base,), members)


def _view(inner: Any, weight: str, effective: Callable[[], Any]) -> None:
    """Make an inner layer, already built, use ``effective()`` as its weight."""
    views = vars(inner).setdefault("_dwindle_views", {})
    base = type(inner) if not views else type(inner).__mro__[1]
    views[weight] = effective
    inner.__class__ = _view_class(base, tuple(sorted(views)))
