"""What a student is told by a teacher's outputs: one small class and one entry of a table an objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import keras

from dwindle.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What an objective compares, for one output.

    Attributes:
        student: Logits of the student, or its values in a regression, float32, shape ``(batch, ..., units)``.
        teacher: Those of the teacher.
        task: ``"classes"``, ``"binary"`` or ``"regression"``.
        temperature: ``T``.
        labels: Class numbers ``(batch, ...)`` or one-hot ``(batch, ..., units)``; None where there are none.
    """

    student: Any
    teacher: Any
    task: str
    temperature: Any
    labels: Any = None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A distance between a student and a teacher that training makes small.

    Attributes:
        weight: Factor of the distance, 0 or above.
    """

    kind: ClassVar[str]
    #: The meanings of outputs that it is for; empty for an objective that looks at layers.
    tasks: ClassVar[tuple[str, ...]] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not 0 <= value < float("inf"):
                raise ConfigError(f"`{name}` of {type(self).__name__} is {value!r}; it must be 0 or above")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which `resolve_objective` makes an equal object."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


class OutputObjective(Objective):
    """An objective that looks at outputs."""

    def distance(self, lesson: Lesson) -> Any:
        """Return the distance of each sample (and place), shape ``(batch, ...)``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SoftTargets(OutputObjective):
    """``T^2 KL(softmax(teacher / T), softmax(student / T))``.

    For yes-or-no units it is the mean over units of ``T^2 KL`` between the two Bernoulli distributions, and for
    quantities the mean squared difference, without a temperature.

    References:
        Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2.
    """

    kind: ClassVar[str] = "soft"
    tasks: ClassVar[tuple[str, ...]] = ("classes", "binary", "regression")

    def distance(self, lesson: Lesson) -> Any:
        """Return the divergence, times ``T^2``."""
        ops = keras.ops
        if lesson.task == "regression":
            return ops.mean((lesson.student - lesson.teacher) ** 2, axis=-1)
        theirs, ours = lesson.teacher / lesson.temperature, lesson.student / lesson.temperature
        if lesson.task == "classes":
            soft = ops.log_softmax(theirs)
            return lesson.temperature**2 * ops.sum(ops.exp(soft) * (soft - ops.log_softmax(ours)), axis=-1)
        yes = ops.sigmoid(theirs)
        # log sigmoid(z) = -softplus(-z)
        found = yes * (ops.softplus(-ours) - ops.softplus(-theirs))
        found = found + (1 - yes) * (ops.softplus(ours) - ops.softplus(theirs))
        return lesson.temperature**2 * ops.mean(found, axis=-1)


@dataclass(frozen=True, kw_only=True)
class LogitError(OutputObjective):
    """``mean((student - teacher)^2) / 2`` over logits less their mean, what `SoftTargets` tends to for high ``T``.

    ``T^2 KL`` becomes this for ``T`` towards infinity. The mean goes since softmax does not see it, and since it is not
    known where a model gives probabilities. Yes-or-no units and quantities are taken as they are.

    References:
        Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2.1; Kim et al. 2021, arXiv 2105.08919.
    """

    kind: ClassVar[str] = "logits"
    tasks: ClassVar[tuple[str, ...]] = ("classes", "binary", "regression")

    def distance(self, lesson: Lesson) -> Any:
        """Return half the mean squared difference."""
        ops = keras.ops
        difference = lesson.student - lesson.teacher
        if lesson.task == "classes":
            difference = difference - ops.mean(difference, axis=-1, keepdims=True)
        return ops.mean(difference**2, axis=-1) / 2


