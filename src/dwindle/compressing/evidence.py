"""Evidence: what an engineer asks after the verdict, gathered from the original's and the chosen file.

How long single runs take, which classes got worse and by how much more than chance, samples that changed from right to
wrong, and which operators of the quantized file err most. A part that does not apply says why, in words.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from dwindle.blaming import SQNR_SAMPLES, operator_errors
from dwindle.compressing.sample_pictures import Pictures
from dwindle.data import Split, spread
from dwindle.errors import DwindleError
from dwindle.lifting.flatbuffer import read_graph
from dwindle.measuring.accuracy import labelled_classes, predicted_classes
from dwindle.measuring.latency import time_runs
from dwindle.measuring.litert import LiteRTRunner

SAMPLES = 10_000
SECONDS = 10.0  # at most, for each file's predictions
WORSE, BETTER, CLASSES, OPERATORS = 12, 6, 40, 10
FEWEST = 50
COPIED_BYTES, ACTIVATION_BYTES = 500_000_000, 200_000_000
SLOWER = 10  # times, where every activation is kept and nothing is delegated
CONFIDENCE = 0.95


def evidence(
    baseline_file: str | Path,
    chosen_file: str | Path,
    split: Split | None,
    class_names: Sequence[str] | None = None,
    *,
    twin: str | Path | None = None,
    metric: Any = "accuracy",
    threads: int = 1,
) -> dict[str, Any]:
    """Return what the report shows below its verdict, as plain data.

    Args:
        baseline_file: The original's ``.tflite``.
        chosen_file: The ``.tflite`` that is compared with it.
        split: The samples that judge; None: only latencies.
        class_names: Names of the classes, where they are known.
        twin: The chosen file's trainable model, ``.keras``, from which its float file is written anew; None: no errors
            of operators.
        metric: As in `dwindle.measure`; tells classes from numbers where a model has one output unit.
        threads: Threads of the latency measurement.

    Returns:
        ``latency``, ``classes``, ``changed`` and ``operators``: each a dict, with nothing but a ``reason`` in it where
        the part does not apply.
    """
    found: dict[str, Any] = {"latency": _or_reason(lambda: _latency([baseline_file, chosen_file], threads))}
    told = _or_reason(lambda: _told(baseline_file, chosen_file, split, class_names, metric))
    if "reason" in told:
        found |= {"classes": told, "changed": told}
    else:
        found |= {"classes": told["classes"], "changed": told["changed"]}
    found["operators"] = _or_reason(lambda: _operators(chosen_file, twin, split))
    return found


def _or_reason(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a part, or why there is none: what explains a result must not be what loses it."""
    try:
        return part()
    except DwindleError as error:
        return {"reason": str(error)}
    except (ValueError, RuntimeError, IndexError, KeyError, TypeError, MemoryError) as error:
        return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _latency(files: Sequence[str | Path], threads: int) -> dict[str, Any]:
    """Return the percentiles 0 to 100 of both files' single runs."""
    runs = time_runs(files, threads=threads)
    percentiles = [[_short(v) for v in np.percentile(taken, np.arange(101))] for taken in runs]
    return {
        "threads": threads, "runs": [len(taken) for taken in runs],
        "percentiles_ms": {"before": percentiles[0], "after": percentiles[1]},
    }  # fmt: skip


def _told(before: Any, after: Any, split: Split | None, names: Any, metric: Any) -> dict[str, Any]:
    """Return the classes and the samples that changed."""
    if split is None or split.y is None:
        return {"reason": "there are no labels"}
    runners = [LiteRTRunner(file) for file in (before, after)]
    shapes = [runner.outputs[0].shape for runner in runners]
    units = shapes[0][-1] if len(shapes[0]) == 2 else 0
    reason = _not_classes(split.y, units, metric)
    if reason is not None or len(shapes[1]) != 2 or shapes[1][-1] != units:
        return {"reason": reason or "the two files' outputs differ in shape"}
    picked = spread(len(split), _affordable(runners, split))
    some = split.pick(picked)  # of all of them only views
    indices = np.arange(len(split))[picked]
    first, second = (runner.predict(list(some.x))[0] for runner in runners)
    named = functools.partial(_name, names)
    labels = labelled_classes(some.y).astype(np.int64)  # type: ignore[arg-type]
    table = class_table(labels, predicted_classes(first), predicted_classes(second), named)
    changed = _changed(some, labels, first, second, named, indices)
    outputs = len(runners[0].outputs)
    note = f"of the first of {outputs} outputs" if outputs > 1 else None
    return {"classes": {**table, "of": len(split), "note": note}, "changed": changed}


