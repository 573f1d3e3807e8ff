"""Goals that were not met: what came nearest, what gave way for it, and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dwindle.reporting.numbers import format_bytes, format_metric, format_ms, significant
from dwindle.reporting.plot import latency_key, latency_of, p50_of

Trial = Mapping[str, Any]
NEAR = 1.25  # within a quarter of the limit more training may do

_OPTION = {
    "max_drop": "--max-drop", "max_relative_drop": "--max-relative-drop", "max_size": "--max-size",
    "max_packed": "--max-packed", "max_latency": "--max-latency", "max_ram": "--max-ram",
}  # fmt: skip
_LOSSES = ("points", "share")  # units of goals for the metric


def missed_goals(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each goal that the chosen file misses which measured files came nearest to it.

    Args:
        report: The content of ``report.json``.

    Returns:
        For each: ``text``; ``reaching``, the file that keeps this goal, or that is nearest to it, with what it gives
        up; and ``keeping``, the file that keeps all the other goals and is nearest to this one. Both are None where
        nothing was measured.
    """
    return [
        {
            "goal": verdict["goal"], "text": verdict["text"],
            "reaching": _reaching(report, verdict), "keeping": _keeping(report, verdict),
        }
        for verdict in report.get("verdicts") or [] if not verdict["met"]
    ]  # fmt: skip


def suggestions(report: Mapping[str, Any]) -> list[str]:
    """Return what to try, each a sentence, from the verdicts and what was measured.

    Args:
        report: The content of ``report.json``.
    """
    found: list[str] = []
    for verdict in report.get("verdicts") or []:
        if not verdict["met"]:
            found += _for_goal(report, verdict)
    if not found:
        return []
    trials = report.get("trials") or []
    late = sum("budget" in str(trial.get("reason") or "") for trial in trials if trial.get("status") == "skipped")
    if late:
        found.append(
            f"The time budget left {late} plan{'s' if late > 1 else ''} untried: go on with --resume and more."
        )
    chosen = (report.get("result") or {}).get("id")
    if any(trial.get("id") == chosen and trial.get("meets") for trial in trials):
        found.append(
            "The chosen file meets the goals on validation data and misses them on the data that judges. Ask for a "
            "little more than you need, or give more validation samples."
        )
    return list(dict.fromkeys(found))


def _done(report: Mapping[str, Any]) -> list[Trial]:
    return [trial for trial in report.get("trials") or [] if trial.get("status", "done") == "done"]


def _measured(report: Mapping[str, Any], verdict: Mapping[str, Any]) -> list[Trial]:
    """Return the trials that have a figure for a goal, without the original where there is another."""
    done = _done(report)
    return [trial for trial in done[1:] or done if value_of(report, trial, verdict) is not None]


def value_of(report: Mapping[str, Any], trial: Trial, verdict: Mapping[str, Any]) -> float | None:
    """Return a trial's figure for a verdict's goal, in its unit; None where it was not measured."""
    for own in trial.get("verdicts") or []:
        if own.get("goal") == verdict["goal"] and own.get("unit") == verdict["unit"]:
            return float(own["value"])
    trials = _done(report)
    original = trials[0] if trials else report.get("baseline") or {}
    if verdict["unit"] in _LOSSES:
        before, after = original.get("accuracy"), trial.get("accuracy")
        if before is None or after is None:
            return None
        loss = (before - after) * (1 if (report.get("metric") or {}).get("higher_is_better", True) else -1)
        return float(loss if verdict["unit"] == "points" else loss / max(abs(before), 1e-12))
    if verdict["unit"] == "bytes":
        value = trial.get(f"{str(verdict['goal']).removeprefix('max_')}_bytes")
        return None if value is None else float(value)
    key = latency_key(report)
    latency = latency_of(trial, key)
    if verdict["unit"] == "ms" or latency is None:
        return latency
    start = trial.get(f"baseline_{key}_ms") or latency_of(original, key)
    return latency / start if start and verdict["unit"] == "times the original" else None


