"""What a candidate's file will take, found out before anything is trained: it does not depend on the weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dwindle.compressing.engines import Engine
from dwindle.compressing.events import Event, Tell
from dwindle.compressing.goals import Goals
from dwindle.compressing.recipes import Recipe
from dwindle.compressing.steps import run_steps
from dwindle.compressing.store import Store
from dwindle.compressing.trying import REASONS, Case
from dwindle.exporting import unchecked_file
from dwindle.lifting.flatbuffer import read_graph
from dwindle.measuring import compare_latency
from dwindle.measuring.memory import measure_memory

# Samples that set the ranges of an untrained file.
SAMPLES = 32


@dataclass(kw_only=True)
class Screen:
    """Gives the figures of recipes' untrained files; what was found is kept in the store.

    Attributes:
        case: What trials have in common.
        goals: Says which figures matter; others are not measured.
        store: Where figures are kept.
        baseline: Record of the original, which is timed beside.
        tell: Called with what was found, or why a file can't be made.
        engine: Where files are made.
    """

    case: Case
    goals: Goals
    store: Store
    baseline: Mapping[str, Any]
    tell: Tell
    engine: Engine

    def __call__(self, recipes: Sequence[Recipe]) -> list[dict[str, Any] | None]:
        """Return ``size_bytes``, ``latency_ms`` and ``ram_bytes`` of each recipe's file; None where there is none."""
        self.case.bench.interruption.check()
        found = {recipe: self.store.screened(self._key(recipe)) for recipe in recipes}
        new = [recipe for recipe, figures in found.items() if figures is None]
        if new:
            for recipe, figures in zip(new, self._measured(new), strict=True):
                self.store.keep_screened(self._key(recipe), figures)
                found[recipe] = figures
        return [found[recipe] or None for recipe in recipes]

    def _key(self, recipe: Recipe) -> str:
        """Return what figures depend on: the recipe, and the goals that say how files are made and what is measured."""
        return json.dumps([asdict(recipe), self._compact, self._times, self._weighs_ram], sort_keys=True)

    @property
    def _compact(self) -> bool:
        return self.goals.compacts(self.baseline)

    @property
    def _times(self) -> bool:
        return self.goals.max_latency is not None or self.goals.minimized == "latency"

    @property
    def _weighs_ram(self) -> bool:
        return self.goals.max_ram is not None or self.goals.minimized == "ram"

    def _measured(self, recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
        requests = [(recipe, self._compact) for recipe in recipes]
        with tempfile.TemporaryDirectory() as folder:
            figures: list[dict[str, Any]] = []
            paths: list[Path] = []
            for number, (content, reason) in enumerate(self.engine.map(untrained_file, requests)):
                self.case.bench.interruption.check()
                if content is None:
                    self.tell(Event(kind="note", text=f"{recipes[number].name}: not possible, {reason}"))
                    figures.append({})
                    continue
                paths.append(Path(folder) / f"{number}.tflite")
                paths[-1].write_bytes(content)
                figures.append({"size_bytes": len(content), "packed_bytes": 0, "ram_bytes": 0,
                                "slow_kernels": has_slow_kernels(content)})  # fmt: skip
            made = [row for row in figures if row]
            times = self._timed(paths)
            for row, path, time in zip(made, paths, times, strict=True):
                row.update(time)
                if self._weighs_ram:
                    memory = measure_memory(path)
                    row["ram_bytes"] = memory.arena_bytes or memory.resident_bytes
        for recipe, row in zip(recipes, figures, strict=True):
            if row:
                timed = f", {row['latency_ms']['p50']:.4g} ms" if self._times else ""
                text = f"untrained, {recipe.name}: {row['size_bytes'] / 1000:,.1f} KB{timed}"
                self.tell(Event(kind="note", text=text))
        return figures

    def _timed(self, paths: Sequence[Path]) -> list[dict[str, Any]]:
        """Return the times of files, beside the original's; the original's own where times do not matter."""
        if not self._times or not paths:
            return [{"latency_ms": dict(self.baseline["latency_ms"])} for _ in paths]
        before, *after = compare_latency([self.store.folder / self.baseline["file"], *paths], threads=self.case.threads)
        return [
            {
                "latency_ms": {"p50": one.p50_ms, "p90": one.p90_ms},
                "baseline_p50_ms": before.p50_ms, "baseline_p90_ms": before.p90_ms,
            }
            for one in after
        ]  # fmt: skip


def has_slow_kernels(content: bytes) -> bool:
    """Return whether a file has convolutions with weights of fewer than 8 bits; LiteRT has no fast kernels for them."""
    return any(
        "CONV" in operation.name and any(t is not None and t.is_quantized and t.bits < 8 for t in operation.inputs)
        for operation in read_graph(content).operations
    )


def untrained_file(case: Case, request: tuple[Recipe, bool]) -> tuple[bytes | None, str]:
    """Return a recipe's file, nothing in it trained, or None and the reason why there is none.

    Args:
        case: What trials have in common.
        request: The recipe, and whether the file is written without names and metadata.
    """
    recipe, compact = request
    steps = [pair for pair in recipe.plan((), 0).steps if pair[0] in ("shrink", "prune", "factorize")]
    split = case.calibration
    samples = None if split is None else list(split.take(SAMPLES).x)
    try:
        model = run_steps(steps, replace(case.bench, stages=None))
        return unchecked_file(model, recipe.written, samples, compact=compact), ""
    except REASONS as error:
        return None, str(error)
