"""Criteria: how much each weight matters. One class and one entry of `CRITERIA` each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import keras
import numpy as np

from dwindle.data import Data, Split, fit_to_model, read_data
from dwindle.errors import ConfigError, DataError, UnsupportedModelError, did_you_mean
from dwindle.pruning.loss_gradients import labelled_samples, loss_gradients, loss_of
from dwindle.pruning.regularization import L1Penalty, ProximalL1
from dwindle.transformed_layers import resolve
from dwindle.weights import Transform, raw_variable, walk_layers

Key = tuple[str, str]
Scores = dict[Key, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a criterion may look at.

    Attributes:
        model: Plain twin of the model, techniques baked in; criteria may run it but not change its weights.
        values: Weights to judge, by layer path and weight key.
        outputs: Axes of each weight that count outputs.
        data: What the user passed as ``data``; None if nothing.
        loss: What the user passed as ``loss``, else the compiled loss, else None.
    """

    model: keras.Model
    values: Mapping[Key, np.ndarray]
    outputs: Mapping[Key, tuple[int, ...]] = field(default_factory=dict)
    data: Any = None
    loss: Any = None

    def variable(self, key: Key) -> Any:
        """Return the plain twin's variable of a weight."""
        owner, weight = self.owner(key)
        return raw_variable(owner, weight)

    def owner(self, key: Key) -> tuple[Any, str]:
        """Return the layer that owns a weight, and the weight's name there."""
        return resolve(dict(walk_layers(self.model))[key[0]], key[1])

    def sum_over_batches(
        self, term: Callable[[np.ndarray, np.ndarray, int], np.ndarray], *, samples: int, batch: int, needed_by: str
    ) -> Scores:
        """Return ``sum over batches of term(weight, gradient of the mean loss, size of the batch)`` for each weight."""
        split = labelled_samples(self.model, self.data, samples, needed_by)
        loss = loss_of(self.model, split, self.loss)
        keys = list(self.values)
        variables = [self.variable(key) for key in keys]
        total = {key: np.zeros(value.shape) for key, value in self.values.items()}
        for begin in range(0, len(split), batch):
            part = split.pick(slice(begin, begin + batch))
            found = loss_gradients(self.model, part, loss, batch=batch, variables=variables)
            for key, gradient in zip(keys, found, strict=True):
                total[key] += term(self.values[key], gradient[0], len(part))
        return total


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """How weights are rated. Large scores stay, small ones go; no score is negative.

    ``rating`` says what masks follow in training: ``"magnitude"`` of the weights at each step, the scores ``"given"``
    at the start, or scores that training learns (``"movement"``).
    """

    rating: ClassVar[str] = "given"
    needs_schedule: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def scores(self, evidence: Evidence) -> Scores:
        """Return the score of each weight."""
        raise NotImplementedError

    def transforms(self) -> list[Transform]:
        """Return what hangs on each weight besides the mask while training."""
        return []


@dataclass(frozen=True, kw_only=True)
class Magnitude(Criterion):
    """``|w|``.

    References:
        Han et al. 2015, arXiv 1506.02626.
    """

    rating: ClassVar[str] = "magnitude"

    def scores(self, evidence: Evidence) -> Scores:
        """Return ``|w|``."""
        return {key: np.abs(value) for key, value in evidence.values.items()}


@dataclass(frozen=True, kw_only=True)
class L1(Magnitude):
    """``|w|``, with ``strength * sum(|w|)`` added to the training loss.

    Args:
        strength: Factor of the penalty.
    """

    strength: float = 1e-5

    def __post_init__(self) -> None:
        """Check the factor."""
        _check_above_zero("strength", self.strength)

    def transforms(self) -> list[Transform]:
        """Return the penalty."""
        return [L1Penalty(strength=self.strength)]


