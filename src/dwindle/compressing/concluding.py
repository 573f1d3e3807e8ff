"""The end of a search: the chosen file is judged on held-back data and published, and the report written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import keras
import numpy as np

import dwindle
from dwindle.compressing.events import Event
from dwindle.compressing.evidence import evidence
from dwindle.compressing.goals import Verdict
from dwindle.compressing.plans import Plan
from dwindle.compressing.search import Search, fingerprint
from dwindle.compressing.trying import REASONS, figures_of
from dwindle.compressing.trying import pair as pair_of
from dwindle.data import Data, Split
from dwindle.errors import DwindleError
from dwindle.exporting import export, output_quanta, predict
from dwindle.exporting.verify import BOUNDS, compare
from dwindle.files import write_text
from dwindle.measuring import (
    LiteRTRunner,
    compare_latency,
    environment,
    higher_is_better,
    inspect_file,
    measure,
)
from dwindle.measuring.paired import PairedDrop, paired_drop
from dwindle.quantization.schemes import resolve_scheme
from dwindle.reporting import write_report


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `compress` found.

    Attributes:
        met: Whether the chosen file meets every goal, judged on data that did not pick it.
        interrupted: Whether the search was stopped before its end.
        file: The chosen file, ``model.tflite`` in the out folder; None if nothing could be written.
        verdicts: Each goal with what was measured.
        report: The content of ``report.json``.
    """

    met: bool
    interrupted: bool
    file: Path | None
    verdicts: tuple[Verdict, ...]
    report: Mapping[str, Any]


def conclude(search: Search, facts: Mapping[str, Any]) -> Result:
    """Judge the best trial on held-back data, publish its files and write the report.

    Args:
        search: The search, at its end or interrupted.
        facts: ``source``, ``command``, ``seed``, ``seconds``, ``interrupted``, ``threads``, ``held_back``.
    """
    chosen = search.best() if search.trials else None
    report = _frame(search, facts)
    report["model"]["sha256"] = fingerprint(search.case.bench.original)
    verdicts: list[Verdict] = []
    if chosen is not None:
        baseline, result, verification = _judge(search, chosen)
        sure = _confidence(search, chosen)
        upper = None if sure is None else sure.upper
        verdicts = search.goals.judge(baseline, result, higher_is_better(search.case.metric), upper)
        report["confidence"] = None if sure is None else sure.to_dict()
        search.store.publish(chosen["id"])
        result["file"] = "model.tflite"
        folder = search.store.folder
        if search.case.target.runtime == "micro":
            result["micro"] = _sources(search, folder)
        write_text(folder / "plan.yaml", Plan.from_dict(chosen["plan"]).to_yaml())
        report |= {
            "baseline": baseline, "result": result, "verification": verification, "plan": chosen["plan"],
            "alternatives": search.alternatives(),
            "layers": {"baseline": _rows(folder / search.trials[0]["file"]), "result": _rows(folder / "model.tflite")},
        }  # fmt: skip
        if not facts["interrupted"]:  # who stops a search does not want to wait
            result["stages"] = _stages(search, chosen)
            report["evidence"] = evidence(
                folder / search.trials[0]["file"], folder / "model.tflite",
                search.case.data.evaluation(), search.case.data.class_names,
                twin=folder / "model.keras", metric=search.case.metric, threads=search.case.threads,
            )  # fmt: skip
    met = bool(verdicts) and all(verdict.met for verdict in verdicts)
    report["verdicts"] = [verdict.to_dict() for verdict in verdicts]
    report["met"] = met
    report["status"] = "interrupted" if facts["interrupted"] else ("met" if met else "not met")
    write_report(report, search.store.folder)
    file = search.store.folder / "model.tflite" if chosen is not None else None
    return Result(met=met, interrupted=facts["interrupted"], file=file, verdicts=tuple(verdicts), report=report)


