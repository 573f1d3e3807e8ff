"""What is tried next: cheap plans first, then many candidates trained for a short time, and the promising ones longer.

The proposals depend on the records of finished trials and on the seed alone, so a run that is taken up again proposes
what it proposed before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np

from dwindle.compressing.goals import Goals
from dwindle.compressing.plans import Plan
from dwindle.compressing.recipes import ALLOTMENTS, MIXTURES, Recipe, after_training, same_size
from dwindle.pruning.residual_blocks import residual_blocks
from dwindle.weights import walk_layers

Record = Mapping[str, Any]
Batches = Generator[list[Plan], Sequence[Record], None]
# Widths that are tried, and how many lengths of training there are: short, whole, and three times as long.
NARROWEST, WIDEST, LENGTHS = 0.04, 0.8, 3
# The first width where goals set no limit to it.
BEGINNING = 0.5
# Rounds without a better file after which a search is over.
PATIENCE = 4
# What the loss of a short training becomes by the next longer one, before anything was learned about it.
REPAIRED = 0.4
# Share of single weights set to 0 where packed bytes count.
PACKED_SPARSITY = 0.7
# Share of the weights that dense layers must have for their bits to be chosen apart.
MANY_DENSE = 0.3
# A longer training may do better than expected: it is tried if this share of the expected loss would do.
OPTIMISM = 0.8
# Difference of widths, as a share, below which they are the same.
NEAR = 0.03


@dataclass(kw_only=True)
class Candidate:
    """A recipe with the records of its trainings, the shortest first."""

    recipe: Recipe
    records: list[Record] = field(default_factory=list)

    @property
    def last(self) -> Record:
        """The record of the longest training."""
        return self.records[-1]

    @property
    def alive(self) -> bool:
        """Whether all its trials could be done."""
        return all(record["status"] == "done" for record in self.records)


class Proposer:
    """The search's strategy.

    Short trainings of candidates are compared by what longer ones are expected to make of them; the expectation is
    learned from those that were trained longer. Candidates come from the widths that the goals on size, latency and
    RAM leave, which is found out on untrained files, and later from an optimizer.

    Args:
        model: The original.
        goals: What to reach.
        higher_is_better: Whether the metric is.
        baseline: Record of the original.
        schemes: Schemes of files that the target runs; None: all.
        screen: Gives the figures of recipes' untrained files, None where there is none.
        epochs: Epochs of a whole training.
        trials: How many trials there are at most, besides the original.
        shifts: Whether the samples are images that may be shifted.
        seed: Seeds the optimizer.

    References:
        Jamieson and Talwalkar 2016, Non-stochastic Best Arm Identification and Hyperparameter Optimization, arXiv
        1502.07943 (successive halving). Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization (TPE).
    """

    def __init__(
        self, *, model: keras.Model, goals: Goals, higher_is_better: bool, baseline: Record,
        schemes: Sequence[str] | None, screen: Callable[[Sequence[Recipe]], Sequence[Record | None]], epochs: int,
        trials: int, seed: int, shifts: bool = False,
    ) -> None:  # fmt: skip
        self._shifts = shifts
        self._goals, self._higher, self._baseline = goals, higher_is_better, baseline
        self._schemes, self._screen, self._trials, self._seed = schemes, screen, trials, seed
        self._compact = goals.compacts(baseline)
        short = max(1, epochs // 4)
        self._epochs = (short, max(1, epochs - short), 2 * epochs)
        self._tuning = max(1, epochs // 4)
        self._deepens = any(not block.pinned for block in residual_blocks(model))
        self._many_dense = _dense_share(model) >= MANY_DENSE
        self._candidates: list[Candidate] = []
        self._others: list[Record] = []
        self._tops: dict[Recipe, float | None] = {}

    def batches(self, *, without_training: bool, without_samples: bool) -> Batches:
        """Yield plans that can be tried at the same time; their records are sent in, in the same order.

        Args:
            without_training: There is no labelled training data.
            without_samples: There is no data at all.
        """
        self._others += yield self.untrained(without_samples)
        if without_training:
            return
        if self._runs("int8") and self._worth_tuning():
            self._others += yield [same_size(sum(self._epochs[:2]), compact=self._compact)]
        coming = [Candidate(recipe=recipe) for recipe in self._first()]
        study = _Study(
            self._seed, widest=max((top for top in self._tops.values() if top), default=WIDEST), deepens=self._deepens,
            schemes=self._choices(), packs=self._goals.needs_packed,
        )  # fmt: skip
        best, idle = self._standing(), 0
        while coming := coming[: self._left()]:
            records = yield [self._plan(candidate) for candidate in coming]
            for candidate, record in zip(coming, records, strict=True):
                candidate.records.append(record)
                if len(candidate.records) == 1:
                    self._candidates.append(candidate)
                    study.tell(candidate.recipe, self._value(candidate))
            now = self._standing()
            idle = 0 if _better(now, best) else idle + 1
            best = min(best, now)
            if idle >= PATIENCE:
                return
            coming = [*self._promoted(), *self._new(study)]

    def _left(self) -> int:
        """Return how many trials may still be made."""
        return max(0, self._trials - len(self._others) - sum(len(candidate.records) for candidate in self._candidates))

    def untrained(self, without_samples: bool) -> list[Plan]:
        """Return the plans without training."""
        return after_training(without_samples, compact=self._compact)

    def preview(self) -> list[Plan]:
        """Return the plans that a search begins with, for showing; nothing is trained for it."""
        fixed = [*self.untrained(False), same_size(sum(self._epochs[:2]), compact=self._compact)]
        return [*fixed, *(self._plan(Candidate(recipe=recipe)) for recipe in self._first())]

    def _runs(self, scheme: str) -> bool:
        parts = MIXTURES[scheme][1].values() if scheme in MIXTURES else (scheme,)
        return self._schemes is None or all(part in self._schemes for part in parts)

    def _choices(self) -> list[str]:
        """Return the schemes of candidates: fewer bits where bytes matter."""
        bytes_matter = self._goals.minimized in ("size", "packed") or self._goals.max_size is not None
        names = ("int8", *(MIXTURES if self._many_dense else ()), "int4") if bytes_matter else ("int8",)
        found = [name for name in names if self._runs(name)]
        return found or [scheme for scheme in self._schemes or () if scheme != "float32"][:1] or ["int8"]

    def _worth_tuning(self) -> bool:
        """Whether quantization alone cost too much accuracy, and a file of that size could meet the goals."""
        first = next((r for r in self._others if r["status"] == "done" and _scheme(r) == "int8"), None)
        if first is None:
            return False
        loss = self._goals.loss(self._baseline, first, self._higher)
        enough = self._key(first)[0] == 0 and self._goals.minimized != "drop"
        return loss is not None and loss > 0 and not enough and self._rest_met(first)

    def _rest_met(self, record: Record, tolerance: float = 0.0) -> bool:
        """Whether a record meets the goals but that on the metric; times, which vary, within a share of the limit."""
        verdicts = self._goals.judge(self._baseline, {**record, "accuracy": None}, self._higher)
        return all(v.met or (v.goal == "max_latency" and v.value <= v.limit * (1 + tolerance)) for v in verdicts)

    def _families(self) -> list[Recipe]:
        """Return the kinds of candidates that a search begins with; each is tried in several widths."""
        first, *fewer = self._choices()
        found = [Recipe(scheme=first, allotted=allotted) for allotted in ("by-bytes", "by-work")]
        found += [Recipe(scheme=scheme, allotted="by-bytes") for scheme in fewer]
        found += [Recipe(scheme=first, start="random")]
        if self._deepens:
            found.append(Recipe(scheme=first, depth=0.67, allotted="by-bytes"))
        if self._goals.needs_packed:
            found.append(Recipe(scheme=first, sparsity=PACKED_SPARSITY, clusters=16, allotted="by-bytes"))
        return found

    def _first(self) -> list[Recipe]:
        """Return the first candidates: of each family the widest that the goals allow, and a narrower one."""
        found: list[Recipe] = []
        families = self._families()
        for family, top in zip(families, self._widest(families), strict=True):
            self._tops[_kind(family)] = top
            if top == WIDEST and self._goals.limits_drop:
                top = BEGINNING  # nothing but the loss sets a limit, and narrow ones are trained in less time
            if top is not None:
                found += [replace(family, width=_round(max(NARROWEST, top * factor))) for factor in (1, 0.6)]
        if not found:  # nothing is small enough: a ladder shows what there is instead
            found = [replace(families[0], width=width) for width in (0.5, 0.25, 0.12, 0.06, NARROWEST)]
        found = list(dict.fromkeys(found))
        different: list[Recipe] = []
        for recipe, figures in zip(found, self._screened(found), strict=True):
            if figures is not None and not self._repeats(recipe, different):
                different.append(recipe)
        return different

    def _screened(self, recipes: Sequence[Recipe]) -> Sequence[Record | None]:
        """Return the figures of untrained files; zeros and shared values do not change them."""
        return self._screen([replace(recipe, sparsity=0.0, clusters=0) for recipe in recipes])

    def _repeats(self, recipe: Recipe, others: Iterable[Recipe]) -> bool:
        """Whether a recipe is as good as one of others: widths are near, or channels came out as many.

        Layers have whole channels, some of them in fours, so that widths that differ may be the same network.
        """
        for other in others:
            if _kind(recipe) == _kind(other):
                if abs(recipe.width / other.width - 1) < NEAR:
                    return True
                one, two = self._screened([recipe, other])
                if one is not None and two is not None and one["size_bytes"] == two["size_bytes"]:
                    return True
        return False

    def _widest(self, families: Sequence[Recipe]) -> list[float | None]:
        """Return of each family the largest width that the goals allow; None: no width. All are narrowed down at once.

        What is allowed is found out on untrained files: the goals on size, latency and RAM.
        """
        searches = [_narrowed() for _ in families]
        asked = {number: next(search) for number, search in enumerate(searches)}
        tops: list[float | None] = [None] * len(families)
        while asked:
            recipes = [replace(families[number], width=width) for number, width in asked.items()]
            for number, figures in zip(list(asked), self._screened(recipes), strict=True):
                fits = None if figures is None else self._rest_met(figures, 0.05)
                try:
                    asked[number] = searches[number].send(fits)
                except StopIteration as end:
                    tops[number] = end.value
                    del asked[number]
        return tops

    def _plan(self, candidate: Candidate) -> Plan:
        """Return the plan of a candidate's next training."""
        length = len(candidate.records)
        tuning = self._tuning if length else int(candidate.recipe.scheme != "int8")
        return candidate.recipe.plan(self._epochs[: length + 1], tuning, compact=self._compact, shifts=self._shifts)

    def _repaired(self) -> float:
        """Return what share of the loss of a training is left after the next longer one, as far as is known."""
        pairs = [
            (max(0.0, self._loss(short)), max(0.0, self._loss(longer)))
            for candidate in self._candidates if candidate.alive
            for short, longer in zip(candidate.records, candidate.records[1:], strict=False)
        ]  # fmt: skip
        # What is taken for granted weighs as much as one candidate that was trained longer.
        prior = max(1e-9, float(np.mean([pair[0] for pair in pairs]))) if pairs else 1.0
        before, after = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        return min(1.2, (REPAIRED * prior + after) / (prior + before))

    def _loss(self, record: Record) -> float:
        return self._goals.loss(self._baseline, record, self._higher) or 0.0

    def _key(self, record: Record, loss: float | None = None) -> tuple[float, float]:
        """Return how good a record is, smaller is better: what it misses the goals by, then what it costs."""
        if loss is not None and record.get("accuracy") is not None:
            start = self._baseline["accuracy"]
            record = {**record, "accuracy": start - loss if self._higher else start + loss}
        record = self._goals.cautious(self._baseline, record, self._higher)
        excess = sum(verdict.excess for verdict in self._goals.judge(self._baseline, record, self._higher))
        return excess, self._goals.cost(self._baseline, record, self._higher)

    def _expected(self, candidate: Candidate, share: float = 1.0) -> tuple[float, float]:
        """Return `_key` as it is expected after the next longer training, with a share of the loss expected."""
        loss = self._loss(candidate.last)
        return self._key(candidate.last, loss * share * self._repaired() if loss > 0 else loss)

    def _standing(self) -> tuple[float, float]:
        """Return `_key` of the best record so far."""
        records = [*self._others, *(record for candidate in self._candidates for record in candidate.records)]
        keys = [self._key(record) for record in (self._baseline, *records) if record["status"] == "done"]
        return min(keys)

    def _promoted(self) -> list[Candidate]:
        """Return the candidates that are trained longer: the best by expectation, and a safer one."""
        best = self._standing()
        able = [c for c in self._candidates if c.alive and len(c.records) < LENGTHS]
        hopeful = [c for c in able if _better(self._expected(c, OPTIMISM), best)]
        found = sorted(hopeful, key=self._expected)[:1]
        rest = [c for c in hopeful if c not in found]
        return [*found, *sorted(rest, key=lambda c: (self._loss(c.last), self._expected(c)))[:1]]

    def _new(self, study: _Study) -> list[Candidate]:
        """Return new candidates: those that losses so far point to, and what the optimizer asks for."""
        tried = [candidate.recipe for candidate in self._candidates]
        best, found = self._standing(), []
        any_fits = any(top is not None for top in self._tops.values())

        def take(recipe: Recipe) -> bool:
            too_wide = recipe.width > (self._tops.get(_kind(recipe)) or WIDEST)
            figures = None if too_wide or self._repeats(recipe, tried) else self._screened([recipe])[0]
            if figures is None or (any_fits and not self._rest_met(figures, 0.05)):
                return False
            hopeful = {**figures, "accuracy": self._baseline.get("accuracy")}
            if not _better(self._key(hopeful), best) and self._goals.minimized != "packed":
                return False
            tried.append(recipe)
            found.append(Candidate(recipe=recipe))
            return True

        for recipe in self._aimed():
            if len(found) < 2:
                take(recipe)
        for _ in range(12):
            asked = study.ask()
            if not take(asked):
                study.tell(asked, None)
            elif len(found) >= 2:
                break
        return found

    def _aimed(self) -> list[Recipe]:
        """Return of each kind of candidate the width at which its loss is expected to be just allowed; cheapest first.

        The loss of short trainings is taken for a power of the width, fitted to the widths that were tried.
        """
        kinds: dict[Recipe, list[Candidate]] = {}
        for candidate in self._candidates:
            if candidate.alive:
                kinds.setdefault(_kind(candidate.recipe), []).append(candidate)
        allowed, found = self._allowed(), []
        for kind, members in kinds.items():
            widths = np.log([candidate.recipe.width for candidate in members])
            if len(set(widths)) < 2 or allowed is None:
                nearest = min(members, key=lambda c: self._key(c.last))
                found.append(
                    replace(kind, width=nearest.recipe.width * (0.85 if self._key(nearest.last)[0] == 0 else 1.18))
                )
                continue
            losses = np.log([max(self._loss(candidate.records[0]), allowed / 10) for candidate in members])
            slope, start = np.polyfit(widths, losses, 1)
            if slope < -0.1:
                found.append(replace(kind, width=float(np.exp((np.log(allowed / self._repaired()) - start) / slope))))
        tops = self._tops
        bounded = [
            replace(one, width=_round(min(max(one.width, NARROWEST), tops.get(_kind(one)) or WIDEST))) for one in found
        ]
        figures = zip(bounded, self._screened(bounded), strict=True)
        screened = [(found, one) for one, found in figures if found is not None]
        return [one for _, one in sorted(screened, key=lambda pair: self._key({**pair[0], "accuracy": None}))]

    def _allowed(self) -> float | None:
        """Return the loss to aim at, so that it keeps the limit also on other samples; None where there is no limit."""
        limit = self._goals.allowed_loss(self._baseline)
        if limit is None:
            return None
        errors = [candidate.last.get("loss_error") or 0.0 for candidate in self._candidates if candidate.alive]
        typical = float(np.median(errors)) if errors else None
        return max(1e-4, limit - self._goals.margin(self._baseline, typical))

    def _value(self, candidate: Candidate) -> float | None:
        """Return what the optimizer minimizes: the goals' misses by expectation, then the cost, relative."""
        if not candidate.alive:
            return None
        excess, cost = self._expected(candidate)
        if self._goals.minimized == "drop":
            return 10 * excess + 10 * cost
        before = max(1e-9, self._goals.cost(self._baseline, self._baseline, self._higher))
        return 10 * excess + float(np.log(max(cost, 1e-9) / before))


