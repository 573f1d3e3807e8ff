"""Knowledge distillation: a student learns from a teacher's softened outputs as well as from labels."""

from __future__ import annotations

from typing import Any

import keras

from dwindle.errors import ConfigError
from dwindle.graphs import graph_config, outputs, sources
from dwindle.weights import is_graph

__all__ = ["Coach", "distill"]

_LOOKED_THROUGH = ("FakeQuantize", "Reshape", "Flatten", "Dropout")


def distill(
    student: keras.Model,
    teacher: keras.Model,
    temperature: float = 4.0,
    alpha: float = 0.5,
    *,
    beta: float | None = None,
    from_logits: bool | None = None,
) -> Coach:
    """Return a `keras.Model` that trains ``student`` on labels and on what ``teacher`` says.

    ``loss = (1 - alpha) * loss(y, student) + alpha * T^2 * KL(softmax(teacher / T), softmax(student / T))``, or with
    ``beta``: ``loss = loss(y, student) + beta * T^2 * KL(...)``. Compile it with the loss, optimizer and metrics
    that the student would have, fit it, and take ``.student``. The student is trained in place, as ``fit`` does; the
    teacher is not changed.

    Args:
        student: The model to train; output shape ``(batch, classes)``.
        teacher: The model to learn from; the same output shape.
        temperature: ``T``, above 0. Higher shows more of what the teacher thinks of wrong classes.
        alpha: Weight of the teacher, in [0, 1].
        beta: Weight of the teacher beside the full label loss, 0 or above; takes the place of ``alpha``.
        from_logits: Whether both models give logits. None: found from their last activation; probabilities are
            turned back into logits, ``log p``, which differ from the true ones by a constant that softmax ignores.

    Returns:
        A `Coach`: compile, fit, evaluate, save, ``.student``.

    Raises:
        ConfigError: If the outputs of student and teacher do not fit, or a value is out of range.

    Example:
        >>> import keras, dwindle as dw
        >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(3)])
        >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> coach = dw.distill(student, teacher, temperature=4.0)
        >>> coach.student is student
        True

    References:
        Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, keras.Model):
            raise ConfigError(f"`{name}` is a {type(model).__name__}; it must be a keras.Model (dw.load makes one)")
    if not temperature > 0:
        raise ConfigError(f"`temperature` is {temperature!r}; it must be above 0, such as 4.0")
    if not 0 <= alpha <= 1:
        raise ConfigError(f"`alpha` is {alpha!r}; it must lie in [0, 1]")
    if beta is not None and not beta >= 0:
        raise ConfigError(f"`beta` is {beta!r}; it must be 0 or above")
    theirs, ours = _output_shape(teacher), _output_shape(student)
    if ours is None or theirs is None or len(ours) != 2 or ours[1:] != theirs[1:]:
        raise ConfigError(
            f"`student` gives {ours} and `teacher` gives {theirs}; both must have one output of the same shape "
            "(batch, classes)"
        )
    units = int(ours[-1] or 0)
    if units < 2:
        raise ConfigError(f"`student` has {units} output unit; soft targets need at least 2 classes")
    return Coach(
        student, teacher, temperature=temperature, label_weight=1.0 if beta is not None else 1.0 - alpha,
        teacher_weight=beta if beta is not None else alpha, student_logits=_gives_logits(student, from_logits),
        teacher_logits=_gives_logits(teacher, from_logits),
    )  # fmt: skip


def _output_shape(model: keras.Model) -> tuple[int | None, ...] | None:
    outputs = getattr(model, "outputs", None)
    return tuple(outputs[0].shape) if outputs and len(outputs) == 1 else None


def _gives_logits(model: keras.Model, from_logits: bool | None) -> bool:
    """Whether the model's output is logits: given, or found from the last activation."""
    if from_logits is not None:
        return from_logits
    return not ends_in(model, "softmax")


