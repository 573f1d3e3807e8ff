"""What a candidate's file will take, found out before anything is trained: it does not depend on the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dwindle.compressing.events import Event, Tell
from dwindle.compressing.goals import Goals
from dwindle.compressing.recipes import Recipe
from dwindle.compressing.steps import run_steps
from dwindle.compressing.store import Store
from dwindle.compressing.trying import FILE, REASONS, Case
from dwindle.exporting import export
from dwindle.measuring import compare_latency
from dwindle.measuring.memory import measure_memory

# Samples that set the ranges of an untrained file.
SAMPLES = 32


@dataclass(kw_only=True)
class Screen:
    """Gives the figures of a recipe's untrained file; what was found is kept in the store.

    Attributes:
        case: What trials have in common.
        goals: Says which figures matter; others are not measured.
        store: Where figures are kept.
        baseline: Record of the original, which is timed beside.
        tell: Called with what can't be made, and why.
    """

    case: Case
    goals: Goals
    store: Store
    baseline: Mapping[str, Any]
    tell: Tell

    def __call__(self, recipe: Recipe) -> dict[str, Any] | None:
        """Return ``size_bytes``, ``latency_ms`` and ``ram_bytes`` of a recipe's file; None where there is none."""
        self.case.bench.interruption.check()
        name = str(sorted(asdict(recipe).items()))
        found = self.store.screened(name)
        if found is None:
            found = self._measured(recipe)
            self.store.keep_screened(name, found)
        return found or None

    def _measured(self, recipe: Recipe) -> dict[str, Any]:
        steps = [pair for pair in recipe.plan((), 0).steps if pair[0] in ("shrink", "prune", "factorize")]
        split = self.case.calibration
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE
            try:
                model = run_steps(steps, replace(self.case.bench, stages=None))
                export(
                    model, path, scheme=recipe.written, data=None if split is None else list(split.take(SAMPLES).x),
                    compact=self.goals.compacts(self.baseline),
                )  # fmt: skip
            except REASONS as error:
                self.tell(Event(kind="note", text=f"{recipe.name}: not possible, {error}"))
                return {}
            figures: dict[str, Any] = {"size_bytes": path.stat().st_size, "packed_bytes": 0, "ram_bytes": 0}
            if self.goals.max_ram is not None or self.goals.minimized == "ram":
                memory = measure_memory(path)
                figures["ram_bytes"] = memory.arena_bytes or memory.resident_bytes
            figures["latency_ms"] = dict(self.baseline["latency_ms"])  # stands for a time that does not matter
            if self.goals.max_latency is not None or self.goals.minimized == "latency":
                files = [self.store.folder / self.baseline["file"], path]
                before, after = compare_latency(files, threads=self.case.threads)
                figures["latency_ms"] = {"p50": after.p50_ms, "p90": after.p90_ms}
                figures["baseline_p50_ms"], figures["baseline_p90_ms"] = before.p50_ms, before.p90_ms
        timed = f", {figures['latency_ms']['p50']:.4g} ms" if "baseline_p50_ms" in figures else ""
        told = f"{figures['size_bytes'] / 1000:,.1f} KB{timed}"
        self.tell(Event(kind="note", text=f"untrained, {recipe.name}: {told}"))
        return figures