def _not_classes(y: np.ndarray, units: int, metric: Any) -> str | None:
    """Return why labels and outputs are not those of single classes, None where they are."""
    whole = y.dtype.kind in "iub" or (y.dtype.kind == "f" and bool(np.array_equal(y, np.rint(y))))
    if units < 1:
        return "the model does not give one class for a sample"
    if units == 1:
        accurate = "accuracy" in str(metric if isinstance(metric, str) else getattr(metric, "name", ""))
        two = y.size == len(y) and bool(np.isin(y, (0, 1)).all())
        return None if accurate and two else "the model gives numbers, not classes"
    if y.ndim == 1 and whole:
        return None if bool(((y >= 0) & (y < units)).all()) else "labels lie outside of the model's classes"
    one_hot = y.ndim == 2 and y.shape[1] == units and whole and bool((y.sum(axis=1) == 1).all() and (y >= 0).all())
    return None if one_hot else "the labels are not single classes"


def _affordable(runners: Sequence[LiteRTRunner], split: Split) -> int:
    """Return how many samples both files predict in the time there is; a choice of them is a copy, which has to fit."""
    count = int(min(SAMPLES, max(FEWEST, SECONDS / max(map(_once, runners)))))
    one = sum(array[:1].nbytes for array in split.x)
    return count if len(split) <= count else max(FEWEST, min(count, COPIED_BYTES // max(1, one)))


def _once(runner: LiteRTRunner) -> float:
    """Return the seconds of one run."""
    begun = time.perf_counter()
    runner.invoke()
    return max(1e-9, time.perf_counter() - begun)


def _name(names: Sequence[str] | None, number: int) -> str:
    return str(names[number]) if names is not None and 0 <= number < len(names) else str(number)


def class_table(
    labels: np.ndarray, before: np.ndarray, after: np.ndarray, named: Callable[[int], str] = str
) -> dict[str, Any]:
    """Return for each class how many samples two files have right, and how sure the change is.

    The interval is that of the paired change, with half an observation more in each cell as in
    `dwindle.measuring.paired.paired_drop`: with ``b`` samples that only the first file has right, ``c`` that only the
    second has, both plus 1/2, and ``n`` plus 2 samples it is ``(c - b) / n -+ z sqrt(b + c - (b - c)^2 / n) / n``. The
    quantile ``z`` is that of ``1 - 0.05 / (2 k)`` for ``k`` classes, so that with 95% confidence all intervals hold.

    Args:
        labels: The samples' classes.
        before: The classes that the first file names.
        after: The classes that the second file names.
        named: The name of a class.

    Returns:
        ``samples``, ``z``, and ``rows`` with the largest loss first.

    References:
        Agresti and Min 2005, Simple improved confidence intervals for comparing matched proportions, Statistics in
        Medicine 24(5), section 3. Bonferroni's correction for several intervals.
    """
    present = np.unique(labels)
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * len(present)))
    rows = [_class_row(int(number), labels, before, after, z, named) for number in present]
    rows.sort(key=lambda row: (row["only_after"] - row["only_before"], row["class"]))
    return {
        "samples": len(labels), "z": _short(z), "classes": len(rows), "rows": _ends(rows, CLASSES),
        "worse": sum(row["change"] == "worse" for row in rows),
        "better": sum(row["change"] == "better" for row in rows),
    }  # fmt: skip


def _class_row(
    number: int, labels: np.ndarray, before: np.ndarray, after: np.ndarray, z: float, named: Callable[[int], str]
) -> dict[str, Any]:
    own = labels == number
    first, second = before[own] == number, after[own] == number
    lost, won, samples = int((first & ~second).sum()), int((second & ~first).sum()), int(own.sum())
    b, c, n = lost + 0.5, won + 0.5, samples + 2
    middle, half = (c - b) / n, z * math.sqrt(b + c - (b - c) ** 2 / n) / n
    taken = np.bincount(after[own][first & ~second].astype(np.int64), minlength=1)
    change = "worse" if middle + half < 0 else "better" if middle - half > 0 else "within noise"
    return {
        "class": number, "name": named(number), "samples": samples, "before": int(first.sum()),
        "after": int(second.sum()), "only_before": lost, "only_after": won, "low": _short(middle - half),
        "high": _short(middle + half), "change": change,
        "taken_for": named(int(taken.argmax())) if lost else None, "taken_count": int(taken.max()) if lost else 0,
    }  # fmt: skip


