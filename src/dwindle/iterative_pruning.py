"""Iterative pruning: prune a little, train, measure, and again, for as long as the model is good enough."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras

from dwindle.attaching import attach, attached, effective_weights
from dwindle.errors import ConfigError
from dwindle.feeding import fed
from dwindle.files import write_text
from dwindle.loading import load
from dwindle.pruning.single_weights import prune_weights
from dwindle.pruning.structures import Pattern, structure_of
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
class Round:
    """One round: prune, train, measure.

    Attributes:
        sparsity: Fraction of zeros that the round asked for.
        value: The metric on the validation data after training.
        met: Whether that is good enough.
        seconds: Time that it took.
    """

    sparsity: float
    value: float
    met: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What `prune_until` found.

    Attributes:
        model: The sparsest model that is good enough: with masks, trained, not compiled. The model that came in, as a
            copy, where no round was.
        sparsity: Its fraction of zeros in the pruned weights.
        value: Its metric.
        baseline: The metric of the model that came in.
        required: What the metric had to reach.
        met: Whether any round reached it.
        rounds: All rounds, in order.
    """

    model: keras.Model
    sparsity: float
    value: float
    baseline: float
    required: float
    met: bool
    rounds: tuple[Round, ...]


def prune_until(
    model: keras.Model,
    *,
    train: Any,
    validation: Any,
    compile: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    fit: Mapping[str, Any],
    max_drop: float | None = None,
    at_least: float | None = None,
    metric: Any = "accuracy",
    start: float = 0.5,
    step: float = 0.3,
    stop: float = 0.99,
    refinements: int = 2,
    folder: str | Path | None = None,
    progress: Callable[[str], None] | None = print,
    **pruning: Any,
) -> Pruned:
    """Return the sparsest model that pruning and training in turns finds good enough.

    The first round prunes to ``start``, each further one removes the fraction ``step`` of the weights that are left:
    ``s <- 1 - (1 - s)(1 - step)``. Each begins from the model of the last round that was good enough, and trains it
    with the settings given. Where a round is not good enough it is dropped, and the next tries the sparsity half-way
    back (in the logarithm of what is kept), ``refinements`` times in all.

    Args:
        model: A built, trained model; it is not changed.
        train: What ``model.fit`` takes: ``(x, y)``, a dataset; or `Data`, whose training samples are taken.
        validation: Samples to measure on, in any form that `dwindle.read_data` takes.
        compile: Settings of ``model.compile``, or a function that returns them. An optimizer object is made anew from
            its config for every round.
        fit: Settings of ``model.fit``, such as ``dict(epochs=3, batch_size=128)``.
        max_drop: How much worse than the given model the metric may be, such as 0.01.
        at_least: What the metric has to reach (at most, where lower is better), instead of ``max_drop``.
        metric: As in `dwindle.measure`.
        start: Sparsity of the first round, in (0, 1).
        step: Fraction of the remaining weights that each further round removes, in (0, 1).
        stop: Sparsity that is not passed, in (0, 1).
        refinements: Rounds spent on going back.
        folder: Where every round is written. Called again with it after an interruption, with the same settings, the
            function goes on after the last finished round.
        progress: Called with a line of text after every round; None: nothing.
        **pruning: Further arguments of `dwindle.prune`: ``structure``, ``criterion``, ``scope``, ``layers``, ``l1``,
            ``data``, ``loss``, ``schedule``.

    Returns:
        The model, and what every round measured.

    Raises:
        ConfigError: For settings out of range, or a folder with the rounds of other settings.

    References:
        Han et al. 2015, Learning both Weights and Connections, arXiv 1506.02626, section 3.
    """
    settings = _Settings(start=start, step=step, stop=stop, refinements=refinements)
    structure = pruning.get("structure", "element")
    if structure in ("channel", "depth") or isinstance(structure_of(structure), Pattern):
        raise ConfigError(f"`structure` is {structure!r}; pruning in rounds takes `element` and blocks (rows, columns)")
    requirement = Requirement(metric, max_drop, at_least)
    samples = labelled_samples(model, validation)
    baseline = measured(model, samples, metric)
    required = requirement.value(baseline)
    fingerprint = {**asdict(settings), "required": required, "weights": weights_hash(model)}
    store = _Store(
        folder, fingerprint | {name: str(pruning[name]) for name in ("structure", "scope") if name in pruning}
    )
    best, rounds = store.load(model)
    settled = fresh_settings(compile)

    while (sparsity := settings.next(rounds)) is not None:
        begun = time.perf_counter()
        tried = prune_weights(best, sparsity, **pruning)
        tried.compile(**settled())
        named = dict(zip(("x", "y", "sample_weight"), fit_arguments(model, train), strict=False))
        tried.fit(**fed(**{"verbose": 0, **named, **fit}))
        value = measured(tried, samples, metric)
        met = requirement.met(value, required)
        rounds.append(Round(sparsity=sparsity, value=value, met=met, seconds=time.perf_counter() - begun))
        if met:
            best = tried
        store.save(best if met else None, rounds)
        if progress is not None:
            progress(_line(len(rounds), rounds[-1], baseline, required))
    good = [one for one in rounds if one.met]
    return Pruned(
        model=best if good else attach(model, {}),
        sparsity=_zeros(best) if good else _zeros(model),
        value=good[-1].value if good else baseline,
        baseline=baseline,
        required=required,
        met=bool(good),
        rounds=tuple(rounds),
    )


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Which sparsities are tried."""

    start: float
    step: float
    stop: float
    refinements: int

    def __post_init__(self) -> None:
        for name in ("start", "step", "stop"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < 1:
                raise ConfigError(f"`{name}` is {value!r}; it must be a fraction in (0, 1), such as 0.5")
        if self.start > self.stop:
            raise ConfigError(
                f"`start` is {self.start} and `stop` is {self.stop}; the first must not be above the second"
            )
        if not isinstance(self.refinements, int) or self.refinements < 0:
            raise ConfigError(f"`refinements` is {self.refinements!r}; it must be a whole number, 0 or more")

    def next(self, rounds: list[Round]) -> float | None:
        """Return the sparsity of the next round; None where there is none."""
        if not rounds:
            return self.start
        good = min([1 - one.sparsity for one in rounds if one.met], default=1.0)
        bad = max([1 - one.sparsity for one in rounds if not one.met], default=0.0)
        if bad == 0:
            return None if 1 - good >= self.stop else min(self.stop, 1 - good * (1 - self.step))
        first_bad = next(number for number, one in enumerate(rounds) if not one.met)
        return None if len(rounds) - first_bad - 1 >= self.refinements else 1 - math.sqrt(good * bad)


class _Store:
    """The folder that rounds are written to, so that an interrupted search goes on; nothing without a folder."""

    def __init__(self, folder: str | Path | None, fingerprint: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.fingerprint = dict(fingerprint)
        self.best: str | None = None

    def load(self, model: keras.Model) -> tuple[keras.Model, list[Round]]:
        """Return the model to go on from, and the rounds so far."""
        if self.folder is None or not (self.folder / "rounds.json").exists():
            return model, []
        found = json.loads((self.folder / "rounds.json").read_text(encoding="utf8"))
        check_settings(self.folder, found["settings"], self.fingerprint)
        self.best = found["best"]
        rounds = [Round(**one) for one in found["rounds"]]
        return (model if self.best is None else load(self.folder / self.best)), rounds

    def save(self, best: keras.Model | None, rounds: list[Round]) -> None:
        """Write the rounds, and the model of the last if it is the new best."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.best
        if best is not None:
            self.best = f"round-{len(rounds):03}.keras"
            best.save(self.folder / self.best)
        content = {"settings": self.fingerprint, "best": self.best, "rounds": [asdict(one) for one in rounds]}
        write_text(self.folder / "rounds.json", json.dumps(content, indent=2))
        if before is not None and before != self.best:
            (self.folder / before).unlink(missing_ok=True)


def _zeros(model: keras.Model) -> float:
    """Return the fraction of zeros in the weights that have masks."""
    found = [value for key, value in effective_weights(model).items() if _has_mask(model, key)]
    return sum(int((value == 0).sum()) for value in found) / max(1, sum(value.size for value in found))


def _has_mask(model: keras.Model, key: tuple[str, str]) -> bool:
    return any(transform.kind == "mask" for transform in attached(model).get(key, []))


def _line(number: int, one: Round, baseline: float, required: float) -> str:
    verdict = "good enough" if one.met else "not good enough, stepping back"
    return (
        f"round {number}: sparsity {one.sparsity:.4f}, {one.value:.4f} (before pruning {baseline:.4f}, required "
        f"{required:.4f}): {verdict}, {one.seconds:.0f} s"
    )