def _within(report: Mapping[str, Any], trial: Trial, verdict: Mapping[str, Any]) -> bool:
    value = value_of(report, trial, verdict)
    return value is not None and value <= verdict["limit"] + 1e-9


def written(report: Mapping[str, Any], verdict: Mapping[str, Any], value: float | None) -> str:
    """Return a figure of a goal in words."""
    if value is None:
        return "not measured"
    if verdict["unit"] == "points":
        name = (report.get("metric") or {}).get("name", "accuracy")
        loss = f"{100 * abs(value):.2f} points" if "accuracy" in name else f"{significant(abs(value), 4)} {name}"
        return f"{'loses' if value >= 0 else 'gains'} {loss}"
    if verdict["unit"] == "share":
        return f"is {100 * abs(value):.2f}% {'worse' if value >= 0 else 'better'}"
    if verdict["unit"] == "bytes":
        more = {"max_ram": " of RAM", "max_packed": " packed"}.get(verdict["goal"], "")
        return f"needs {format_bytes(value)}{more}"
    return f"takes {format_ms(value) if verdict['unit'] == 'ms' else significant(value) + ' times the original'}"


def _told(report: Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    name = (report.get("metric") or {}).get("name", "accuracy")
    figures = [
        format_bytes(trial.get("size_bytes")),
        format_metric(trial.get("accuracy"), name),
        format_ms(p50_of(trial)),
    ]
    return {"id": trial.get("id"), "name": trial.get("name"), "file": trial.get("file"), "figures": ", ".join(figures)}


def _reaching(report: Mapping[str, Any], verdict: Mapping[str, Any]) -> dict[str, Any] | None:
    others = [other for other in report.get("verdicts") or [] if other is not verdict]
    trials = _measured(report, verdict)
    if not trials:
        return None
    within = [trial for trial in trials if _within(report, trial, verdict)]
    if within:
        best = min(within, key=lambda trial: sum(_excess(report, trial, other) for other in others))
    else:
        best = min(trials, key=lambda trial: value_of(report, trial, verdict) or 0.0)
    gave = [
        f"{written(report, other, value_of(report, best, other))}, where {_limit(other)} was asked for"
        for other in others if not _within(report, best, other)
    ]  # fmt: skip
    value = written(report, verdict, value_of(report, best, verdict))
    return {**_told(report, best), "value": value, "within": bool(within), "gave_way": gave}


def _keeping(report: Mapping[str, Any], verdict: Mapping[str, Any]) -> dict[str, Any] | None:
    others = [other for other in report.get("verdicts") or [] if other is not verdict]
    trials = [trial for trial in _measured(report, verdict) if all(_within(report, trial, other) for other in others)]
    if not others or not trials:
        return None
    best = min(trials, key=lambda trial: value_of(report, trial, verdict) or 0.0)
    return {**_told(report, best), "value": written(report, verdict, value_of(report, best, verdict))}


def _excess(report: Mapping[str, Any], trial: Trial, verdict: Mapping[str, Any]) -> float:
    value = value_of(report, trial, verdict)
    if value is None:
        return 1.0
    return max(0.0, value - float(verdict["limit"])) / float(
        0.01 if verdict["unit"] == "points" else verdict["limit"] or 1.0
    )


def _limit(verdict: Mapping[str, Any]) -> str:
    if verdict["unit"] == "points":
        return f"at most {100 * verdict['limit']:.2f} points"
    return f"at most {_asked(verdict, verdict['limit'])}"


def _asked(verdict: Mapping[str, Any], value: float) -> str:
    """Return a limit as the command takes it, rounded up to two digits."""
    if verdict["unit"] in _LOSSES:
        return f"{_up(100 * value)}%"
    if verdict["unit"] == "bytes":
        return f"{_up(value / 1000)}KB"
    return f"{_up(value)}{'ms' if verdict['unit'] == 'ms' else 'x'}"


def _up(value: float) -> str:
    """Return a positive number rounded up to three significant digits."""
    if value <= 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step - 1e-6) * step:.6g}"


