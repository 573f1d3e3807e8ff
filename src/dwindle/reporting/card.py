"""The report as a Markdown model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dwindle.reporting.advice import missed_goals, suggestions
from dwindle.reporting.numbers import format_metric
from dwindle.reporting.page import (
    confidence_line,
    environment,
    headline,
    metric_name,
    plan_text,
    stage_rows,
    verdict_line,
)
from dwindle.reporting.plot import p50_of


def render_card(report: Mapping[str, Any]) -> str:
    """Return the model card: what the file is, goals and verdict, figures, data, how it was made, limits, reproduction.

    Args:
        report: The content of ``report.json``.
    """
    made = environment(autoescape=False)
    made.filters.update(md=as_text, code=as_code)
    name = metric_name(report)
    evidence = report.get("evidence") or {}
    return str(
        made.get_template("model-card.md.jinja").render(
            r=report, headline=headline(report), verdict=verdict_line(report), confidence=confidence_line(report),
            metric=lambda value: format_metric(value, name), metric_name=name, p50=p50_of, plan=plan_text(report),
            stages=stage_rows(report), missed=missed_goals(report), suggestions=suggestions(report),
            classes=(evidence.get("classes") or {}).get("rows") or [], evidence=evidence,
        )
    )  # fmt: skip


def as_text(value: object) -> str:
    """Return text in one line in which nothing is Markdown or HTML."""
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", line)


def as_code(value: object) -> str:
    """Return text as a block of code that it can't end itself."""
    text = str(value).rstrip("\n")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
