"""The search: try plans in the order of their cost, measure each file, keep the cheapest that meets the goals."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.compressing import candidates
from dwindle.compressing.goals import Goals, Verdict
from dwindle.compressing.plans import Plan
from dwindle.compressing.steps import Say, Workbench, run_steps
from dwindle.compressing.store import Store
from dwindle.data import Data, Split
from dwindle.errors import ConfigError, ConversionError, DataError, UnsupportedModelError, VerificationError
from dwindle.exporting import export
from dwindle.files import save_keras
from dwindle.measuring import compare_latency, higher_is_better, measure
from dwindle.quantization import quantize, resolve_scheme
from dwindle.seeding import seeded
from dwindle.targets import Target

ORIGINAL = Plan(name="original, float32", steps=(("export", {"scheme": "float32"}),))
# A trial that can't be done says why and the search goes on; anything else is a defect and stops it.
_REASONS = (ConfigError, DataError, UnsupportedModelError, ConversionError, VerificationError)


@dataclass(kw_only=True)
class Search:
    """One run of `compress`: the model, the goals, and what has been tried.

    Attributes:
        bench: What steps work with.
        data: Train, validation and test samples.
        goals: What to reach.
        target: What runs the file.
        store: The out folder.
        metric: Name of the metric.
        epochs: Epochs of a student's training; fine-tuning takes a part of it.
        threads: Threads of the latency measurement.
        plan: The only plan to run, or None for the search.
        say: Called with progress lines.
        deadline: The `time.monotonic` after which no further trial begins; None: there is none.
        trials: Records of what was tried, the original first.
    """

    bench: Workbench
    data: Data
    goals: Goals
    target: Target
    store: Store
    metric: Any
    epochs: int
    threads: int
    plan: Plan | None
    say: Say
    deadline: float | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    current: str = ""

    def run(self) -> None:
        """Try plans until the goals are met as cheaply as this search knows how."""
        original = self._try(ORIGINAL)
        if original["status"] != "done":
            raise ConversionError(f"the original can't be exported and measured: {original['reason']}")
        if self.plan is not None:
            self._try(self.plan)
            return
        for plan in candidates.after_training(self._split() is None):
            self._try(plan)
        if self.bench.train is None or self.bench.train.y is None:
            self.say("no labelled training data: techniques that train are left out")
            return
        self._same_size()
        self._students()

    def _same_size(self) -> None:
        smallest = candidates.smallest_int8_bytes(self.bench.original)
        for plan in candidates.same_size(self.epochs):
            if self.goals.max_size is not None and smallest > int(self.goals.max_size):
                why = (
                    f"{smallest:,} parameters of 8 bits are more than the {int(self.goals.max_size):,} bytes asked for"
                )
                self._skip(plan, why)
            else:
                self._try(plan)

    def _students(self) -> None:
        misses = 0
        for width in candidates.student_widths(self.bench.original, self.goals, self.say):
            if self._late():
                return
            record = self._try(candidates.student(width, self.epochs))
            # Narrower ones are cheaper but less accurate: after two that are too inaccurate in a row it is over.
            misses = misses + 1 if self._too_inaccurate(record) else 0
            if misses == 2:
                return

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _too_inaccurate(self, record: Mapping[str, Any]) -> bool:
        if record["status"] != "done":
            return True
        return any(v.goal == "max_drop" and not v.met for v in self.verdicts(record))

    def _split(self) -> Split | None:
        return self.data.train or self.data.val or self.data.test

    def verdicts(self, record: Mapping[str, Any]) -> list[Verdict]:
        """Judge a trial by the figures measured on validation data."""
        return self.goals.judge(self.trials[0], record, higher_is_better(self.metric))

    def meets(self, record: Mapping[str, Any]) -> bool:
        """Whether a finished trial meets every goal."""
        return record["status"] == "done" and all(verdict.met for verdict in self.verdicts(record))

    def best(self) -> dict[str, Any] | None:
        """Return the smallest file that meets the goals; without one, that which misses them by least."""
        done = [trial for trial in self.trials if trial["status"] == "done"]
        meeting = [trial for trial in done if self.meets(trial)]
        if meeting:
            return min(meeting, key=lambda t: (t["size_bytes"], t["latency_ms"]["p50"]))
        return min(done, key=lambda t: sum(v.excess for v in self.verdicts(t)), default=None)

    def _skip(self, plan: Plan, reason: str) -> dict[str, Any]:
        number = len(self.trials)
        self.trials.append(_record(number, plan, status="skipped", reason=reason))
        self.say(f"[{number}] {plan.name}: skipped, {reason}")
        return self.trials[-1]

    def _try(self, plan: Plan) -> dict[str, Any]:
        self.bench.interruption.check()
        number = len(self.trials)
        self.current = f"[{number}] {plan.name}"
        before = self.store.finished(number)
        if before is not None and before.get("plan") == plan.to_dict():
            self.trials.append(before)
            before["meets"] = self.meets(before)  # the goals may be others than in the earlier run
            self.say(f"{self.current}: done before")
            return before
        scheme = plan.steps[-1][1]["scheme"]
        if number > 0 and self.target.schemes is not None and scheme not in self.target.schemes:
            return self._skip(plan, f"{self.target.name} runs {', '.join(self.target.schemes)}, not {scheme}")
        if number > 0 and self.plan is None and self._late():
            return self._skip(plan, "the time budget is spent")
        self.say(f"{self.current}: begins")
        begun = time.monotonic()
        working = self.store.begin(number)
        try:
            with seeded(self.bench.seed + number):
                record = self._carry_out(plan, number, working)
        except _REASONS as error:
            record = _record(number, plan, status="failed", reason=str(error))
        self.bench.interruption.check()  # what an interruption broke is no result
        record["seconds"] = round(time.monotonic() - begun, 2)
        self.trials.append(record)
        if record["status"] == "done":
            record["meets"] = self.meets(record)
        self.store.finish(number, working, record)
        self.say(f"{self.current}: {_outcome(record)}")
        return record

    def _carry_out(self, plan: Plan, number: int, working: Path) -> dict[str, Any]:
        model = run_steps(plan.steps, self.bench)
        scheme = plan.steps[-1][1]["scheme"]
        split = self._split()
        samples = None if split is None else list(split.x)
        path = working / "model.tflite"
        if not resolve_scheme(scheme).is_float and not getattr(model, "quantization", None):
            model = _simulated(model, scheme, samples)
        artefact = export(model, path, scheme=scheme, data=samples)
        save_keras(model, working / "model.keras")
        judged = self.data.val or self.data.test or self.data.train
        figures = measure(path, self._pair(judged), metric=self.metric, threads=self.threads)
        if number > 0 and self.target.runtime == "micro" and figures.arena_bytes is None:
            raise UnsupportedModelError(f"TensorFlow Lite Micro does not run the file: {figures.arena_note}")
        record = _record(number, plan, status="done", reason=None)
        record.update(figures_of(figures), file=f"trials/{number:03d}/model.tflite", notes=list(artefact.notes))
        record["verification"] = artefact.verification.to_dict()
        if number > 0:
            files = [self.store.folder / self.trials[0]["file"], path]
            before, after = compare_latency(files, threads=self.threads)
            record["latency_ms"] = {"p50": after.p50_ms, "p90": after.p90_ms}
            record["baseline_p50_ms"] = before.p50_ms
        return record

    @staticmethod
    def _pair(split: Split | None) -> tuple[Any, Any] | None:
        if split is None or split.y is None:
            return None
        return (split.x[0] if len(split.x) == 1 else list(split.x)), split.y


def _simulated(model: keras.Model, scheme: str, samples: Any) -> keras.Model:
    """Return the trainable twin of the quantized file, or the model itself where it can't be lifted."""
    try:
        return quantize(model, scheme, samples)
    except UnsupportedModelError:
        return model


