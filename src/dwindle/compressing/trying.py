"""One trial: a plan is carried out, and its file written, verified and measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from dwindle.compressing.plans import Plan
from dwindle.compressing.steps import Workbench, run_steps
from dwindle.data import Data, Split
from dwindle.errors import ConfigError, ConversionError, DataError, UnsupportedModelError, VerificationError
from dwindle.exporting import COMPACTED, export
from dwindle.files import save_keras
from dwindle.measuring import measure
from dwindle.quantization import quantize, resolve_scheme
from dwindle.targets import Target

# A trial that can't be done says why and the search goes on; anything else is a defect and stops it.
REASONS = (ConfigError, DataError, UnsupportedModelError, ConversionError, VerificationError)
FILE, TWIN = "model.tflite", "model.keras"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every trial of a run has in common.

    Attributes:
        bench: What steps work with.
        data: Train, validation and test samples.
        metric: Name of the metric, or the metric.
        target: What runs the file.
        threads: Threads of the latency measurement.
        packs: Whether packed sizes are measured.
    """

    bench: Workbench
    data: Data
    metric: Any
    target: Target
    threads: int = 1
    packs: bool = False

    @property
    def calibration(self) -> Split | None:
        """The samples that set ranges."""
        return self.data.train or self.data.val or self.data.test

    @property
    def judging(self) -> Split | None:
        """The samples that pick between trials."""
        return self.data.val or self.data.test or self.data.train


def try_plan(case: Case, plan: Plan, number: int, working: Path) -> dict[str, Any]:
    """Carry a plan out in a folder; return the trial's record.

    The latency in it is a first one: files are timed again side by side once nothing else runs.
    """
    begun = time.monotonic()
    try:
        record = _done(case, plan, number, working)
    except REASONS as error:
        record = blank(number, plan, status="failed", reason=str(error))
    record["seconds"] = round(time.monotonic() - begun, 2)
    return record


def _done(case: Case, plan: Plan, number: int, working: Path) -> dict[str, Any]:
    model = run_steps(plan.steps, case.bench)
    written = plan.steps[-1][1]
    scheme = written["scheme"]
    split = case.calibration
    samples = None if split is None else list(split.x)
    path = working / FILE
    if not resolve_scheme(scheme).is_float and not getattr(model, "quantization", None):
        model = _simulated(model, scheme, samples)
    artefact = export(model, path, scheme=scheme, data=samples, compact=written["compact"])
    save_keras(model, working / TWIN)
    figures = measure(path, pair(case.judging), metric=case.metric, threads=case.threads)
    if number > 0 and case.target.runtime == "micro" and figures.arena_bytes is None:
        raise UnsupportedModelError(f"TensorFlow Lite Micro does not run the file: {figures.arena_note}")
    record = blank(number, plan, status="done", reason=None)
    notes = [note for note in artefact.notes if not note.startswith(COMPACTED)]  # the plan says so
    record.update(figures_of(figures), file=f"trials/{number:03d}/{FILE}", notes=notes)
    record["verification"] = artefact.verification.to_dict()
    if case.packs:
        record["packed_bytes"] = _packed_bytes(path, working)
    return record


def _packed_bytes(path: Path, working: Path) -> int:
    from dwindle.packing import pack

    packed = working / "model.dwz"
    try:
        return pack(path, packed).packed_bytes
    finally:
        packed.unlink(missing_ok=True)


def _simulated(model: keras.Model, scheme: Any, samples: Any) -> keras.Model:
    """Return the trainable twin of the quantized file, or the model itself where it can't be lifted."""
    try:
        return quantize(model, scheme, samples)
    except UnsupportedModelError:
        return model


def pair(split: Split | None) -> tuple[Any, Any] | None:
    """Return ``(x, y)`` for measuring; None without labels."""
    if split is None or split.y is None:
        return None
    return (split.x[0] if len(split.x) == 1 else list(split.x)), split.y


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


def blank(number: int, plan: Plan, *, status: str, reason: str | None) -> dict[str, Any]:
    """Return the record of a trial without figures."""
    return {
        "id": f"{number:03d}", "name": plan.name, "steps": plan.words(), "plan": plan.to_dict(), "status": status,
        "reason": reason, "file": None, "meets": False, "seconds": 0.0, "notes": [],
    }  # fmt: skip


def outcome(record: Mapping[str, Any]) -> str:
    """Return how a trial ended, in words."""
    if record["status"] != "done":
        return f"{record['status']}, {record['reason']}"
    accuracy = "" if record["accuracy"] is None else f"{record['accuracy']:.4f}, "
    packed = f", packed {record['packed_bytes'] / 1000:,.1f} KB" if "packed_bytes" in record else ""
    meets = ", meets the goals" if record["meets"] else ""
    return (
        f"{accuracy}{record['size_bytes'] / 1000:,.1f} KB{packed}, {record['latency_ms']['p50']:.4g} ms{meets} "
        f"({record['seconds']:.1f} s)"
    )