@dataclass(frozen=True, kw_only=True)
class Proximal(Magnitude):
    """``|w|``, with a soft threshold after each training step, which makes weights exactly zero by itself.

    Args:
        strength: What a step takes off each ``|w|``.
    """

    strength: float = 1e-5

    def __post_init__(self) -> None:
        """Check the factor."""
        _check_above_zero("strength", self.strength)

    def transforms(self) -> list[Transform]:
        """Return the proximal step."""
        return [ProximalL1(strength=self.strength)]


@dataclass(frozen=True, kw_only=True)
class Movement(Criterion):
    """Scores that start at 0 and are trained: ``dL/dS = dL/d(m w) w``; weights that grow stay. Needs a schedule.

    All scores are equal at first, so let the schedule begin after some steps. The optimizer trains them with its own
    learning rate. Removed weights may come back.

    References:
        Sanh et al. 2020, Movement Pruning, arXiv 2005.07683, section 3.
    """

    rating: ClassVar[str] = "movement"
    needs_schedule: ClassVar[bool] = True

    def scores(self, evidence: Evidence) -> Scores:
        """Return zeros."""
        return {key: np.zeros(value.shape) for key, value in evidence.values.items()}


@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """``sum over batches of |w dL/dw|``: what the loss changes by, to first order, when the weight goes.

    Args:
        samples: At most how many samples of ``data`` are used, spread over them.
        batch: Samples a gradient is the mean over.

    References:
        Molchanov et al. 2019, arXiv 1906.10771, equation 8, for single weights and with ``|.|`` for the square.
    """

    needs_data: ClassVar[bool] = True
    samples: int = 1024
    batch: int = 32

    def __post_init__(self) -> None:
        """Check the counts."""
        _check_counts(self)

    def scores(self, evidence: Evidence) -> Scores:
        """Return the sums."""
        return evidence.sum_over_batches(
            lambda weight, gradient, _: np.abs(weight * gradient),
            samples=self.samples, batch=self.batch, needed_by="criterion `taylor`",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fisher(Criterion):
    """``w^2 F / 2`` with the diagonal Fisher information ``F = mean over samples of (dL/dw)^2``.

    It is what the loss gains, to second order, when the weight goes, where the labels are those that the model finds
    likely (Optimal Brain Damage).

    Args:
        samples: At most how many samples of ``data`` are used, spread over them; each has a gradient of its own.

    References:
        LeCun et al. 1989, Optimal Brain Damage; Theis et al. 2018, arXiv 1801.05787, equation 7.
    """

    needs_data: ClassVar[bool] = True
    samples: int = 256

    def __post_init__(self) -> None:
        """Check the count."""
        _check_counts(self)

    def scores(self, evidence: Evidence) -> Scores:
        """Return ``w^2 F / 2``."""
        split = labelled_samples(evidence.model, evidence.data, self.samples, "criterion `fisher`")
        total = evidence.sum_over_batches(
            lambda weight, gradient, _: (weight * gradient) ** 2 / 2,
            samples=self.samples, batch=1, needed_by="criterion `fisher`",
        )  # fmt: skip
        return {key: value / len(split) for key, value in total.items()}


@dataclass(frozen=True, kw_only=True)
class Snip(Criterion):
    """``|w dL/dw|`` of the loss over all samples together; meant for a model that is not trained yet.

    Args:
        samples: At most how many samples of ``data`` are used, spread over them.
        batch: Samples a gradient is taken over at once; it only changes the memory that is needed.

    References:
        Lee et al. 2019, SNIP, arXiv 1810.02340, equation 6, without the constant factor.
    """

    needs_data: ClassVar[bool] = True
    samples: int = 1024
    batch: int = 128

    def __post_init__(self) -> None:
        """Check the counts."""
        _check_counts(self)

    def scores(self, evidence: Evidence) -> Scores:
        """Return the products."""
        total = evidence.sum_over_batches(
            lambda weight, gradient, size: weight * gradient * size,
            samples=self.samples, batch=self.batch, needed_by="criterion `snip`",
        )  # fmt: skip
        return {key: np.abs(value) for key, value in total.items()}


@dataclass(frozen=True, kw_only=True)
class Wanda(Criterion):
    """``|w_ij| ||x_i||``: the weight times the norm of the input that it multiplies, over unlabelled samples.

    ``||x_i||^2`` sums over samples and over the places where a kernel is applied, separately for each of its taps.

    Args:
        samples: At most how many samples of ``data`` are used, spread over them.
        batch: Samples that run at once.
        per_output: Whether each output loses the same share of its weights, as in the paper's language models. Its
            image classifiers are pruned per layer, as here without it.

    References:
        Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695,
        equation 1.
    """

    needs_data: ClassVar[bool] = True
    samples: int = 512
    batch: int = 64
    per_output: bool = False

    def __post_init__(self) -> None:
        """Check the counts."""
        _check_counts(self)

    def scores(self, evidence: Evidence) -> Scores:
        """Return the products."""
        squares = input_squares(evidence, self.samples, self.batch)
        found = {key: np.abs(value) * np.sqrt(squares[key]) for key, value in evidence.values.items()}
        return (
            {key: _places(value, evidence.outputs[key]) for key, value in found.items()} if self.per_output else found
        )


@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Uniform random numbers: what every other criterion has to beat.

    Args:
        seed: Seeds them.
    """

    seed: int = 0

    def scores(self, evidence: Evidence) -> Scores:
        """Return the numbers."""
        generator = np.random.default_rng(self.seed)
        return {key: generator.uniform(size=value.shape) for key, value in evidence.values.items()}


# Every criterion by its name; a new one is a class and a line here.
CRITERIA: dict[str, type[Criterion]] = {
    "magnitude": Magnitude,
    "l1": L1,
    "proximal": Proximal,
    "movement": Movement,
    "taylor": Taylor,
    "fisher": Fisher,
    "snip": Snip,
    "wanda": Wanda,
    "random": Random,
}


def criterion_of(value: Any) -> Criterion:
    """Return the criterion that a user's ``criterion`` names.

    Raises:
        ConfigError: If there is none of that name.
    """
    if isinstance(value, Criterion):
        return value
    if value not in CRITERIA:
        listed = ", ".join(f"`{name}`" for name in CRITERIA)
        raise ConfigError(f"`criterion` is {value!r}; it must be one of {listed}{did_you_mean(value, CRITERIA)}")
    return CRITERIA[value]()


def input_squares(evidence: Evidence, samples: int, batch: int) -> Scores:
    """Return ``sum x^2`` of what each weight multiplies, broadcast to the weight's shape.

    A layer that is linear in its kernel says so itself: the sum of its outputs for the inputs ``x^2`` has just this
    derivative by the kernel, whatever its strides, padding, dilation and groups.
    """
    split = _unlabelled(evidence.model, evidence.data, samples)
    owners = {key: evidence.owner(key)[0] for key in evidence.values}
    for key, owner in owners.items():
        if not isinstance(owner, _LINEAR):
            raise UnsupportedModelError(
                f"criterion `wanda` needs the inputs of each weight, and those of `{'/'.join(key)}` "
                f"({type(owner).__name__}) can't be seen; leave the layer out or take another criterion"
            )
    total = {key: np.zeros(value.shape) for key, value in evidence.values.items()}
    seen: dict[int, list[Any]] = {id(owner): [] for owner in owners.values()}
    with _Watching(list(owners.values()), seen):
        for begin in range(0, len(split), batch):
            part = split.pick(slice(begin, begin + batch))
            given = [keras.ops.convert_to_tensor(array) for array in part.x]
            structure = getattr(evidence.model, "input", None)
            structured = isinstance(structure, list | dict)
            evidence.model(keras.tree.pack_sequence_as(structure, given) if structured else given[0], training=False)
            for key, owner in owners.items():
                for inputs in seen[id(owner)]:
                    total[key] += _squares_by_tap(owner, inputs)
            for held in seen.values():
                held.clear()
    return total


_LINEAR = (
    keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D,
    keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D,
)  # fmt: skip


class _Watching:
    """Note the inputs of some layers while they run; they are the plain twin's, and are put back as they were."""

    def __init__(self, layers: list[Any], seen: dict[int, list[Any]]) -> None:
        self.layers = {id(layer): layer for layer in layers}
        self.seen = seen

    def __enter__(self) -> None:
        for number, layer in self.layers.items():
            layer.call = self._noting(layer.call, self.seen[number])

    def __exit__(self, *error: object) -> None:
        for layer in self.layers.values():
            del layer.call

    @staticmethod
    def _noting(call: Callable[..., Any], held: list[Any]) -> Callable[..., Any]:
        def noting(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            held.append(keras.ops.convert_to_numpy(inputs))
            return call(inputs, *args, **kwargs)

        return noting


def _linear_twin(owner: Any, inputs: np.ndarray) -> tuple[keras.Model, Any]:
    """Return a model of the layer alone, without its activation, and its kernel."""
    config = {**owner.get_config(), "activation": None, "use_bias": False}
    for name in [name for name in config if name.endswith(("_regularizer", "_constraint"))]:
        config[name] = None
    if isinstance(owner, keras.layers.EinsumDense):
        config.update(bias_axes=None)
        del config["use_bias"]
    layer = type(owner).from_config({**config, "name": "linear", "dtype": "float32"})
    entrance = keras.Input(inputs.shape[1:])
    return keras.Model(entrance, layer(entrance)), raw_variable(layer, "kernel")


def _squares_by_tap(owner: Any, inputs: np.ndarray) -> np.ndarray:
    model, kernel = _linear_twin(owner, inputs)
    split = Split(x=(np.asarray(inputs, np.float32) ** 2,), y=np.zeros(len(inputs), np.float32))
    found = loss_gradients(
        model, split, lambda _, outputs: keras.ops.sum(outputs), batch=len(inputs), variables=[kernel]
    )
    squares: np.ndarray = found[0][0]
    return squares


def _unlabelled(model: keras.Model, data: Any, samples: int) -> Split:
    if data is None:
        raise ConfigError("`data` is None, and criterion `wanda` needs samples, with or without labels")
    if isinstance(data, np.ndarray):
        data = {"x": data}
    elif isinstance(data, Split):
        data = Data(train=data, val=None, test=None, source="split", class_names=None, sha256="")
    found = fit_to_model(
        read_data(data), [tuple(t.shape[1:]) for t in model.inputs], None,
        input_dtypes=[keras.backend.standardize_dtype(t.dtype) for t in model.inputs],
    )  # fmt: skip
    split = found.train or found.val or found.test
    if split is None:
        raise DataError(f"data `{found.source}` has no samples")
    return split.take(samples)


def _places(scores: np.ndarray, outputs: tuple[int, ...]) -> np.ndarray:
    """Return each weight's place among its output's weights, and less than 1 more for a larger score."""
    order = (*(axis for axis in range(scores.ndim) if axis not in outputs), *outputs)
    moved = np.transpose(scores, order)
    matrix = moved.reshape(-1, int(np.prod([scores.shape[axis] for axis in outputs])))
    places = np.argsort(np.argsort(matrix, axis=0, kind="stable"), axis=0, kind="stable")
    rated = places + 0.5 * matrix / max(float(matrix.max()), 1e-30)
    return np.transpose(rated.reshape(moved.shape), np.argsort(order))


def _check_above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"`{name}` is {value!r}; it must be above 0, such as 1e-5")


def _check_counts(criterion: Any) -> None:
    for name in ("samples", "batch"):
        value = getattr(criterion, name, 1)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"`{name}` is {value!r}; it must be a whole number, 1 or more")
