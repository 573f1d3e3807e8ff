"""Distillation in rounds: train the student with the teacher, measure, and again, until it is good enough."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.distillation import Recording, distill
from dwindle.distillation.teachers import Teacher, resolve_teacher
from dwindle.errors import ConfigError
from dwindle.files import write_text
from dwindle.measuring.accuracy import evaluate
from dwindle.training_rounds import (
    Requirement,
    check_settings,
    fit_arguments,
    fresh_settings,
    labelled_samples,
    measured,
    weights_hash,
)


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """One round: train a student, measure it.

    Attributes:
        student: Number of the student, from 0.
        number: Number of its round, from 1; 0 for training without the teacher.
        value: The metric on the validation data afterwards.
        met: Whether that is good enough.
        seconds: Time that it took.
    """

    student: int
    number: int
    value: float
    met: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What `distill_until` found.

    Attributes:
        model: The first student that is good enough, with the weights of its best round; the best of all where none is.
        student: Its number.
        value: Its metric.
        alone: What it reached without the teacher in one round; None unless asked for.
        teacher: The teacher's metric; None for recorded outputs, which are of other data.
        required: What the metric had to reach.
        met: Whether it did.
        rounds: All rounds, in order.
    """

    model: keras.Model
    student: int
    value: float
    alone: float | None
    teacher: float | None
    required: float
    met: bool
    rounds: tuple[Lessons, ...]


def distill_until(
    student: keras.Model | Sequence[keras.Model],
    teacher: Any,
    *,
    train: Any,
    validation: Any,
    compile: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    fit: Mapping[str, Any],
    max_drop: float | None = None,
    at_least: float | None = None,
    metric: Any = "accuracy",
    rounds: int = 3,
    alone: bool = False,
    folder: str | Path | None = None,
    progress: Callable[[str], None] | None = print,
    **distillation: Any,
) -> Distilled:
    """Distil in rounds until a student is good enough, and return it.

    Each round goes on from the student's weights with the settings given, its learning rate from the top again. A
    student that is not good enough after ``rounds`` rounds makes way for the next, so list them smallest first.

    Args:
        student: A built model, or several, such as ``[dw.shrink(model, width=w) for w in (0.25, 0.5)]``. They are
            trained in place.
        teacher: As in `dwindle.distill`.
        train: What ``model.fit`` takes: ``(x, y)``, ``(x,)`` without labels, a dataset; or `Data`, whose training
            samples are taken. For recorded outputs, the arrays that were recorded.
        validation: Samples with labels to measure on, in any form that `dwindle.read_data` takes.
        compile: Settings of ``model.compile``, or a function that returns them. An optimizer object is made anew from
            its config for every round.
        fit: Settings of ``model.fit``, such as ``dict(epochs=3, batch_size=128)``.
        max_drop: How much worse than the teacher's the metric may be, such as 0.01.
        at_least: What the metric has to reach (at most, where lower is better), instead of ``max_drop``.
        metric: As in `dwindle.measure`.
        rounds: Rounds of a student, 1 or more.
        alone: Whether each student is first trained for one round without the teacher, from the same start, to see
            what the teacher is worth. That training is thrown away.
        folder: Where every round is written. Called again with it after an interruption, with the same settings and
            students, the function goes on after the last finished round.
        progress: Called with a line of text after every round; None: nothing.
        **distillation: Further arguments of `dwindle.distill`: ``temperature``, ``alpha``, ``objective``, ...

    Returns:
        The student, and what every round measured.

    Raises:
        ConfigError: For settings out of range, ``max_drop`` with recorded outputs, or a folder of other rounds.

    References:
        Hinton, Vinyals and Dean 2015, arXiv 1503.02531.
    """
    students = _students(student)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ConfigError(f"`rounds` is {rounds!r}; it must be a whole number, 1 or more")
    requirement = Requirement(metric, max_drop, at_least)
    coaches = [distill(one, teacher, **distillation) for one in students]
    samples = labelled_samples(students[0], validation)
    baseline = _teacher_value(teacher, students[0], samples, metric)
    if baseline is None and at_least is None:
        raise ConfigError("`teacher` is a recording, which says nothing of the validation data; pass `at_least`")
    required = requirement.value(baseline)
    rounded = _Rounds(
        folder, students, {"required": required, "rounds": rounds, "alone": alone, "weights": _hashes(students)}
    )
    settled = fresh_settings(compile)

    def trained(learner: keras.Model, number: int, count: int) -> Lessons:
        begun = time.perf_counter()
        learner.compile(**settled())
        learner.fit(*fit_arguments(students[number], train), **{"verbose": 0, **fit})
        value = measured(students[number], samples, metric)
        one = Lessons(
            student=number, number=count, value=value, met=count > 0 and requirement.met(value, required),
            seconds=time.perf_counter() - begun,
        )  # fmt: skip
        if progress is not None:
            progress(_line(one, students[number].name, baseline, required))
        return one

    for number, coach in enumerate(coaches):
        if rounded.met():
            break
        if alone and not rounded.has(number, 0):
            start = students[number].get_weights()
            one = trained(students[number], number, 0)
            students[number].set_weights(start)
            rounded.add(one, better=False)
        for count in range(1, rounds + 1):
            if not rounded.met() and not rounded.has(number, count):
                one = trained(coach, number, count)
                rounded.add(one, better=_first_or_better(rounded.of(number), one, requirement))
    return rounded.result(baseline, required, requirement)


