"""`distill`: checks what a teacher and a student give, and makes the model that trains the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras

from dwindle.distillation.annealing import Annealed, resolve_temperature
from dwindle.distillation.coach import Coach, Settings
from dwindle.distillation.features import FeatureObjective, Hints
from dwindle.distillation.objectives import Objective, OutputObjective, check_tasks, resolve_objective
from dwindle.distillation.outputs import Output, outputs_of_model, task_of
from dwindle.distillation.teachers import Teacher, resolve_teacher
from dwindle.errors import ConfigError


def distill(
    student: keras.Model,
    teacher: Any,
    temperature: float | Annealed = 4.0,
    alpha: float = 0.5,
    features: Any = None,
    *,
    objective: Any = "soft",
    beta: float | None = None,
    task: str | None = None,
    from_logits: bool | None = None,
    classes: Sequence[int] | None = None,
) -> Coach:
    """Return a `keras.Model` that trains ``student`` on labels and on what ``teacher`` says.

    ``loss = (1 - alpha) * loss(y, student) + alpha * T^2 * KL(softmax(teacher / T), softmax(student / T))``, or with
    ``beta``: ``loss = loss(y, student) + beta * T^2 * KL(...)``. Compile it with the loss, optimizer and metrics
    that the student would have, fit it, and take ``.student``. The student is trained in place, as ``fit`` does; the
    teacher is not changed. Sample and class weights weigh both terms. Without labels, ``fit(x)``, the second term is
    all there is, and ``compile`` needs no loss.

    Args:
        student: The model to train, any Keras model; also a pruned one, or one in quantized training.
        teacher: Who it learns from: a Keras model; the path of anything that `dwindle.load` reads, or of a ``.tflite``
            file, which LiteRT runs; a function from a batch of arrays to an array; recorded outputs
            (`dwindle.distillation.record`) or their path; or a list of these, whose distances are averaged.
        temperature: ``T``, above 0. Higher shows more of what the teacher thinks of wrong classes. An `Annealed`
            changes it while training.
        alpha: Weight of the teacher, in [0, 1].
        features: Layers to compare as well: ``{"student's layer": "teacher's layer"}`` for `Hints`, or objectives
            such as ``AttentionMaps(student="a", teacher="b", weight=10.0)``, each times its own ``weight``.
        objective: What is made of the outputs: ``"soft"`` as above, ``"decoupled"``, ``"logits"``, ``"relations"``, an
            object with settings, or a list, whose sum takes the place of ``T^2 KL``; see `dwindle.distillation`. An
            empty list: only the features teach.
        beta: Weight of the teacher beside the full label loss, 0 or above; takes the place of ``alpha``.
        task: What the outputs mean: ``"classes"``, ``"binary"`` (each unit yes or no) or ``"regression"``. None: by the
            last activation, else the loss that a model or the coach is compiled with, else classes where a sample gives
            several units. Yes-or-no units and quantities are compared as `SoftTargets` says.
        from_logits: Whether all models give logits. None: found from their last activation; probabilities are
            turned back into logits, ``log p``, which differ from the true ones by a constant that softmax ignores.
        classes: Numbers of the teacher's classes that are the student's, where it knows more, in the student's order.

    Returns:
        A `Coach`: compile, fit, evaluate, save, ``.student``.

    Raises:
        ConfigError: If the outputs of student and teacher do not fit, a layer is not there, or a value is out of range.

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
    if not isinstance(student, keras.Model):
        raise ConfigError(f"`student` is a {type(student).__name__}; it must be a keras.Model (dw.load makes one)")
    if not student.built:
        raise ConfigError(f"`student` ({student.name}) is not built: call it once on data, or model.build(input_shape)")
    temperature = resolve_temperature(temperature)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ConfigError(f"`alpha` is {alpha!r}; it must lie in [0, 1]")
    if beta is not None and not 0 <= beta < float("inf"):
        raise ConfigError(f"`beta` is {beta!r}; it must be 0 or above")
    objectives, looked_at = _objectives(objective), _features(features)
    teachers = [resolve_teacher(one, student) for one in (teacher if isinstance(teacher, list | tuple) else [teacher])]
    _check_teachers(student, teachers, looked_at)
    ours = _known(student, teachers)
    pairs = _pairs(ours, teachers, objectives, classes)
    taken = [tuple(tensor.shape) for tensor in getattr(student, "inputs", None) or ()]
    for one in teachers:
        one.check_inputs(taken, "`student` takes", resized=True)
    losses = [getattr(model, "loss", None) for model in (student, *(one.model for one in teachers))]
    meant = [task_of(pair, losses if len(ours) == 1 else (), task) for pair in pairs]
    tasks = tuple(one for one, _ in meant)
    check_tasks(objectives, tasks)
    return Coach(
        student, teachers,
        Settings(
            temperature=temperature, label_weight=1.0 if beta is not None else 1.0 - alpha,
            teacher_weight=(beta if beta is not None else alpha) if objectives else 0.0, objectives=objectives,
            features=looked_at, tasks=tasks, guessed=tuple(not known for _, known in meant),
            classes=None if classes is None else tuple(int(one) for one in classes),
            student_logits=tuple(one.gives_logits if from_logits is None else from_logits for one in ours),
            teacher_logits=tuple(
                tuple(one.gives_logits if from_logits is None or one.recovered else from_logits for one in each.specs)
                for each in teachers
            ),
        ),
    )  # fmt: skip