class _Study:
    """The optimizer: `optuna`, asked for recipes one at a time."""

    def __init__(self, seed: int, *, widest: float, deepens: bool, schemes: Sequence[str], packs: bool) -> None:
        import warnings

        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():  # it warns that grouping is an experiment of theirs
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=6)
        self._study = optuna.create_study(sampler=sampler)
        lengths = optuna.distributions
        self._space: dict[str, Any] = {
            "width": lengths.FloatDistribution(NARROWEST, widest, log=True),
            "start": lengths.CategoricalDistribution(("teacher", "random")),
            "allotted": lengths.CategoricalDistribution(tuple(ALLOTMENTS)),
            "energy": lengths.CategoricalDistribution((1.0, 0.9)),
        }
        if deepens:
            self._space["depth"] = lengths.CategoricalDistribution((1.0, 0.67, 0.34))
        if len(schemes) > 1:
            self._space["scheme"] = lengths.CategoricalDistribution(tuple(schemes))
        if packs:
            self._space["sparsity"] = lengths.CategoricalDistribution((0.0, 0.5, PACKED_SPARSITY))
            self._space["clusters"] = lengths.CategoricalDistribution((0, 16))
        self._fixed: dict[str, Any] = {} if len(schemes) > 1 else {"scheme": schemes[0]}
        self._asked: dict[Recipe, Any] = {}

    def ask(self) -> Recipe:
        """Return a recipe."""
        trial = self._study.ask(self._space)
        params = {**trial.params, **self._fixed, "width": _round(trial.params["width"])}
        if params["start"] == "random":  # what was not trained yet has no low rank, and no channels that matter
            params |= {"energy": 1.0, "allotted": "evenly"}
        recipe = Recipe(**params)
        self._asked[recipe] = trial
        return recipe

    def tell(self, recipe: Recipe, value: float | None) -> None:
        """Say what a recipe was worth; None: it can't be tried, or is not worth it."""
        import optuna

        trial = self._asked.pop(recipe, None)
        if trial is not None:
            state = optuna.trial.TrialState.FAIL if value is None else None
            self._study.tell(trial, value, state=state)
        elif value is not None:
            params = {name: getattr(recipe, name) for name in self._space}
            params["width"] = min(max(params["width"], NARROWEST), self._space["width"].high)
            self._study.add_trial(optuna.trial.create_trial(params=params, distributions=self._space, value=value))


