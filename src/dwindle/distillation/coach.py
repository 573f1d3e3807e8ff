"""The model that trains a student: labels, what the teacher says, what its layers give out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from dwindle.distillation.annealing import Annealed, resolve_temperature
from dwindle.distillation.features import FeatureObjective, find_layer, watched, zeros_for
from dwindle.distillation.objectives import Lesson, Objective, OutputObjective, check_tasks, resolve_objective
from dwindle.distillation.outputs import logits, loss_of_each, task_of_loss
from dwindle.distillation.recording import Recording
from dwindle.distillation.teachers import Teacher, teacher_from_dict
from dwindle.errors import ConfigError, DataError
from dwindle.feeding import fed

_INPUTS, _TOLD = "dwindle_inputs", "dwindle_told"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared, and with which weights.

    Attributes:
        temperature: ``T``.
        label_weight: Factor of the compiled loss.
        teacher_weight: Factor of ``objectives``.
        objectives: What is made of the outputs.
        features: What is made of layers.
        tasks: What each output means.
        guessed: Whether that is a guess, which the loss that the coach is compiled with corrects.
        student_logits: Whether each output of the student is logits.
        teacher_logits: The same of each teacher.
        classes: The teacher's classes that are the student's, in the student's order; None: the same classes.
    """

    temperature: float | Annealed
    label_weight: float
    teacher_weight: float
    objectives: tuple[Objective, ...]
    features: tuple[FeatureObjective, ...] = ()
    tasks: tuple[str, ...]
    guessed: tuple[bool, ...] = ()
    student_logits: tuple[bool, ...]
    teacher_logits: tuple[tuple[bool, ...], ...]
    classes: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which `from_dict` makes an equal object."""
        return {
            **vars(self),
            "temperature": self.temperature.to_dict() if isinstance(self.temperature, Annealed) else self.temperature,
            "objectives": [one.to_dict() for one in self.objectives],
            "features": [one.to_dict() for one in self.features],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """Make the settings from `to_dict`'s result."""
        data = dict(data)
        for name in ("objectives", "features"):
            data[name] = tuple(resolve_objective(one) for one in data[name])
        data["temperature"] = resolve_temperature(data["temperature"])
        data["teacher_logits"] = tuple(tuple(one) for one in data["teacher_logits"])
        for name in ("tasks", "guessed", "student_logits", "classes"):
            data[name] = None if data.get(name) is None else tuple(data[name])
        return cls(**data)


class _Seen:
    """What the student's layers gave out in the step at hand; not for Keras to track."""

    features: Mapping[str, Any] | None = None