def figures_of(measurement: Any) -> dict[str, Any]:
    """Return the figures of a measurement under the names of report.json."""
    return {
        "accuracy": measurement.accuracy,
        "size_bytes": measurement.size_bytes,
        "latency_ms": measurement.latency_ms,
        "ram_bytes": measurement.ram_bytes,
        "ram_source": measurement.ram_source,
        "sha256": measurement.sha256,
        "parameters": measurement.parameters,
    }


def _record(number: int, plan: Plan, *, status: str, reason: str | None) -> dict[str, Any]:
    return {
        "id": f"{number:03d}", "name": plan.name, "steps": plan.words(), "plan": plan.to_dict(), "status": status,
        "reason": reason, "file": None, "meets": False, "seconds": 0.0, "notes": [],
    }  # fmt: skip


def _outcome(record: Mapping[str, Any]) -> str:
    if record["status"] != "done":
        return f"{record['status']}, {record['reason']}"
    accuracy = "" if record["accuracy"] is None else f"{record['accuracy']:.4f}, "
    meets = ", meets the goals" if record["meets"] else ""
    return (
        f"{accuracy}{record['size_bytes'] / 1000:,.1f} KB, {record['latency_ms']['p50']:.4g} ms{meets} "
        f"({record['seconds']:.1f} s)"
    )


def fingerprint(model: keras.Model) -> str:
    """Return a hash of a model's weights, their shapes and names."""
    digest = hashlib.sha256()
    for variable in model.variables:
        value = np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
        digest.update(f"{variable.name}{value.shape}{value.dtype}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