def _judge(search: Search, chosen: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Measure the original's and the chosen file once more: on test data, and side by side."""
    split = search.case.data.test or search.case.data.val or search.case.data.train
    pair = pair_of(split)
    files = [search.store.folder / search.trials[0]["file"], search.store.folder / chosen["file"]]
    timed = compare_latency(files, threads=search.case.threads)
    judged = []
    for trial, path, latency in zip((search.trials[0], chosen), files, timed, strict=True):
        figures = figures_of(measure(path, pair, metric=search.case.metric, threads=search.case.threads))
        figures["latency_ms"] = {"p50": latency.p50_ms, "p90": latency.p90_ms}
        if trial is chosen:
            figures["baseline_p50_ms"], figures["baseline_p90_ms"] = timed[0].p50_ms, timed[0].p90_ms
        kept = {k: v for k, v in trial.items() if k != "plan"}
        judged.append({**kept, **figures, "validation_accuracy": trial["accuracy"]})
    verification = _verify(chosen, files[1], split)
    if verification is not None:
        judged[1]["verification"] = verification
    return judged[0], judged[1], verification


def _stages(search: Search, chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what each part of the chosen plan reached: float32 files of its trained stages, and the file itself."""
    steps = Plan.from_dict(chosen["plan"]).steps
    stages, pair, rows, begun = search.case.bench.stages, pair_of(search.case.judging), [], 0
    baseline = search.store.folder / search.trials[0]["file"]
    for count in range(1, len(steps)):
        if stages is None or steps[count - 1][0] != "train" or any(step == "quantize" for step, _ in steps[:count]):
            continue
        found, model = stages.nearest(steps[:count])
        if found < count or model is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "stage.tflite"
            try:
                export(model, path)
                figures = figures_of(measure(path, pair, metric=search.case.metric, threads=search.case.threads))
            except REASONS:  # a stage in the middle may have no file of its own
                continue
            _, timed = compare_latency([baseline, path], threads=search.case.threads)
        rows.append({
            "step": _said(steps[begun:count]), "accuracy": figures["accuracy"], "size_bytes": figures["size_bytes"],
            "latency_ms": {"p50": timed.p50_ms, "p90": timed.p90_ms}, "seconds": None,
        })  # fmt: skip
        begun = count
    last = {key: chosen[key] for key in ("accuracy", "size_bytes", "latency_ms")}
    return [*rows, {"step": _said(steps[begun:]), **last, "seconds": chosen["seconds"]}]


# What tells most about a step.
_MAIN = {"shrink": ("width", "depth"), "prune": ("sparsity", "structure"), "factorize": ("energy",),
         "cluster": ("clusters",), "quantize": ("scheme",), "train": ("epochs",), "export": ("scheme",)}  # fmt: skip


def _said(steps: Any) -> str:
    return ", ".join(f"{step} " + " ".join(f"{key}={options[key]}" for key in _MAIN[step]) for step, options in steps)


def _sources(search: Search, folder: Path) -> dict[str, Any]:
    """Write the chosen model's sources for a microcontroller; return what was measured, or why there are none."""
    from dwindle.loading import load
    from dwindle.micro import export_micro

    split = search.case.data.train or search.case.data.val or search.case.data.test
    samples = None if split is None else list(split.take(256).x)
    try:
        made = export_micro(load(folder / "model.keras"), folder / "micro", data=samples, decode=True)
    except DwindleError as error:
        search.tell(Event(kind="note", text=f"no sources for the microcontroller: {error}"))
        return {"reason": str(error)}
    kept = ("size_bytes", "arena_bytes", "needed_bytes", "operators", "notes")
    return {name: value for name, value in made.to_dict().items() if name in kept} | {"folder": "micro"}


def _confidence(search: Search, chosen: Mapping[str, Any]) -> PairedDrop | None:
    """Return how sure the loss of accuracy is, on the samples that judge; None for other metrics or without labels."""
    split = search.case.data.test or search.case.data.val or search.case.data.train
    if search.case.metric != "accuracy" or split is None or split.y is None:
        return None
    files = [search.store.folder / trial["file"] for trial in (search.trials[0], chosen)]
    before, after = (LiteRTRunner(file).predict(list(split.x))[0] for file in files)
    return paired_drop(before, after, np.asarray(split.y))


def _verify(chosen: Mapping[str, Any], file: Path, split: Split | None) -> dict[str, Any] | None:
    """Compare the chosen file with its trainable twin on the whole judging set, where the twin rounds alike."""
    from dwindle.loading import load

    static = resolve_scheme(chosen["plan"]["steps"][-1]["export"]["scheme"]).needs_data
    if split is None or not static:
        return chosen.get("verification")
    twin = load(file.with_name("model.keras"))
    if not getattr(twin, "quantization", None):
        return chosen.get("verification")
    found = LiteRTRunner(file).predict(list(split.x))
    expected = predict(twin, list(split.x))
    result = compare(
        expected, found, BOUNDS["static"], reference="the model in quantized training",
        quanta=output_quanta(file.read_bytes()),
    )  # fmt: skip
    return result.to_dict()


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row.to_dict() for row in inspect_file(path).rows]


def _frame(search: Search, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of the report that do not depend on what was chosen."""
    model, data, goals, metric = search.case.bench.original, search.case.data, search.goals, search.case.metric

    def described(tensors: Any) -> list[dict[str, Any]]:
        return [
            {"name": t.name, "shape": [1, *t.shape[1:]], "dtype": keras.backend.standardize_dtype(t.dtype)}
            for t in tensors
        ]

    counts = {f"{name}_samples": len(part) if part is not None else 0
              for name, part in (("train", data.train), ("validation", data.val), ("test", data.test))}  # fmt: skip
    return {
        "version": 1,
        "dwindle": dwindle.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": facts["command"],
        "seed": facts["seed"],
        "seconds": facts["seconds"],
        "model": {
            "name": model.name, "source": facts["source"], "parameters": int(model.count_params()),
            "inputs": described(model.inputs), "outputs": described(model.outputs),
        },
        "target": {"name": search.case.target.name, "runtime": search.case.target.runtime},
        "data": {"source": data.source, "sha256": data.sha256, "class_names": data.class_names, **counts},
        "metric": {
            "name": metric if isinstance(metric, str) else getattr(metric, "name", "metric"),
            "higher_is_better": higher_is_better(metric),
            "judged_on": _judged_on(data, facts["held_back"]),
        },
        "goals": {
            "max_drop": goals.max_drop, "max_relative_drop": goals.max_relative_drop, "max_size_bytes": goals.max_size,
            "max_packed_bytes": goals.max_packed, "max_latency_ms": goals.max_latency_ms,
            "max_latency_factor": goals.max_latency_factor, "latency": goals.latency, "max_ram_bytes": goals.max_ram,
            "minimize": goals.minimized,
        },
        "baseline": search.trials[0] if search.trials else None,
        "result": None,
        "trials": [{k: v for k, v in trial.items() if k != "plan"} for trial in search.trials],
        "environment": {**environment(), "threads": str(facts["threads"])},
    }  # fmt: skip


def _judged_on(data: Data, held_back: bool) -> str:
    if held_back:
        return "held-back"
    return "test" if data.test else "validation" if data.val else "train"