def _ends(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the first and last rows where there are too many."""
    return rows if len(rows) <= count else [*rows[: count - count // 4], *rows[-(count // 4) :]]


def _changed(
    split: Split, labels: np.ndarray, first: np.ndarray, second: np.ndarray, named: Callable[[int], str],
    indices: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """Return samples that are right before and wrong after, the surest errors first; and some of the reverse."""
    before, after = predicted_classes(first), predicted_classes(second)
    worse = np.flatnonzero((before == labels) & (after != labels))
    better = np.flatnonzero((before != labels) & (after == labels))
    worse_shown = worse[np.argsort(-_margin(second, after, labels)[worse], kind="stable")][:WORSE]
    better_shown = better[np.argsort(-_margin(first, before, labels)[better], kind="stable")][:BETTER]
    chosen = np.concatenate([worse_shown, better_shown])
    pictures = Pictures(split.x, chosen)
    examples = []
    for number, change in [*((n, "worse") for n in worse_shown), *((n, "better") for n in better_shown)]:
        examples.append(
            {
                "index": int(indices[number]), "change": change, "label": named(int(labels[number])),
                "before": named(int(before[number])), "after": named(int(after[number])),
                "before_share": _share(first, number, before), "after_share": _share(second, number, after),
                **pictures.of(int(number)),
            }
        )  # fmt: skip
    return {"worse": len(worse), "better": len(better), "samples": len(labels), "examples": examples}


def _margin(outputs: np.ndarray, named: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return by how much each sample's class beats its label."""
    rows = np.arange(len(outputs))
    if outputs.shape[1] == 1:
        return np.asarray(np.abs(outputs[:, 0] - 0.5))
    return np.asarray(outputs[rows, named] - outputs[rows, labels])


def _share(outputs: np.ndarray, number: int, named: np.ndarray) -> float | None:
    """Return the probability of the class that is named; None where outputs are no probabilities."""
    row = outputs[number]
    if row.min() < 0 or row.max() > 1 or (len(row) > 1 and abs(float(row.sum()) - 1) > 0.05):
        return None
    value = float(row[int(named[number])]) if len(row) > 1 else float(row[0] if named[number] else 1 - row[0])
    return round(value, 3)


def _operators(chosen: str | Path, twin: str | Path | None, split: Split | None) -> dict[str, Any]:
    """Return the operators of the quantized file whose outputs are farthest from those of its float file."""
    from dwindle.exporting import float_file
    from dwindle.loading import load

    graph = read_graph(Path(chosen).read_bytes())
    if not any(tensor.is_quantized for tensor in graph.tensors):
        return {"reason": "the file computes with floats, so nothing is lost to integers"}
    if split is None:
        return {"reason": "there are no samples"}
    if twin is None or not Path(twin).exists():
        return {"reason": "the trainable twin of the file is not there"}
    made = sum(8 * math.prod(max(1, s) for s in t.shape) for op in graph.operations for t in op.outputs)
    quick = int(SECONDS / SLOWER / _once(LiteRTRunner(chosen)))
    samples = max(1, min(SQNR_SAMPLES, len(split), ACTIVATION_BYTES // max(1, made), quick))
    model = load(twin)
    found = operator_errors(float_file(model), chosen, split.take(samples), samples=samples)
    rows = [
        {
            "name": row.name, "operator": row.operator, "weights": row.weights, "activations": row.activations,
            "sqnr_db": _short(row.sqnr_db), "max_error": _short(row.max_error), "saturation": _short(row.saturation),
            "range": None if row.range is None else [_short(value) for value in row.range],
        }
        for row in sorted(found, key=lambda row: math.inf if row.sqnr_db is None else row.sqnr_db)
    ]  # fmt: skip
    return {"samples": samples, "operators": len(rows), "rows": rows[:OPERATORS]}


def _short(value: Any) -> float | None:
    """Return a number with four significant digits; None for one that is not finite, which JSON can't hold."""
    return float(f"{float(value):.4g}") if value is not None and math.isfinite(value) else None