@dataclass(frozen=True, kw_only=True)
class Decoupled(OutputObjective):
    """``T^2 (target KL(b_t, b_s) + others KL(r_t, r_s))``: the divergence in two parts with weights of their own.

    ``b`` is (probability of the right class, of all others), ``r`` the probabilities of the others, made to sum to 1.
    `SoftTargets` is ``target = 1`` and ``others`` the probability that the teacher gives to wrong classes, which
    silences what a sure teacher knows about them. The right class is the label, or the teacher's first where there are
    none.

    Attributes:
        target: Weight of the first part, in the paper alpha.
        others: Weight of the second, in the paper beta: 8 there for CIFAR-100; more for a surer teacher.

    References:
        Zhao et al. 2022, Decoupled Knowledge Distillation, arXiv 2203.08679, equation 7.
    """

    kind: ClassVar[str] = "decoupled"
    tasks: ClassVar[tuple[str, ...]] = ("classes",)
    target: float = 1.0
    others: float = 8.0

    def distance(self, lesson: Lesson) -> Any:
        """Return the sum of both parts, times ``T^2``."""
        ops = keras.ops
        theirs, ours = lesson.teacher / lesson.temperature, lesson.student / lesson.temperature
        right = _one_hot(lesson)
        sides = [_target_and_rest(logits, right) for logits in (theirs, ours)]
        (yes_t, no_t), (yes_s, no_s) = sides
        target = ops.exp(yes_t) * (yes_t - yes_s) + ops.exp(no_t) * (no_t - no_s)
        rest_t, rest_s = (ops.log_softmax(logits - 1e9 * right) for logits in (theirs, ours))
        others = ops.sum((1 - right) * ops.exp(rest_t) * (rest_t - rest_s), axis=-1)
        return lesson.temperature**2 * (self.target * target + self.others * others)


def _target_and_rest(logits: Any, right: Any) -> tuple[Any, Any]:
    """Return the logarithms of the probability of the right class and of all others together."""
    ops = keras.ops
    soft = ops.log_softmax(logits)
    return ops.sum(soft * right, axis=-1), ops.logsumexp(soft - 1e9 * right, axis=-1)


def _one_hot(lesson: Lesson) -> Any:
    ops = keras.ops
    classes = lesson.teacher.shape[-1]
    labels = lesson.labels
    if labels is None:
        labels = ops.argmax(lesson.teacher, axis=-1)
    elif len(labels.shape) == len(lesson.teacher.shape):
        labels = ops.argmax(labels, axis=-1) if labels.shape[-1] == classes else ops.squeeze(labels, axis=-1)
    return ops.one_hot(ops.cast(labels, "int32"), classes, dtype="float32")


def check_tasks(objectives: Sequence[Objective], tasks: Sequence[str]) -> None:
    """Raise unless every objective is for what the outputs mean.

    Raises:
        ConfigError: With the objective and the meaning.
    """
    for one in objectives:
        for name in tasks:
            if one.tasks and name not in one.tasks:
                raise ConfigError(
                    f"`objective` {one.kind!r} is for {' and '.join(one.tasks)}, and an output is {name}; use `soft` "
                    "or `logits`, or say what the outputs mean with `task`"
                )


def _table() -> dict[str, type[Objective]]:
    from dwindle.distillation.features import AttentionMaps, Contrast, Hints, Relations

    kinds: list[type[Objective]] = [SoftTargets, LogitError, Decoupled, Hints, AttentionMaps, Relations, Contrast]
    return {kind.kind: kind for kind in kinds}


def resolve_objective(value: Any) -> Objective:
    """Return the objective that a name, a dict or an object stands for.

    Raises:
        ConfigError: If it is not known, or a setting is out of range.
    """
    if isinstance(value, Objective):
        return value
    config = dict(value) if isinstance(value, Mapping) else {"kind": value}
    kind, table = config.pop("kind", None), _table()
    if not isinstance(kind, str) or kind not in table:
        listed = ", ".join(f"`{name}`" for name in table)
        raise ConfigError(
            f"`objective` is {kind!r}; it must be one of {listed}, or an object{did_you_mean(kind, table)}"
        )
    known = {field.name for field in dataclasses.fields(table[kind])}
    for name in config:
        if name not in known:
            raise ConfigError(f"`{name}` is no setting of the objective `{kind}`{did_you_mean(name, known)}")
    return table[kind](**config)