def _objectives(value: Any) -> tuple[Objective, ...]:
    found = tuple(resolve_objective(one) for one in (value if isinstance(value, list | tuple) else [value]))
    for one in found:
        if isinstance(one, FeatureObjective) and one.layers:
            raise ConfigError(f"`objective` has {type(one).__name__} of a layer; pass it in `features`")
    return found


def _features(value: Any) -> tuple[FeatureObjective, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping) and "kind" not in value:
        return tuple(Hints(student=student, teacher=teacher) for student, teacher in value.items())
    found = []
    for one in value if isinstance(value, list | tuple) else [value]:
        made = Hints(student=one) if isinstance(one, str) else resolve_objective(one)
        if not isinstance(made, FeatureObjective):
            raise ConfigError(f"`features` has {type(made).__name__}, which looks at outputs; pass it in `objective`")
        found.append(made)
    return tuple(found)


def _check_teachers(student: keras.Model, teachers: Sequence[Teacher], features: Sequence[FeatureObjective]) -> None:
    if not teachers:
        raise ConfigError("`teacher` is an empty list; pass at least one")
    if any(one.model is student for one in teachers):
        raise ConfigError("`teacher` is the student itself; pass a copy of it, such as dw.finalize(student)")
    if features and len(teachers) > 1:
        raise ConfigError(f"`features` look at one teacher, and there are {len(teachers)}; pass one, or leave them out")
    if any(one.layers for one in features) and teachers[0].model is None:
        raise ConfigError(
            "`features` look at the teacher's layers, and it is no Keras model; pass dw.load(path), or leave them out"
        )


def _known(student: keras.Model, teachers: Sequence[Teacher]) -> list[Output]:
    """Return the student's outputs; what a subclassed model does not tell is taken to be as the others say."""
    ours = outputs_of_model(student)
    told = [ours, *(teacher.specs for teacher in teachers)]
    known = next((specs for specs in told if specs), [Output(shape=(None, None), activation="")])
    unknown = [replace(one, activation="", recovered=False) for one in known]
    for teacher in teachers:
        teacher.specs = teacher.specs or unknown
    return ours or unknown


def _pairs(
    ours: Sequence[Output], teachers: Sequence[Teacher], objectives: Sequence[Objective], classes: Sequence[int] | None
) -> list[list[Output]]:
    """Return each output of the student with those of the teachers.

    Raises:
        ConfigError: If they do not fit, and outputs are compared.
    """
    if not any(isinstance(one, OutputObjective) for one in objectives):
        return [[one, *(teacher.specs[min(place, len(teacher.specs) - 1)] for teacher in teachers)]
                for place, one in enumerate(ours)]  # fmt: skip
    for teacher in teachers:
        theirs = teacher.specs
        fit = len(ours) == len(theirs) and all(
            _fits(a.shape, b.shape, classes) for a, b in zip(ours, theirs, strict=True)
        )
        if not fit:
            given = [", ".join(str(one.shape) for one in side) or "nothing known" for side in (ours, theirs)]
            raise ConfigError(
                f"`student` gives {given[0]} and `teacher` gives {given[1]}; their outputs must have the same shapes, "
                "or `classes` must say which of the teacher's classes are the student's, or pass objective='relations'"
            )
    if classes is not None:
        _check_classes(classes, min(int(teacher.specs[0].shape[-1] or 0) for teacher in teachers))
    return [[one, *(teacher.specs[place] for teacher in teachers)] for place, one in enumerate(ours)]


def _fits(ours: Sequence[int | None], theirs: Sequence[int | None], classes: Sequence[int] | None) -> bool:
    if classes is not None:
        theirs = (*theirs[:-1], len(classes))
    return len(ours) == len(theirs) and all(None in (a, b) or a == b for a, b in zip(ours[1:], theirs[1:], strict=True))


def _check_classes(classes: Sequence[int], known: int) -> None:
    for one in classes:
        if not 0 <= one < known:
            raise ConfigError(f"`classes` has {one!r}, and the teacher has {known} classes, 0 to {known - 1}")
