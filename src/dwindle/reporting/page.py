"""The report as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from dwindle.reporting.advice import missed_goals, suggestions
from dwindle.reporting.latency_plot import make_latency_plot
from dwindle.reporting.layers import layer_table
from dwindle.reporting.numbers import format_bytes, format_metric, format_ms, significant, times
from dwindle.reporting.plot import make_plots, p50_of
from dwindle.reporting.snippets import snippets


def headline(report: Mapping[str, Any]) -> str:
    """Return the verdict in one sentence.

    Args:
        report: The content of ``report.json``.
    """
    before, after = report.get("baseline"), report.get("result")
    if not before or not after:
        if report.get("status") == "running":
            return "The search has begun."
        return "No file could be made yet." if report.get("status") == "interrupted" else "No file could be made."
    name = metric_name(report)
    size = times(before.get("size_bytes"), after.get("size_bytes"), "smaller", "larger")
    speed = times(p50_of(before), p50_of(after), "faster", "slower")
    metric = f"{name} {format_metric(before.get('accuracy'), name)} → {format_metric(after.get('accuracy'), name)}"
    return f"{size[0].upper()}{size[1:]} and {speed}, {metric}."


def verdict_line(report: Mapping[str, Any]) -> str:
    """Return whether the goals are met, and which are not."""
    if report.get("status") == "running":
        done = sum(trial.get("status", "done") == "done" for trial in report.get("trials") or [])
        best = "this is the best so far" if report.get("result") else "none meets the goals yet"
        return f"Running: {done} file{'' if done == 1 else 's'} measured, {best}."
    if report.get("status") == "interrupted":
        return "Interrupted: this is the best so far. Go on with --resume."
    missed = [verdict for verdict in report.get("verdicts") or [] if not verdict["met"]]
    if report.get("met"):
        noisy = any(verdict.get("within_noise") for verdict in report.get("verdicts") or [])
        samples = (report.get("confidence") or {}).get("samples", 0)
        return f"All goals met, within the noise of {samples:,} samples." if noisy else "All goals met."
    if not missed:
        return "The goals are not met."
    return (
        "Not met; the nearest file that was measured. Missed: " + "; ".join(verdict["text"] for verdict in missed) + "."
    )


def confidence_line(report: Mapping[str, Any]) -> str | None:
    """Return how sure the change of accuracy is, None where that is not known."""
    told = report.get("confidence")
    if not told or not told.get("samples"):
        return None
    both = told["only_before"] + told["only_after"]
    where = (report.get("metric") or {}).get("judged_on", "test")
    if both == 0:
        change = f"Of {told['samples']:,} {where} samples none changed between right and wrong"
    else:
        change = (
            f"Of {told['samples']:,} {where} samples {told['only_before']:,} went from right to wrong and "
            f"{told['only_after']:,} from wrong to right"
        )
    upper = 100 * told["upper"]
    bound = f"the loss is at most {upper:.2f} points" if upper > 0 else "the file is no less accurate"
    files = sum(trial.get("status") == "done" for trial in report.get("trials") or []) - 1
    judged = where in ("test", "held-back") and files > 1
    picked = f" These samples judge it only: others picked it, from {files} files." if judged else ""
    return f"{change}: with 95% confidence {bound}.{picked}"


def metric_name(report: Mapping[str, Any]) -> str:
    """Return the metric's name."""
    return str((report.get("metric") or {}).get("name", "accuracy"))


def render_html(report: Mapping[str, Any], *, live: str | None = None) -> str:
    """Return the page for a report, HTML text without any reference to another file or address.

    Its scripts are inline, the browser is told to run no other, and all is there without them.

    Args:
        report: The content of ``report.json``; keys other than ``version``, ``baseline`` and ``trials`` may be missing.
        live: The mark of the state that the report is of, for a page that asks the server that it came from for news
            (`dwindle.reporting.serving`); None: it asks nobody.
    """
    name, evidence = metric_name(report), report.get("evidence") or {}
    plots = make_plots(report)
    scripts = [_asset("page.js"), *([_asset("live.js")] if live else [])]
    page = environment(autoescape=True).get_template("page.html.jinja").render(
        r=report, headline=headline(report), verdict=verdict_line(report), confidence=confidence_line(report),
        plots=plots, best={trial for plot in plots for trial in plot.best}, cards=_cards(report),
        metric=lambda value: format_metric(value, name), metric_name=name,
        layers=layer_table(report), snippets=snippets(report), evidence=evidence,
        latency=make_latency_plot(evidence), stages=stage_rows(report), plan=plan_text(report),
        missed=missed_goals(report), suggestions=suggestions(report), style=_asset("page.css"), scripts=scripts,
        policy=_policy(scripts, connects=live is not None), live=live, integers=_has_integers(report),
        passed_over=_passed_over(report),
        packed=any(trial.get("packed_bytes") for trial in report.get("trials") or []),
    )  # fmt: skip
    return str(page)


def _passed_over(report: Mapping[str, Any]) -> str | None:
    """Return the trial with the smallest file that meets the goals, if another is chosen since its kernels are slow."""
    smallest = (report.get("alternatives") or {}).get("smallest")
    chosen = (report.get("result") or {}).get("id")
    slow = {trial["id"] for trial in report.get("trials") or [] if trial.get("slow_kernels")}
    return smallest if smallest in slow and smallest != chosen else None