def _for_goal(report: Mapping[str, Any], verdict: Mapping[str, Any]) -> list[str]:
    trials = _measured(report, verdict)
    reaching, keeping = _reaching(report, verdict), _keeping(report, verdict)
    if reaching is None:
        return []
    option = _OPTION.get(verdict["goal"], f"`{verdict['goal']}`")
    allow = None
    if keeping is not None:
        kept = value_of(report, next(t for t in trials if t.get("id") == keeping["id"]), verdict) or 0.0
        if kept > verdict["limit"]:
            near = verdict["unit"] not in _LOSSES and kept <= NEAR * verdict["limit"]
            little = " (not far: more --epochs or another --seed may do)" if near else ""
            allow = f"allow {option} {_asked(verdict, kept)}, and #{keeping['id']} meets every goal{little}"
    allow = allow or _for_accuracy(report, verdict, trials, option)
    if reaching["within"]:
        gave = "; ".join(reaching["gave_way"]) or "meets every goal on validation data"
        said = f"{_what(verdict)} is kept by #{reaching['id']}, which {gave}"
    else:
        count = f"{len(trials)} file{'s' if len(trials) > 1 else ''}"
        name = (report.get("metric") or {}).get("name", "accuracy")
        nearest = next(t for t in trials if t.get("id") == reaching["id"])
        said = (
            f"{_what(verdict)} of {_asked(verdict, verdict['limit'])} is beyond what {count} reached; the nearest "
            f"{reaching['value']} at {format_metric(nearest.get('accuracy'), name)} (#{reaching['id']})"
        )
        allow = allow or f"allow {option} {_asked(verdict, value_of(report, nearest, verdict) or 0.0)}"
    return [f"{said}: {f'{allow}; or ' if allow else ''}{_more(verdict)}."]


def _for_accuracy(
    report: Mapping[str, Any], verdict: Mapping[str, Any], trials: Sequence[Trial], option: str
) -> str | None:
    """Return what to allow for a file that keeps at least the goals for the metric; None where there is none."""
    losses = [other for other in report.get("verdicts") or [] if other["unit"] in _LOSSES and other is not verdict]
    accurate = [trial for trial in trials if all(_within(report, trial, other) for other in losses)]
    if not losses or not accurate:
        return None
    best = min(accurate, key=lambda trial: value_of(report, trial, verdict) or 0.0)
    value = value_of(report, best, verdict) or 0.0
    if value <= verdict["limit"]:
        return None
    return f"allow {option} {_asked(verdict, value)}, as #{best.get('id')} needs for the accuracy that was asked for"


def _what(verdict: Mapping[str, Any]) -> str:
    words = {"max_drop": "The accuracy goal", "max_size": "The size goal", "max_latency": "The latency goal",
             "max_ram": "The RAM goal", "max_relative_drop": "The accuracy goal",
             "max_packed": "The goal for the packed size"}  # fmt: skip
    return words.get(verdict["goal"], f"The goal {verdict['goal']}")


def _more(verdict: Mapping[str, Any]) -> str:
    longer = "train longer (--epochs, --budget) or with more data"
    ways = {
        "max_drop": longer,
        "max_relative_drop": longer,
        "max_packed": "try clusters or 4-bit weights, which pack well (a plan with cluster, or export: {scheme: int4})",
        "max_size": "pack the file (dwindle pack), try 4-bit weights (a plan with export: {scheme: int4}), or train "
        "narrow students longer (--epochs)",
        "max_latency": "use more threads (--threads 2), a smaller input, or measure on the device itself, whose ratios "
        "differ from this machine's",
        "max_ram": "make the input or the first layers smaller, where most RAM goes",
    }  # fmt: skip
    return ways.get(verdict["goal"], "spend more time (--budget, --epochs)")