def _narrowed() -> Generator[float, bool | None, float | None]:
    """Search the largest width that fits: yields a width, and is sent whether it fits; None: there is no such file.

    A width that is too narrow to be possible bounds the search from below, as one that fits does.
    """
    steps = [_round(WIDEST * (NARROWEST / WIDEST) ** (number / 15)) for number in range(16)]
    answer = yield steps[0]
    if answer is None or answer:
        return steps[0] if answer else None
    fits: float | None = None
    low, high = 0, len(steps)  # steps[low] is too wide, steps[high] is not; the last may be
    while high - low > 1:
        middle = (low + high) // 2
        answer = yield steps[middle]
        if answer is False:
            low = middle
        else:
            high = middle
            fits = steps[middle] if answer else fits
    if fits is None:
        return None
    too_wide = steps[low]
    for _ in range(2):  # a step is a fifth, and goals are to be used up
        width = _round((fits * too_wide) ** 0.5)
        if (yield width):
            fits = width
        else:
            too_wide = width
    return fits


def _kind(recipe: Recipe) -> Recipe:
    """Return a recipe without its width."""
    return replace(recipe, width=1.0)


def _round(width: float) -> float:
    return round(width, 3)


def _dense_share(model: keras.Model) -> float:
    """Return the share of a model's weights that its dense layers have."""
    kernels = [layer.kernel for _, layer in walk_layers(model) if isinstance(layer, keras.layers.Dense)]
    share: float = sum(math.prod(kernel.shape) for kernel in kernels) / max(1, model.count_params())
    return share


def _scheme(record: Record) -> str:
    return str(record["plan"]["steps"][-1]["export"]["scheme"])


def _better(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a key is better than another by more than a hair: at least 1% of what counts."""
    if one[0] < other[0]:
        return one[0] == 0 or one[0] < 0.99 * other[0]
    return one[0] == other[0] and one[1] < other[1] - 0.01 * abs(other[1])