def environment(*, autoescape: bool) -> Any:
    """Return the environment of the templates."""
    import jinja2

    made = jinja2.Environment(
        autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.Undefined,
        loader=jinja2.FunctionLoader(_asset), keep_trailing_newline=True,
    )  # fmt: skip
    made.filters.update(bytes=format_bytes, ms=format_ms, sig=significant)
    return made


def _asset(name: str) -> str:
    return files("dwindle.reporting").joinpath("templates", name).read_text(encoding="utf8")


def _policy(scripts: list[str], *, connects: bool) -> str:
    """Return a content security policy under which only our own scripts run, and nothing is loaded."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode("utf8")).digest()).decode("ascii") for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    connect = "; connect-src 'self'" if connects else ""
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}{connect}; "
        "base-uri 'none'; form-action 'none'"
    )


def _has_integers(report: Mapping[str, Any]) -> bool:
    """Whether weights of the chosen file are integers."""
    return any(0 < row["bits"] < 16 for row in (report.get("layers") or {}).get("result") or [])


def plan_text(report: Mapping[str, Any]) -> str | None:
    """Return the chosen file's plan as ``plan.yaml`` has it."""
    import yaml

    plan = report.get("plan")
    return yaml.safe_dump(plan, sort_keys=False, default_flow_style=None) if plan else None


def _cards(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    before, after = report.get("baseline"), report.get("result")
    if not before or not after:
        return []
    name = metric_name(report)
    change = "–"
    if before.get("accuracy") is not None and after.get("accuracy") is not None:
        difference = after["accuracy"] - before["accuracy"]
        change = f"{100 * difference:+.2f} points" if "accuracy" in name else f"{difference:+.4g}"
    arena = {"tflm-arena": "RAM (TFLM arena)", "litert-resident": "RAM (LiteRT process)"}
    p90 = f"p90 {format_ms((after.get('latency_ms') or {}).get('p90'))}"
    alike = before.get("ram_source") == after.get("ram_source")
    cards: list[dict[str, Any]] = [
        {"name": "File size", "before": format_bytes(before.get("size_bytes")),
         "after": format_bytes(after.get("size_bytes")), "more": f"{after.get('size_bytes', 0):,} bytes",
         "change": times(before.get("size_bytes"), after.get("size_bytes"), "smaller", "larger"),
         "pair": (before.get("size_bytes"), after.get("size_bytes"))},
        {"name": "Latency, p50", "before": format_ms(p50_of(before)), "after": format_ms(p50_of(after)), "more": p90,
         "change": times(p50_of(before), p50_of(after), "faster", "slower"), "pair": (p50_of(before), p50_of(after))},
        {"name": name[0].upper() + name[1:], "before": format_metric(before.get("accuracy"), name),
         "after": format_metric(after.get("accuracy"), name), "change": change, "pair": (None, None),
         "more": f"on {(report.get('metric') or {}).get('judged_on', 'test')} data"},
        {"name": arena.get(str(after.get("ram_source")), "RAM"), "before": format_bytes(before.get("ram_bytes")),
         "after": format_bytes(after.get("ram_bytes")), "more": "measured while it ran",
         "change": times(before.get("ram_bytes"), after.get("ram_bytes"), "less", "more") if alike else "–",
         "pair": (before.get("ram_bytes"), after.get("ram_bytes")) if alike else (None, None)},
    ]  # fmt: skip
    return [{**card, "bar": _share(*card["pair"]), "worse": _grew(*card["pair"])} for card in cards]


def _grew(before: float | None, after: float | None) -> bool:
    return bool(before and after and after > 1.005 * before)


def _share(before: float | None, after: float | None) -> float | None:
    """Return what is left of a figure in percent, at most 100; None where that is not known."""
    return round(min(100.0, 100 * after / before), 1) if before and after else None


def stage_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what each step of the chosen plan bought, the original first.

    Args:
        report: The content of ``report.json``; its result, or the trial that it is, has ``stages``.
    """
    result = report.get("result") or {}
    trials = report.get("trials") or []
    own: Mapping[str, Any] = next((trial for trial in trials if trial.get("id") == result.get("id")), {})
    stages = result.get("stages") or own.get("stages") or []
    if not stages or not trials:
        return []
    start = {**trials[0], "step": "the original", "seconds": None}
    found: list[dict[str, Any]] = []
    for stage in (start, *stages):
        last = found[-1] if found else None
        accuracy, size, latency = stage.get("accuracy"), stage.get("size_bytes"), p50_of(stage)
        found.append(
            {
                "step": stage.get("step"), "accuracy": accuracy, "size": size, "latency": latency,
                "seconds": stage.get("seconds"), "bar": _share(start.get("size_bytes"), size),
                "gain": None if last is None or accuracy is None or last["accuracy"] is None
                else accuracy - last["accuracy"],
                "smaller": times(last["size"], size, "smaller", "larger") if last else None,
                "faster": times(last["latency"], latency, "faster", "slower") if last else None,
            }
        )  # fmt: skip
    return found
