"""The search: plans are proposed, tried and measured until the goals are met and nothing better is in sight."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from dwindle.compressing.engines import Engine, Inline, Task
from dwindle.compressing.events import Event, Tell
from dwindle.compressing.goals import Goals, Verdict
from dwindle.compressing.plans import Plan, schemes_in
from dwindle.compressing.proposing import Proposer
from dwindle.compressing.screening import Screen, has_slow_kernels
from dwindle.compressing.shifting import shifts
from dwindle.compressing.store import Store
from dwindle.compressing.trying import Case, blank, outcome
from dwindle.errors import ConversionError
from dwindle.measuring import LiteRTRunner, compare_latency, higher_is_better
from dwindle.measuring.paired import paired_drop

# Files whose turns of timing are taken in one go.
TIMED_TOGETHER = 8
_TOLD = ("name", "status", "accuracy", "size_bytes", "packed_bytes", "latency_ms", "meets", "seconds", "reason")
ORIGINAL = Plan(name="original, float32", steps=(("export", {"scheme": "float32"}),))


@dataclass(kw_only=True)
class Search:
    """One run of `compress`: the model, the goals, and what has been tried.

    Attributes:
        case: What trials have in common.
        goals: What to reach.
        store: The out folder.
        epochs: Epochs of a whole training.
        tell: Called with what happens.
        engine: Where trials run; None: in this process, one after the other.
        most: How many trials there are at most, besides the original.
        plan: The only plan to run, or None for the search.
        deadline: The `time.monotonic` after which no further trial begins; None: there is none.
        trials: Records of what was tried, the original first.
        current: Number of the trial that began last.
    """

    case: Case
    goals: Goals
    store: Store
    epochs: int
    tell: Tell
    engine: Engine | None = None
    most: int = 40
    plan: Plan | None = None
    deadline: float | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    current: int | None = None
    _outputs: np.ndarray | None = None

    def run(self) -> None:
        """Try plans until the goals are met and nothing better is in sight, or time is over."""
        self.measure_original()
        engine = self.engine or Inline(self.case, self.tell)
        if self.plan is not None:
            self._batch([self.plan], engine)
            return
        untrained = self.case.bench.train is None or self.case.bench.train.y is None
        if untrained:
            self._note("no labelled training data: techniques that train are left out")
        proposals = self.proposer().batches(without_training=untrained, without_samples=self.case.calibration is None)
        plans = next(proposals, None)
        while plans is not None:
            records = self._batch(plans, engine)
            if self._late():
                self._note("the time budget is spent")
                return
            try:
                plans = proposals.send(records)
            except StopIteration:
                return

    def measure_original(self) -> None:
        """Export the original in float32 and measure it, the first trial.

        Raises:
            ConversionError: If it can't be done.
        """
        (original,) = self._batch([ORIGINAL], Inline(self.case, self.tell))
        if original["status"] != "done":
            raise ConversionError(f"the original can't be exported and measured: {original['reason']}")

    def proposer(self) -> Proposer:
        """Return the strategy; the original must have been measured."""
        return Proposer(
            model=self.case.bench.original, goals=self.goals, higher_is_better=higher_is_better(self.case.metric),
            baseline=self.trials[0], schemes=self.case.target.schemes, epochs=self.epochs, trials=self.most,
            screen=Screen(case=self.case, goals=self.goals, store=self.store, baseline=self.trials[0],
                          tell=self.tell, engine=self.engine or Inline(self.case, self.tell)),
            seed=self.case.bench.seed,
            shifts=self.case.bench.distills and shifts(self.case.bench.original, self.case.bench.train),
        )  # fmt: skip

    def verdicts(self, record: Mapping[str, Any]) -> list[Verdict]:
        """Judge a trial by the figures measured on validation data, with a margin for those samples' chance."""
        higher = higher_is_better(self.case.metric)
        return self.goals.judge(self.trials[0], self.goals.cautious(self.trials[0], record, higher), higher)

    def meets(self, record: Mapping[str, Any]) -> bool:
        """Whether a finished trial meets every goal."""
        return record["status"] == "done" and all(verdict.met for verdict in self.verdicts(record))

    def best(self) -> dict[str, Any] | None:
        """Return the file that costs least of those that meet the goals, or misses them by least."""
        done = [trial for trial in self.trials if trial["status"] == "done"]
        return min(done, key=self._rank, default=None)

    def _rank(self, record: Mapping[str, Any]) -> tuple[float, float, float, float]:
        excess = sum(verdict.excess for verdict in self.verdicts(record))
        higher = higher_is_better(self.case.metric)
        loss = self.goals.loss(self.trials[0], record, higher) or 0.0
        return excess, self.goals.cost(self.trials[0], record, higher), record["size_bytes"], loss

    def alternatives(self) -> dict[str, str]:
        """Return which trial is the smallest, the fastest and the most accurate of those that meet the goals."""
        meeting = [trial for trial in self.trials[1:] if self.meets(trial)]
        if not meeting:
            return {}
        higher = higher_is_better(self.case.metric)
        keys = {
            "smallest": lambda t: (t["size_bytes"], self._rank(t)),
            "fastest": lambda t: t["latency_ms"][self.goals.latency],
            "most accurate": lambda t: self.goals.loss(self.trials[0], t, higher) or 0.0,
        }  # fmt: skip
        return {name: str(min(meeting, key=key)["id"]) for name, key in keys.items()}

    def _note(self, text: str) -> None:
        self.tell(Event(kind="note", text=text))

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _too_long(self, plan: Plan) -> bool:
        """Whether a plan would not be done in time, by how long the epochs of others took."""
        if self.deadline is None or self.plan is not None:
            return False
        trained = [(t["seconds"], _new_epochs(t["plan"], self.trials[:number])) for number, t in enumerate(self.trials)]
        known = [(seconds, epochs) for seconds, epochs in trained if epochs]
        epochs = _new_epochs(plan.to_dict(), self.trials)
        if not known or not epochs:
            return self._late()
        each = sum(seconds for seconds, _ in known) / sum(epochs for _, epochs in known)
        return bool(time.monotonic() + epochs * each > self.deadline)

    def _batch(self, plans: Sequence[Plan], engine: Engine) -> list[dict[str, Any]]:
        """Try plans that do not depend on each other; return their records in the same order."""
        self.case.bench.interruption.check()
        first = len(self.trials)
        records: dict[int, dict[str, Any]] = {}
        for number, plan in enumerate(plans, start=first):
            before = self.store.finished(number)
            if before is not None and before.get("plan") == plan.to_dict():
                records[number] = before
        again = set(records)
        alone = isinstance(engine, Inline)
        # One after the other, each may find that time is over; side by side, they begin together.
        groups = [[pair] for pair in enumerate(plans, start=first)] if alone else [list(enumerate(plans, start=first))]
        for group in groups:
            tasks = [task for number, plan in group if number not in records
                     for task in [self._task(number, plan, records)] if task is not None]  # fmt: skip
            for task, record in engine.run(tasks):
                self.case.bench.interruption.check()  # what an interruption broke is no result
                with self.case.bench.interruption.deferred():
                    self.store.finish(task.number, task.working, record)
                    records[task.number] = record
                    if alone:
                        self._time([record])
                        self._settle(record, again=False)
            rest = [number for number, _ in group if number >= len(self.trials)]
            with self.case.bench.interruption.deferred():
                self._time([records[number] for number in rest])
                for number in rest:
                    self._settle(records[number], again=number in again)
        best = self.best()
        kept = {*self._kept(), *([] if best is None else [str(best["id"])])}
        # Of a run that is resumed, later trials are not known here yet: theirs stay.
        self.store.forget_twins(str(trial["id"]) for trial in self.trials if str(trial["id"]) not in kept)
        return [records[number] for number in range(first, first + len(plans))]

    def _task(self, number: int, plan: Plan, records: dict[int, dict[str, Any]]) -> Task | None:
        """Return a trial's task; None where it is skipped, with a record that says why."""
        schemes, wanted = self.case.target.schemes, schemes_in(plan.steps[-1][1]["scheme"])
        reason = None
        if number > 0 and schemes is not None and (unable := [one for one in wanted if one not in schemes]):
            reason = f"{self.case.target.name} runs {', '.join(schemes)}, not {', '.join(unable)}"
        elif number > 0 and self.plan is None and (self._late() or self._too_long(plan)):
            reason = "the time budget is spent" if self._late() else "it would take longer than the time budget"
        if reason is not None:
            records[number] = blank(number, plan, status="skipped", reason=reason)
            return None
        self.current = number
        return Task(number=number, plan=plan, working=self.store.begin(number))

    def _time(self, records: Sequence[dict[str, Any]]) -> None:
        """Time files side by side with the original's, once nothing else runs."""
        fresh = [record for record in records if record["status"] == "done" and "baseline_p50_ms" not in record]
        if not self.trials:  # the original itself
            return
        for start in range(0, len(fresh), TIMED_TOGETHER):
            group = fresh[start : start + TIMED_TOGETHER]
            files = [self.store.folder / trial["file"] for trial in (self.trials[0], *group)]
            before, *timed = compare_latency(files, threads=self.case.threads)
            for record, after in zip(group, timed, strict=True):
                record["latency_ms"] = {"p50": after.p50_ms, "p90": after.p90_ms}
                record["baseline_p50_ms"], record["baseline_p90_ms"] = before.p50_ms, before.p90_ms

    def _settle(self, record: dict[str, Any], *, again: bool) -> None:
        """Judge a trial, write its record, and say how it ended, now or in an earlier run."""
        number = len(self.trials)
        known = [trial for trial in self.trials if trial["status"] == "done"]
        self.trials.append(record)
        if record["status"] == "done":
            if number > 0 and "loss_error" not in record:
                record["loss_error"] = self._loss_error(record)
            record["slow_kernels"] = has_slow_kernels((self.store.folder / record["file"]).read_bytes())
            record["meets"] = self.meets(record)  # the goals may be others than in an earlier run
        if record["status"] != "skipped":
            self.store.write(number, record)
        figures = {key: record.get(key) for key in _TOLD}
        text = f"[{number}] {record['name']}: {'done before, ' if again else ''}{outcome(record)}"
        self.tell(Event(kind="end", text=text, trial=number, facts=figures))
        if number > 0 and record["status"] == "done" and self._rank(record) < min(map(self._rank, known)):
            self.tell(Event(kind="best", text=f"best so far: [{number}] {record['name']}", trial=number, facts=figures))

    def _loss_error(self, record: Mapping[str, Any]) -> float | None:
        """Return the standard error of a loss of accuracy, from the samples on which the two files differ."""
        split = self.case.judging
        if self.case.metric != "accuracy" or split is None or split.y is None:
            return None
        if self._outputs is None:
            self._outputs = LiteRTRunner(self.store.folder / self.trials[0]["file"]).predict(list(split.x))[0]
        after = LiteRTRunner(self.store.folder / record["file"]).predict(list(split.x))[0]
        return paired_drop(self._outputs, after, np.asarray(split.y)).error

    def _kept(self) -> Iterable[str]:
        """Return the trials whose twins stay: those that no other beats in everything that was measured."""
        done = [trial for trial in self.trials if trial["status"] == "done"]
        higher = higher_is_better(self.case.metric)

        def figures(trial: Mapping[str, Any]) -> tuple[float, ...]:
            return (
                trial["size_bytes"], trial["latency_ms"][self.goals.latency], trial["ram_bytes"],
                trial.get("packed_bytes", 0), self.goals.loss(self.trials[0], trial, higher) or 0.0,
            )  # fmt: skip

        rows = np.array([figures(trial) for trial in done])
        for row, trial in zip(rows, done, strict=True):
            if not ((rows <= row).all(axis=1) & (rows < row).any(axis=1)).any():
                yield str(trial["id"])


def _new_epochs(plan: Mapping[str, Any], before: Iterable[Mapping[str, Any]]) -> int:
    """Return how many epochs a plan trains that none of the trials before had trained already, in the same steps."""

    def parts(one: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
        return [next(iter(step.items())) for step in one["steps"]]

    steps, shared = parts(plan), 0
    for trial in before:
        other = parts(trial["plan"])
        same = next((n for n, (one, two) in enumerate(zip(steps, other, strict=False)) if one != two),
                    min(len(steps), len(other)))  # fmt: skip
        shared = max(shared, same)
    return sum(int(options["epochs"]) for step, options in steps[shared:] if step == "train")


def fingerprint(model: keras.Model) -> str:
    """Return a hash of a model's weights, their shapes and names."""
    digest = hashlib.sha256()
    for variable in model.variables:
        value = np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
        digest.update(f"{variable.name}{value.shape}{value.dtype}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