def _students(student: keras.Model | Sequence[keras.Model]) -> list[Any]:
    students: list[Any] = list(student) if isinstance(student, list | tuple) else [student]
    if not students:
        raise ConfigError("`student` is empty; pass a keras.Model, or several, smallest first")
    return students


def _first_or_better(before: Sequence[Lessons], one: Lessons, requirement: Requirement) -> bool:
    return not before or all(requirement.better(one.value, other.value) for other in before)


def _teacher_value(teacher: Any, student: keras.Model, samples: Any, metric: Any) -> float | None:
    """Return the metric of a teacher, or the best of several; None for a recording."""
    found = []
    for given in teacher if isinstance(teacher, list | tuple) else [teacher]:
        one: Teacher = resolve_teacher(given, student)
        if isinstance(one, Recording):
            return None
        outputs = one.run_all(samples.x[0] if len(samples.x) == 1 else list(samples.x))
        found.append(float(evaluate(outputs[0], np.asarray(samples.y), metric)))
    requirement = Requirement(metric, 0.0, None)
    best = found[0]
    for value in found[1:]:
        best = value if requirement.better(value, best) else best
    return best


def _hashes(students: Sequence[keras.Model]) -> str:
    return hashlib.sha256("".join(weights_hash(one) for one in students).encode()).hexdigest()[:16]


class _Rounds:
    """What was done so far, in memory and, where there is a folder, on disk.

    Each student has two files of weights: where it is, and where it was best.
    """

    def __init__(self, folder: str | Path | None, students: Sequence[keras.Model], settings: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.students = students
        self.settings = dict(settings)
        self.rounds: list[Lessons] = []
        self.best: dict[int, list[np.ndarray]] = {}
        path = None if self.folder is None else self.folder / "rounds.json"
        if self.folder is None or path is None or not path.exists():
            return
        content = json.loads(path.read_text(encoding="utf8"))
        check_settings(self.folder, content["settings"], self.settings)
        self.rounds = [Lessons(**one) for one in content["rounds"]]
        for number in sorted({one.student for one in self.rounds if one.number}):
            for kind in ("best", "last"):
                with np.load(self.folder / f"student-{number}-{kind}.npz", allow_pickle=False) as held:
                    weights = [held[f"{place}"] for place in range(len(held.files))]
                if kind == "best":
                    self.best[number] = weights
                else:
                    students[number].set_weights(weights)

    def has(self, student: int, number: int) -> bool:
        return any(one.student == student and one.number == number for one in self.rounds)

    def of(self, student: int) -> list[Lessons]:
        return [one for one in self.rounds if one.student == student and one.number]

    def met(self) -> bool:
        return any(one.met for one in self.rounds)

    def add(self, one: Lessons, *, better: bool) -> None:
        """Keep a round, and the student's weights."""
        weights = self.students[one.student].get_weights()
        if better:
            self.best[one.student] = weights
        self.rounds.append(one)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind in ("best", "last") if better else ("last",) if one.number else ():
            path = self.folder / f"student-{one.student}-{kind}.npz"
            np.savez(path.with_suffix(".part.npz"), **{f"{place}": value for place, value in enumerate(weights)})
            path.with_suffix(".part.npz").replace(path)
        content = {"settings": self.settings, "rounds": [asdict(each) for each in self.rounds]}
        write_text(self.folder / "rounds.json", json.dumps(content, indent=2))

    def result(self, teacher: float | None, required: float, requirement: Requirement) -> Distilled:
        """Return the first student that is good enough, or the best; its best weights are put back."""
        taught = [one for one in self.rounds if one.number]
        chosen = taught[0]
        for one in taught[1:]:
            if not chosen.met and (one.met or requirement.better(one.value, chosen.value)):
                chosen = one
        for number, weights in self.best.items():
            self.students[number].set_weights(weights)
        alone = next((one.value for one in self.rounds if one.student == chosen.student and not one.number), None)
        return Distilled(
            model=self.students[chosen.student], student=chosen.student, value=chosen.value, alone=alone,
            teacher=teacher, required=required, met=chosen.met, rounds=tuple(self.rounds),
        )  # fmt: skip


def _line(one: Lessons, name: str, teacher: float | None, required: float) -> str:
    who = "" if teacher is None else f"teacher {teacher:.4f}, "
    what = "without the teacher" if not one.number else f"round {one.number}"
    verdict = "" if not one.number else ": good enough" if one.met else ": not good enough"
    return f"{name}, {what}: {one.value:.4f} ({who}required {required:.4f}){verdict}, {one.seconds:.0f} s"