@keras.saving.register_keras_serializable("dwindle")
class Coach(keras.Model):
    """The model that `distill` returns; its prediction is the student's.

    Args:
        student: The model in training.
        teachers: Who it learns from; None for one that a file did not hold.
        settings: What is compared.
        **kwargs: Name and type, as of any Keras model.
    """

    def __init__(
        self, student: keras.Model, teachers: Sequence[Teacher | None], settings: Settings, **kwargs: Any
    ) -> None:
        # The student's type, so that `compile` scales the loss of a student in half precision.
        super().__init__(**{"dtype": student.dtype_policy, **kwargs, "autocast": False})
        self.student = student
        self.teacher_models = [one.model for one in teachers if one is not None and one.model is not None]
        self._teachers = tuple(teachers)
        self.settings = settings
        self._seen = _Seen()
        self._watched: dict[str, Any] = {}
        self.projections = self._projections()
        if any(one is not None and not one.traceable for one in teachers):
            self.supports_jit = False
        self.steps = self.add_weight(name="steps", shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.unusable = self.add_weight(name="unusable", shape=(), dtype="int32", initializer="zeros", trainable=False)
        if not self.built:
            self.build(None)

    def _projections(self) -> list[keras.layers.Layer]:
        """Return the learned map of each feature objective that has one, and note which layers are looked at."""
        found: list[keras.layers.Layer] = []
        self._projected: tuple[int | None, ...] = (None,) * len(self.settings.features)
        pairs = [one for one in self.settings.features if one.layers]
        if not pairs or not self.teacher_models:
            return found
        sides = []
        for side, (model, argument) in enumerate(((self.student, "student"), (self.teacher_models[0], "teacher"))):
            names = {one.layers[side] for one in pairs if one.layers}
            layers = {name: find_layer(model, name, f"features ({argument})") for name in names}
            with watched(layers) as seen:
                model(keras.tree.map_structure(keras.ops.convert_to_tensor, zeros_for(model)), training=False)
            sides.append({name: (None, *seen[name].shape[1:]) for name in names})
            self._watched[argument] = _Untracked(layers)
        numbers: list[int | None] = []
        for one in self.settings.features:
            layer = None
            if one.layers:
                ours, theirs = sides[0][one.layers[0]], sides[1][one.layers[1]]
                one.check(ours, theirs)
                layer = one.projection(theirs)
            numbers.append(None if layer is None else len(found))
            if layer is not None:
                layer.build(ours)
                found.append(layer)
        self._projected = tuple(numbers)
        return found

    def build(self, input_shape: Any) -> None:
        """Mark as built; the parts are."""
        del input_shape
        self.built = True

    @property
    def teacher(self) -> Any:
        """The teacher: the Keras model where it is one; of several, the first."""
        first = self._teachers[0]
        return first.model if first is not None and first.model is not None else first

    @property
    def teachers(self) -> tuple[Teacher | None, ...]:
        """All teachers."""
        return self._teachers

    @property
    def output_names(self) -> list[str]:
        """The student's, by which losses and metrics of several outputs are named."""
        return list(getattr(self.student, "output_names", None) or ["output"])

    @property
    def trainable_variables(self) -> list[Any]:
        """The student's and the projections'; the teacher does not learn."""
        projected = [variable for layer in self.projections for variable in layer.trainable_variables]
        return [*self.student.trainable_variables, *projected]

    @property
    def trainable_weights(self) -> list[Any]:
        """The student's and the projections'; the teacher does not learn."""
        return self.trainable_variables

    @property
    def non_trainable_variables(self) -> list[Any]:
        """All that no gradient changes, the teachers' variables included."""
        learned = [variable for model in self.teacher_models for variable in model.trainable_variables]
        return [*super().non_trainable_variables, *learned]

    @property
    def tasks(self) -> tuple[str, ...]:
        """What each output means; where nothing else says it, the compiled loss does.

        Raises:
            ConfigError: If an objective is not for that.
        """
        settings = self.settings
        if not any(settings.guessed):
            return settings.tasks
        losses = loss_of_each(getattr(self, "loss", None), self.output_names)
        if len(losses) != len(settings.tasks):
            return settings.tasks
        found = tuple(
            (task_of_loss(loss) or task) if guess else task
            for loss, task, guess in zip(losses, settings.tasks, settings.guessed, strict=True)
        )
        check_tasks(settings.objectives, found)
        return found

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the student's prediction."""
        x = _resized(self.student, _parts(inputs)[0])
        if not training or "student" not in self._watched:
            return self.student(x, training=training)
        with watched(self._watched["student"].layers) as seen:
            made = self.student(x, training=training)
        self._seen.features = seen
        return made

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Return the weighted sum of the label loss and the distances to the teachers."""
        labels = self._label_loss(x, y, y_pred, sample_weight, training)
        if not training:
            return labels
        settings, ops = self.settings, keras.ops
        total = settings.label_weight * labels
        if settings.teacher_weight == 0 and not settings.features:
            return total
        x, carried = _parts(x)
        temperature = settings.temperature
        if isinstance(temperature, Annealed):
            temperature = temperature.at(self.steps)
        self.steps.assign_add(1)
        for number, teacher in enumerate(self._teachers):
            told, features = self._told(number, teacher, x, carried)
            if settings.teacher_weight > 0:
                found = self._outputs_loss(number, told, y, y_pred, sample_weight, temperature)
                total = total + settings.teacher_weight / len(self._teachers) * found
            if settings.features:
                total = total + self._features_loss(told, features, y_pred, sample_weight)
        self._seen.features = None
        return ops.cast(total, "float32")

    def _label_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
        if y is not None and getattr(self, "loss", None) is not None:
            return super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        total = keras.ops.zeros((), "float32")  # no labels: what layers add, such as the penalty of a regularizer
        for one in self.losses:
            total = total + keras.ops.cast(one, "float32")
        return total

    def _told(self, number: int, teacher: Teacher | None, x: Any, carried: Any) -> tuple[list[Any], dict[str, Any]]:
        """Return a teacher's outputs, and what its watched layers gave out."""
        if teacher is None:
            raise ConfigError(
                "this coach was saved without its teacher, which was a function or a file that is gone or has changed: "
                "make a new one with dw.distill(coach.student, teacher, ...)"
            )
        ops = keras.ops
        if carried is not None and f"{number}" in carried:
            return [carried[f"{number}"][f"{place}"] for place in range(len(teacher.specs))], {}
        given = x if teacher.model is None else _resized(teacher.model, x)
        with watched(self._watched["teacher"].layers if "teacher" in self._watched else {}) as seen:
            told = teacher.tell(given)
        features = {name: ops.stop_gradient(value) for name, value in seen.items()}
        return [ops.stop_gradient(value) for value in told], features

    def _outputs_loss(
        self, number: int, told: list[Any], y: Any, y_pred: Any, sample_weight: Any, temperature: Any
    ) -> Any:
        settings, ops = self.settings, keras.ops
        total: Any = 0.0
        ours = keras.tree.flatten(y_pred)
        labels = [None] * len(ours) if y is None else keras.tree.flatten(y)
        weights = _for_each(sample_weight, len(ours))
        for place, (made, task) in enumerate(zip(ours, self.tasks, strict=True)):
            theirs = logits(told[place], task, settings.teacher_logits[number][place])
            if settings.classes is not None:
                theirs = ops.take(theirs, np.array(settings.classes), axis=-1)
            theirs, usable = self._usable(theirs)
            lesson = Lesson(
                student=logits(made, task, settings.student_logits[place]), teacher=theirs, task=task,
                temperature=temperature, labels=labels[place] if len(labels) == len(ours) else None,
            )  # fmt: skip
            for objective in settings.objectives:
                if isinstance(objective, OutputObjective):
                    distance = objective.distance(lesson)
                elif isinstance(objective, FeatureObjective):
                    distance = objective.distance(lesson.student, lesson.teacher)
                else:
                    raise TypeError(f"{type(objective).__name__} has no distance")
                total = total + objective.weight * _mean(distance, weights[place], usable)
        return total

    def _usable(self, theirs: Any) -> tuple[Any, Any]:
        """Return a teacher's values, 0 for samples with NaN or infinity, which are counted; and 1 for all others."""
        ops = keras.ops
        finite = ops.all(ops.isfinite(theirs), axis=tuple(range(1, len(theirs.shape))), keepdims=True)
        self.unusable.assign_add(ops.sum(1 - ops.cast(finite, "int32")))
        usable = ops.cast(ops.reshape(finite, (-1,)), "float32")
        return ops.where(finite, theirs, ops.zeros_like(theirs)), usable

    def _features_loss(self, told: list[Any], features: dict[str, Any], y_pred: Any, sample_weight: Any) -> Any:
        ops = keras.ops
        total: Any = 0.0
        seen = self._seen.features or {}
        weight = _for_each(sample_weight, 1)[0]
        for one, number in zip(self.settings.features, self._projected, strict=True):
            if one.layers:
                ours, theirs = seen[one.layers[0]], features[one.layers[1]]
            else:
                ours, theirs = keras.tree.flatten(y_pred)[0], told[0]
            theirs, usable = self._usable(ops.cast(theirs, "float32"))
            ours = ops.cast(ours, "float32")
            ours = ours if number is None else self.projections[number](ours)
            total = total + one.weight * _mean(one.distance(ours, theirs), weight, usable)
        return total

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Update and return the metrics; without labels, those that need none."""
        if y is None:
            return self.get_metrics_result()
        found: dict[str, Any] = super().compute_metrics(x, y, y_pred, sample_weight)
        return found

    def get_metrics_result(self) -> dict[str, Any]:
        """Return the metrics that have seen something."""
        found: dict[str, Any] = {}
        for metric in self.metrics:
            if getattr(metric, "built", True):
                result = metric.result()
                found.update(result if isinstance(result, dict) else {metric.name: result})
        return found

    def fit(
        self, x: Any = None, y: Any = None, batch_size: int | None = None, epochs: int = 1, verbose: Any = "auto",
        callbacks: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Train the student, as `keras.Model.fit`.

        With recorded outputs, ``x`` must be the arrays that were recorded. A file or a function is run once over ``x``
        where it is arrays, before training; with a data set, in every step.

        Raises:
            DataError: If the recorded outputs are of other data, or a teacher returns NaN or infinity.
        """
        x = self._prepared(x)
        if callbacks is None or isinstance(callbacks, list | tuple):
            callbacks = [*(callbacks or []), _Watch()]
        given = fed(x=x, y=y, batch_size=batch_size, epochs=epochs, verbose=verbose, callbacks=callbacks, **kwargs)
        return super().fit(**given)

    def _prepared(self, x: Any) -> Any:
        """Return the samples, with what teachers say of them that are recordings, files or functions."""
        arrays = all(isinstance(part, np.ndarray) for part in keras.tree.flatten(x))
        told: dict[str, dict[str, np.ndarray]] = {}
        for number, one in enumerate(self._teachers):
            if one is None or one.model is not None:
                continue
            if arrays:
                values = one.run(x) if isinstance(one, Recording) else one.run_all(x)
                told[str(number)] = {str(place): value for place, value in enumerate(values)}
            elif isinstance(one, Recording):
                raise DataError(
                    f"`x` is a {type(x).__name__}, and `teacher` is a recording, which goes with NumPy arrays; pass "
                    "the arrays that were recorded, or the teacher itself"
                )
        return {_INPUTS: x, _TOLD: told} if told else x

    def get_config(self) -> dict[str, Any]:
        """Return the models, where the other teachers are found, and the settings."""
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "student": serialize(self.student),
            "teacher_models": [serialize(model) for model in self.teacher_models],
            "teachers": [None if one is None else one.to_dict() for one in self._teachers],
            "settings": self.settings.to_dict(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Coach:
        """Make the coach from `get_config`."""
        config = dict(config)

        def made(data: Any) -> Any:
            return keras.saving.deserialize_keras_object(data, custom_objects=custom_objects)

        models = [made(data) for data in config.pop("teacher_models")]
        teachers = [teacher_from_dict(data, models) for data in config.pop("teachers")]
        settings = Settings.from_dict(config.pop("settings"))
        return cls(made(config.pop("student")), teachers, settings, **config)


class _Untracked:
    """Layers by name, which belong to the models."""

    __slots__ = ("layers",)

    def __init__(self, layers: Mapping[str, keras.layers.Layer]) -> None:
        self.layers = layers


class _Watch(keras.callbacks.Callback):
    """Stop with one sentence after an epoch in which a teacher returned NaN; those samples were left out."""

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Look at the count."""
        del logs
        count = int(self.model.unusable)
        if count:
            self.model.unusable.assign(0)
            raise DataError(
                f"`teacher` returned NaN or infinity for {count} samples of epoch {epoch + 1}, which were left out; "
                "look at the data and at the teacher's weights"
            )


def _parts(x: Any) -> tuple[Any, Any]:
    """Return the samples, and the recorded outputs that came with them."""
    if isinstance(x, Mapping) and _INPUTS in x:
        return x[_INPUTS], x[_TOLD]
    return x, None


def _resized(model: keras.Model, x: Any) -> Any:
    """Return images in the height and width that a model takes; anything else as it is."""
    inputs = getattr(model, "inputs", None) or []
    if len(inputs) != 1 or len(keras.tree.flatten(x)) != 1:
        return x
    wanted, image = inputs[0].shape, keras.tree.flatten(x)[0]
    if len(wanted) != 4 or len(image.shape) != 4 or None in tuple(wanted[1:3]):
        return x
    if tuple(image.shape[1:3]) == tuple(wanted[1:3]):
        return x
    return keras.ops.image.resize(
        keras.ops.cast(image, "float32"), (int(wanted[1]), int(wanted[2])), "bilinear", antialias=True
    )


def _for_each(sample_weight: Any, count: int) -> list[Any]:
    found = [] if sample_weight is None else keras.tree.flatten(sample_weight)
    return found if len(found) == count else (found[:1] or [None]) * count


def _mean(distance: Any, sample_weight: Any, usable: Any) -> Any:
    """Return the mean of distances ``(batch, ...)``, times weights of samples, or of samples and places."""
    ops = keras.ops

    def averaged(values: Any, rank: int) -> Any:
        axes = tuple(range(rank, len(values.shape)))
        return ops.mean(values, axis=axes) if axes else values

    if sample_weight is None:
        return ops.mean(averaged(distance, 1) * usable)
    weight = ops.cast(sample_weight, distance.dtype)
    if len(weight.shape) > len(distance.shape):
        weight = averaged(weight, len(distance.shape))
    return ops.mean(averaged(averaged(distance, len(weight.shape)) * weight, 1) * usable)