def ends_in(model: keras.Model, activation: str) -> bool:
    """Whether the layer that makes the model's first output ends in an activation of that name.

    Layers that keep a probability a probability (reshapes, dropout, fake quantization) are looked through. A subclassed
    model, whose graph is not known, counts as ending in nothing.
    """
    if not is_graph(model):
        return False
    config = graph_config(model.get_config())
    before, name = sources(config), outputs(config)[0]
    while type(model.get_layer(name)).__name__ in _LOOKED_THROUGH and before[name]:
        name = before[name][0]
    layer = model.get_layer(name)
    if isinstance(layer, keras.Model):
        return ends_in(layer, activation)
    function = getattr(layer, "activation", None)
    return activation in (getattr(function, "__name__", ""), type(layer).__name__.lower())


@keras.saving.register_keras_serializable("dwindle")
class Coach(keras.Model):
    """The model that `distill` returns; its prediction is the student's.

    Args:
        student: The model in training.
        teacher: The model that it learns from; frozen here.
        temperature: ``T``.
        label_weight: Factor of the compiled loss.
        teacher_weight: Factor of ``T^2 KL``.
        student_logits: Whether the student gives logits (else probabilities).
        teacher_logits: Whether the teacher does.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model,
        *,
        temperature: float,
        label_weight: float,
        teacher_weight: float,
        student_logits: bool,
        teacher_logits: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.student = student
        self.teacher = teacher
        self.temperature = temperature
        self.label_weight = label_weight
        self.teacher_weight = teacher_weight
        self.student_logits = student_logits
        self.teacher_logits = teacher_logits
        if not self.built:
            self.build(student.input_shape)

    def build(self, input_shape: Any) -> None:
        """Mark as built; the parts are."""
        del input_shape
        self.built = True

    @property
    def trainable_variables(self) -> list[Any]:
        """The student's; the teacher does not learn."""
        return list(self.student.trainable_variables)

    @property
    def trainable_weights(self) -> list[Any]:
        """The student's; the teacher does not learn."""
        return list(self.student.trainable_weights)

    @property
    def non_trainable_variables(self) -> list[Any]:
        """All that no gradient changes, the teacher's variables included."""
        return [*super().non_trainable_variables, *self.teacher.trainable_variables]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the student's prediction."""
        return self.student(inputs, training=training)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Return the weighted sum of the label loss and the distance to the teacher's soft targets."""
        labels = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        if not training or self.teacher_weight == 0:
            return labels
        ops = keras.ops
        said = ops.stop_gradient(self.teacher(x, training=False))
        soft = ops.log_softmax(self._logits(said, self.teacher_logits) / self.temperature)
        ours = ops.log_softmax(self._logits(y_pred, self.student_logits) / self.temperature)
        distance = ops.sum(ops.exp(soft) * (soft - ours), axis=-1)
        if sample_weight is not None:
            weight = ops.cast(ops.reshape(sample_weight, (-1,)), distance.dtype)
            distance = distance * weight
        return self.label_weight * labels + self.teacher_weight * self.temperature**2 * ops.mean(distance)

    @staticmethod
    def _logits(outputs: Any, are_logits: bool) -> Any:
        outputs = keras.ops.cast(outputs, "float32")
        return outputs if are_logits else keras.ops.log(keras.ops.maximum(outputs, 1e-7))

    def get_config(self) -> dict[str, Any]:
        """Return both models and the weights."""
        return {
            **super().get_config(),
            "student": keras.saving.serialize_keras_object(self.student),
            "teacher": keras.saving.serialize_keras_object(self.teacher),
            "temperature": self.temperature,
            "label_weight": self.label_weight,
            "teacher_weight": self.teacher_weight,
            "student_logits": self.student_logits,
            "teacher_logits": self.teacher_logits,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Coach:
        """Make the coach from `get_config`."""
        config = dict(config)
        models = {
            name: keras.saving.deserialize_keras_object(config.pop(name), custom_objects=custom_objects)
            for name in ("student", "teacher")
        }
        return cls(models["student"], models["teacher"], **config)
