"""The page and the card show the dict's numbers, load nothing, run only our own script, and survive missing parts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dwindle.reporting import (
    format_bytes,
    format_ms,
    headline,
    render_card,
    render_html,
    terminal_summary,
    write_report,
)
from dwindle.reporting.advice import missed_goals, suggestions
from dwindle.reporting.card import as_code, as_text
from dwindle.reporting.latency_plot import make_latency_plot
from dwindle.reporting.layers import layer_table, pair_rows
from dwindle.reporting.numbers import significant, times
from dwindle.reporting.page import stage_rows
from dwindle.reporting.plot import axes_of, make_plot, make_plots, pareto


def trial(number, **changes):
    made = {
        "id": f"{number:03d}", "name": f"trial {number}", "steps": ["shrink width=0.5", "export scheme=int8"],
        "file": f"trials/{number:03d}/model.tflite", "accuracy": 0.98 - 0.01 * number, "size_bytes": 1_000_000 // (number + 1),
        "latency_ms": {"p50": 0.4 / (number + 1), "p90": 0.5}, "ram_bytes": 9000, "ram_source": "tflm-arena", "sha256": "ab" * 32,
        "meets": number > 0, "seconds": 12.0, "parameters": 1000, "notes": [], "status": "done", "reason": None,
    }  # fmt: skip
    return {**made, **changes}


@pytest.fixture
def report():
    row = {"index": 0, "op": "CONV_2D", "name": "conv", "output_shape": [1, 5, 5, 2], "parameters": 20, "size_bytes": 80,
           "bits": 8, "sparsity": 0.25, "distinct": 7}  # fmt: skip
    return {
        "version": 1, "dwindle": "0.1.0", "created": "2026-01-02T03:04:05+00:00", "command": "dwindle compress a --data b",
        "seed": 0, "status": "met", "met": True, "seconds": 60.0,
        "model": {"name": "net", "source": "a", "parameters": 1000, "inputs": [{"name": "x", "shape": [1, 4], "dtype": "float32"}],
                  "outputs": [{"name": "y", "shape": [1, 3], "dtype": "float32"}]},
        "data": {"source": "b", "sha256": "cd" * 32, "train_samples": 100, "validation_samples": 10, "test_samples": 20},
        "metric": {"name": "accuracy", "higher_is_better": True, "judged_on": "test"},
        "goals": {"max_drop": 0.02, "max_size_bytes": 600_000},
        "verdicts": [{"goal": "max_size", "limit": 6e5, "value": 5e5, "unit": "bytes", "met": True, "text": "size 500.0 KB, at most 600.0 KB"}],
        "baseline": trial(0), "result": trial(1), "trials": [trial(0), trial(1), trial(2, status="skipped", reason="too large")],
        "layers": {"baseline": [row], "result": [row]},
        "verification": {"samples": 20, "max_abs_error": 0.0039, "quanta": 1.0, "same_class": 19, "ties": 1, "bound": "b", "reference": "the model"},
        "environment": {"cpu": "a cpu"}, "plan": {},
    }  # fmt: skip


HOSTILE = """<script>alert(1)</script>"><img src=x onerror=alert(1)> | [a](javascript:b) `c` {{ 7 * 7 }}"""
VOID = {"meta", "link", "img", "input", "br"}


@pytest.fixture
def full(report):
    """A report with every part."""
    rows = [
        {"class": 0, "name": "cat", "samples": 200, "before": 190, "after": 150, "only_before": 42, "only_after": 2, "low": -0.3,
         "high": -0.1, "change": "worse", "taken_for": "dog", "taken_count": 40},
        {"class": 1, "name": "dog", "samples": 100, "before": 90, "after": 91, "only_before": 1, "only_after": 2, "low": -0.05,
         "high": 0.07, "change": "within noise", "taken_for": "cat", "taken_count": 1},
    ]  # fmt: skip
    example = {
        "index": 1234,
        "change": "worse",
        "label": "cat",
        "before": "cat",
        "after": "dog",
        "before_share": 0.75,
        "after_share": 0.625,
    }
    operator = {
        "name": "conv",
        "operator": "CONV_2D",
        "weights": 4,
        "activations": 8,
        "sqnr_db": 21.5,
        "max_error": 0.125,
        "saturation": 0.01,
        "range": [-1.5, 2.5],
    }
    report["evidence"] = {
        "latency": {"threads": 2, "runs": [500, 1000],
                    "percentiles_ms": {"before": list(np.linspace(0.4, 0.5, 101)), "after": list(np.linspace(0.2, 0.25, 101))}},
        "classes": {"samples": 300, "of": 300, "note": None, "z": 2.24, "classes": 2, "worse": 1, "better": 0, "rows": rows},
        "changed": {"worse": 43, "better": 4, "samples": 300, "examples": [
            {**example, "image": "data:image/png;base64,iVBORw0KGgo=", "shape": "1×1×1"},
            {**example, "change": "better", "before_share": None, "after_share": None, "values": "1.5 2.5 …"}]},
        "operators": {"samples": 32, "operators": 12, "rows": [operator, {**operator, "name": "pool", "weights": None, "sqnr_db": None, "max_error": 0.0}]},
    }  # fmt: skip
    report["result"]["stages"] = [
        {"step": "shrink width=0.5", "accuracy": 0.5, "size_bytes": 800_000, "latency_ms": {"p50": 0.2, "p90": 0.3}, "seconds": 1.0},
        {"step": "export scheme=int8", "accuracy": 0.97, "size_bytes": 500_000, "latency_ms": None, "seconds": 2.5},
    ]  # fmt: skip
    report["confidence"] = {"samples": 300, "only_before": 43, "only_after": 4, "drop": 0.13, "upper": 0.1675}
    report["plan"] = {
        "version": 1,
        "name": "half",
        "steps": [{"shrink": {"width": 0.5}}, {"export": {"scheme": "int8"}}],
    }
    report["model"]["sha256"] = "ef" * 32
    return report


@pytest.fixture
def missed(report):
    """A report whose size goal nothing reaches, and whose accuracy goal only large files keep."""
    report.update(
        status="not met", met=False, goals={"max_drop": 0.015, "max_size_bytes": 2000},
        trials=[trial(0), trial(1, meets=False), trial(2, accuracy=0.6, size_bytes=9600, meets=False), trial(3, status="skipped", reason="the time budget is spent")],
    )  # fmt: skip
    report["result"] = {**trial(2, accuracy=0.6, size_bytes=9600, meets=False), "file": "model.tflite"}
    report["verdicts"] = [
        {"goal": "max_drop", "limit": 0.015, "value": 0.38, "unit": "points", "met": False, "text": "loss of 38.00 points, at most 1.50 lost"},
        {"goal": "max_size", "limit": 2000.0, "value": 9600.0, "unit": "bytes", "met": False, "text": "size 9.6 KB, at most 2.0 KB"},
        {"goal": "max_latency", "limit": 0.9, "value": 0.33, "unit": "times the original", "met": True, "text": "latency"},
    ]  # fmt: skip
    return report


class Page(HTMLParser):
    """Text, references, script, and whether every element is closed in its place."""

    def __init__(self):
        super().__init__()
        self.text, self.references, self.tags, self.scripts, self.handlers, self.ids = [], [], [], [], [], []
        self.open, self.policy, self.headings = [], None, []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        self.references += [
            value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "data")
        ]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.ids += [named["id"]] if "id" in named else []
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # noqa: ARG002
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        if where == "script":
            self.scripts.append(data)
        elif where != "style":
            self.text.append(data)
        if where in ("h1", "h2", "h3"):
            self.headings.append(where)


def read(report, **options):
    page = Page()
    page.feed(render_html(report, **options))
    assert page.open == []
    return page, " ".join(" ".join(page.text).split())


def test_the_page_shows_the_numbers_of_the_dict(report):
    _, text = read(report)
    for expected in ("2x smaller and 2x faster, accuracy 98.00% → 97.00%", "All goals met", "500 KB", "0.2 ms", "-1.00 points",
                     "the same class for 19 (1 of the others is an exact tie)", "1 output quantum", "too large", "ab" * 32, "25%"):  # fmt: skip
        assert expected in text, expected


@pytest.mark.parametrize("which", ["report", "full", "missed"])
def test_the_page_loads_nothing_and_runs_only_our_script(which, request):
    report = request.getfixturevalue(which)
    page, _ = read(report)
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert {reference[1:] for reference in page.references if reference[:1] == "#"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.handlers
    assert not re.search(r"https?://|url\(|@import", render_html(report))
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in page.policy
    assert page.policy.startswith("default-src 'none'")
    assert page.headings[0] == "h1"
    assert page.headings.count("h1") == 1


def test_a_live_page_may_ask_its_own_server(report):
    page, _ = read(report, live="mark")
    assert len(page.scripts) == 2
    assert "connect-src 'self'" in page.policy
    assert "connect-src" not in read(report)[0].policy


@pytest.mark.parametrize("which", ["full", "missed"])
def test_hostile_text_stays_text_everywhere(which, request):
    def poisoned(value, key=None):
        if isinstance(value, dict):
            return {k: poisoned(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(v, key) for v in value]
        kept = key in ("status", "id", "change", "created", "unit", "goal", "image")
        return HOSTILE if isinstance(value, str) and not kept else value

    report = poisoned(request.getfixturevalue(which))
    page, text = read(report)
    assert len(page.scripts) == 1
    assert "onerror" not in page.handlers
    assert page.tags.count("img") == (1 if which == "full" else 0)
    assert "<script>alert(1)</script>" in text
    assert "{{ 7 * 7 }}" in text
    card = re.sub(r"```.*?```", "", render_card(report), flags=re.S)
    assert "<" not in card
    assert not re.search(r"(?<!\\)\]\(", card)


@pytest.mark.parametrize(
    "missing",
    [
        "result",
        "verdicts",
        "layers",
        "verification",
        "goals",
        "environment",
        "model",
        "data",
        "metric",
        "trials",
        "evidence",
        "confidence",
        "plan",
    ],
)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_a_part_may_be_missing(full, missing, how, capsys):
    report = full
    if how == "absent":
        del report[missing]
    else:
        report[missing] = None
    page, text = read(report)
    assert "Reproduce" in text
    assert {reference[1:] for reference in page.references if reference[:1] == "#"} <= set(page.ids)
    assert render_card(report).startswith("# ")
    terminal_summary(report)
    assert capsys.readouterr().out


def test_verdicts_of_interrupted_and_missed_runs(report):
    report["status"] = "interrupted"
    assert "--resume" in read(report)[1]
    report.update(status="not met", met=False)
    report["verdicts"][0]["met"] = False
    assert "Missed: size 500.0 KB, at most 600.0 KB" in read(report)[1]


def test_the_json_is_the_dict(report, tmp_path):
    data, page, card = write_report(report, tmp_path)
    assert json.loads(data.read_text()) == report
    assert page.read_text() == render_html(report)
    assert card.read_text() == render_card(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-card.md", "report.html", "report.json"]


def test_pareto_front_is_that_of_brute_force():
    points = [tuple(point) for point in np.random.default_rng(0).integers(0, 12, (40, 2)).astype(float)]
    front = {points[i] for i in pareto(points)}
    expected = {
        a for a in points if not any((b[0] <= a[0] and b[1] > a[1]) or (b[0] < a[0] and b[1] >= a[1]) for b in points)
    }
    assert front == expected


def test_the_plot_is_in_scale(report):
    plot = make_plot(report, axes_of(report)[0])
    first, second = plot.points
    assert second.x < first.x
    assert second.y > first.y
    assert (first.kind, second.kind) == ("original", "chosen")
    assert second.x < plot.x_limit < first.x
    assert plot.best == ("001", "000")


def test_latency_is_an_axis_too(report):
    report["goals"]["max_latency_factor"] = 0.75
    size, latency = make_plots(report)
    assert (size.key, latency.key) == ("size", "latency")
    first, second = latency.points
    assert second.x < latency.x_limit < first.x
    report["goals"]["max_latency_ms"] = 0.1
    assert make_plot(report, axes_of(report)[1]).x_limit < second.x
    for each in report["trials"]:
        each["latency_ms"] = None
    assert [plot.key for plot in make_plots(report)] == ["size"]


def test_a_file_that_failed_badly_does_not_press_the_others_into_a_line(report):
    report["trials"] = [trial(n, accuracy=0.98 - 0.001 * n) for n in range(6)] + [trial(6, accuracy=0.1)]
    plot = make_plot(report, axes_of(report)[0])
    assert [point.far for point in plot.points] == [False] * 6 + [True]
    heights = [point.y for point in plot.points[:6]]
    assert max(heights) - min(heights) > 50
    assert plot.points[6].y == plot.bottom
    report["metric"] = {"name": "mae", "higher_is_better": False}
    report["trials"] = [trial(n, accuracy=0.1 + 0.001 * n) for n in range(6)] + [trial(6, accuracy=5.0)]
    plot = make_plot(report, axes_of(report)[0])
    assert plot.points[6].y == plot.top
    assert plot.points[6].far


def test_a_trial_without_a_figure_is_not_on_the_plot(report):
    report["trials"] += [trial(3, accuracy=float("nan")), trial(4, accuracy=None), trial(5, size_bytes=None)]
    assert [point.trial for point in make_plot(report, axes_of(report)[0]).points] == ["000", "001"]
    assert "nan" in read(report)[1]


def test_the_front_is_marked_in_the_table(report):
    report["trials"] = [
        trial(0),
        trial(1, accuracy=0.98),
        trial(2, accuracy=0.9, size_bytes=2_000_000, latency_ms={"p50": 0.01, "p90": 1}),
        trial(3, accuracy=0.5, size_bytes=2_000_000, latency_ms={"p50": 0.3, "p90": 1}),
    ]
    html = render_html(report)
    rows = re.findall(r'<tr id="trial-(\d+)".*?</tr>', html, re.S)
    marked = [
        number
        for number, row in zip(rows, html.split('<tr id="trial-')[1:], strict=True)
        if ">front<" in row.split("</tr>")[0]
    ]
    assert marked == ["001", "002"]  # by size, and by latency


def test_points_and_rows_belong_together(full):
    html = render_html(full)
    assert set(re.findall(r'class="point[^>]*data-trial="(\d+)"', html)) == {"000", "001"}
    assert re.findall(r'<tr id="trial-(\d+)" data-trial', html) == ["000", "001", "002"]
    assert html.count('href="#trial-001"') == 2  # one in each plot


def test_steps_and_what_each_bought(full):
    rows = stage_rows(full)
    assert [row["step"] for row in rows] == ["the original", "shrink width=0.5", "export scheme=int8"]
    assert [row["bar"] for row in rows] == [100.0, 80.0, 50.0]
    assert [row["gain"] for row in rows] == [None, pytest.approx(-0.48), pytest.approx(0.47)]
    assert [row["smaller"] for row in rows] == [None, "1.25x smaller", "1.6x smaller"]
    assert rows[1]["faster"] == "2x faster"
    _, text = read(full)
    assert "What each step bought" in text
    assert "-48.00" in text
    full["trials"][1]["stages"] = full["result"].pop("stages")
    assert stage_rows(full) == rows
    del full["trials"][1]["stages"]
    assert "What each step bought" not in read(full)[1]


def test_the_page_shows_the_evidence(full):
    _, text = read(full)
    for expected in (
        "43 went from right to wrong and 4 from wrong to right: with 95% confidence the loss is at most 16.75 points",
        "1 of 2 classes got worse by more than chance explains", "190 95.0% 150 75.0% 42 2 -20.00 -30.0 to -10.0 worse dog (40)",
        "From right to wrong: 43 of 300 samples, 1 shown", "was cat 75% now dog 62%", "sample 1,234", "1.5 2.5 …",
        "1,500 more runs of one sample on 2 threads", "original 0.41 ms 0.45 ms 0.49 ms 0.499 ms",
        "The 2 of 12 operators with most noise", "weights 4, output 8 21.5 dB 0.125 -1.5 to 2.5 1.00%", "exact", "ef" * 32,
        "- shrink: {width: 0.5}",
    ):  # fmt: skip
        assert expected in text, expected
    full["evidence"] = {part: {"reason": f"no {part} here"} for part in full["evidence"]}
    _, text = read(full)
    assert "Not shown: no classes here." in text
    assert "Not shown: no latency here." in text
    assert "Not shown: no operators here." in text


def test_latencies_are_drawn_where_they_were_measured(full):
    plot = make_latency_plot(full["evidence"])
    original, chosen = plot.curves
    assert [curve.name for curve in plot.curves] == ["original", "chosen"]
    assert chosen.marks[0][0] < original.marks[0][0]
    assert chosen.marks[0][1] == (plot.top + plot.bottom) / 2
    heights = [float(point.split(",")[1]) for point in original.points.split()]
    assert heights == sorted(heights, reverse=True)
    assert make_latency_plot({}) is None


def test_layers_are_paired_by_name_and_then_by_kind():
    def row(layer, op, size=10):
        return {
            "layer": layer,
            "op": op,
            "size_bytes": size,
            "bits": 8,
            "output_shape": [1],
            "sparsity": 0.0,
            "distinct": 1,
        }

    before = [
        row("conv1", "CONV_2D"),
        row("conv2", "CONV_2D"),
        row("old", "FULLY_CONNECTED"),
        row("out", "FULLY_CONNECTED"),
    ]
    after = [row("conv1", "CONV_2D"), row("new", "FULLY_CONNECTED"), row("more", "ADD"), row("out", "FULLY_CONNECTED")]
    found = [(a and a["layer"], b and b["layer"]) for a, b in pair_rows(before, after)]
    assert found == [("conv1", "conv1"), ("conv2", None), ("old", "new"), (None, "more"), ("out", "out")]
    table = layer_table({"layers": {"baseline": before, "result": after[:1]}})
    assert table["totals"] == [40, 10]
    assert [row["gone"] for row in table["rows"]] == [False, True, True, True]
    old = [
        {key: value for key, value in row.items() if key != "layer"} | {"name": "net/conv1/Relu;net/conv1/BiasAdd"}
        for row in before[:1]
    ]
    assert layer_table({"layers": {"baseline": old, "result": old}})["rows"][0]["name"] == "conv1"


def test_not_met_says_what_came_near_what_gave_way_and_what_to_try(missed, capsys):
    drop, size = missed_goals(missed)
    assert drop["reaching"]["id"] == "001"
    assert drop["reaching"]["within"]
    assert drop["reaching"]["gave_way"] == ["needs 500 KB, where at most 2KB was asked for"]
    assert drop["keeping"] is None
    assert size["reaching"]["id"] == "002"
    assert not size["reaching"]["within"]
    assert size["reaching"]["gave_way"] == ["loses 38.00 points, where at most 1.50 points was asked for"]
    assert size["keeping"]["id"] == "001"
    lines = suggestions(missed)
    assert lines[1].startswith(
        "The size goal of 2KB is beyond what 2 files reached; the nearest needs 9.6 KB at 60.00% (#002): allow --max-size 500KB, "
        "and #001 meets every goal; or pack the file"
    )
    assert lines[0].startswith("The accuracy goal is kept by #001, which needs 500 KB")
    assert "budget left 1 plan untried" in lines[2]
    assert len(lines) == 3
    for text in (read(missed)[1], " ".join(render_card(missed).replace("\\", "").split())):
        assert lines[1] in text
        assert "it loses 38.00 points" in text
    terminal_summary(missed)
    assert "allow --max-size 500KB" in " ".join(capsys.readouterr().out.split())


def test_goals_for_packed_bytes_relative_loss_and_p90(missed):
    for each, packed in zip(missed["trials"], (900_000, 300_000, 8000, None), strict=True):
        each["packed_bytes"] = packed
    missed["alternatives"] = {"smallest": "001", "most accurate": "000"}
    missed["goals"] = {"max_relative_drop": 0.02, "max_latency_factor": 0.5, "latency": "p90"}
    missed["verdicts"] = [
        {"goal": "max_relative_drop", "limit": 0.02, "value": 0.39, "unit": "share", "met": False, "text": "metric 39% worse"},
        {"goal": "max_packed", "limit": 7000.0, "value": 8000.0, "unit": "bytes", "met": False, "text": "packed size 8.0 KB"},
    ]  # fmt: skip
    lines = suggestions(missed)
    assert lines[0].startswith(
        "The accuracy goal is kept by #001, which needs 300 KB packed, where at most 7KB was asked for"
    )
    assert (
        "beyond what 2 files reached; the nearest needs 8 KB packed at 60.00% (#002): allow --max-packed 300KB, and #001"
        in lines[1]
    )
    _, text = read(missed)
    assert "the smallest is #001 , the most accurate is #000" in text
    assert "600 KB" not in text
    plots = make_plots(missed)
    assert plots[1].title == "latency of one sample, p90"
    assert plots[1].points[0].x == plots[1].points[1].x  # both have the same p90
    low = [point.y for point in plots[0].points]
    assert low[0] < plots[0].metric_limit < low[2]


def test_a_limit_to_allow_is_one_that_the_file_keeps(missed):
    missed["trials"][1]["size_bytes"] = 2001
    missed["trials"][2]["size_bytes"] = 123_456
    (line,) = [line for line in suggestions(missed) if line.startswith("The size goal")]
    assert (
        "allow --max-size 2.01KB, and #001 meets every goal (not far: more --epochs or another --seed may do)" in line
    )


def test_a_limit_to_allow_keeps_the_accuracy_at_least(missed):
    missed["verdicts"][2]["limit"] = 0.1  # nothing is that fast, so no file keeps all the other goals
    missed["verdicts"][2]["met"] = False
    size, latency = (line for line in suggestions(missed) if line.startswith(("The size", "The latency")))
    assert "(#002): allow --max-size 500KB, as #001 needs for the accuracy that was asked for; or" in size
    assert "allow --max-latency 0.5x, as #001 needs for the accuracy that was asked for; or" in latency


def test_what_grew_is_shown_as_worse(report):
    assert "change lost" not in render_html(report)
    report["result"]["latency_ms"] = {"p50": 0.5, "p90": 0.6}
    assert '<div class="change lost">1.25x slower</div>' in render_html(report)


def test_what_was_met_on_validation_data_only_is_said(missed):
    missed["trials"][2]["meets"] = True
    assert any("misses them on the data that judges" in line for line in suggestions(missed))


def test_nothing_is_suggested_where_all_is_met(full):
    assert suggestions(full) == []
    assert missed_goals(full) == []


def test_a_goal_within_noise_is_called_so(full):
    full["verdicts"][0]["within_noise"] = True
    assert "met, within noise" in read(full)[1]


def test_the_card_has_the_figures(full):
    card = render_card(full)
    for expected in (
        "# net\n", "**2x smaller and 2x faster, accuracy 98.00% → 97.00%.** All goals met.", "| accuracy (test data) | 98.00% | 97.00% |",
        "| file size | 1 MB | 500 KB |", "| latency, p50 | 0.4 ms | 0.2 ms |", "| cat | 200 | 190 | 150 | worse |",
        "| shrink width=0.5 | 50.00% | 800 KB | 0.2 ms |", "- met: size 500.0 KB, at most 600.0 KB", "100 training, 10 validation, 20 test",
        "```\ndwindle compress a --data b\n```", "- shrink: {width: 0.5}", "ab" * 32, "cd" * 32, "ef" * 32, "- cpu: a cpu",
        "1 of 2 classes got worse",
    ):  # fmt: skip
        assert expected in card, expected
    headings = re.findall(r"^## (.*)$", card, re.M)
    assert headings == [
        "What it is",
        "Goals and verdict",
        "Figures",
        "Data",
        "How it was made",
        "Limits",
        "Reproduction",
    ]


def test_text_for_markdown_is_neither_markdown_nor_html():
    assert (
        as_text("a|b\n<i>*c*</i> [d](e) `f` _g_ #h")
        == "a\\|b &lt;i&gt;\\*c\\*&lt;/i&gt; \\[d\\](e) \\`f\\` \\_g\\_ \\#h"
    )
    assert as_code("x\n```\ny") == "````\nx\n```\ny\n````"


def test_numbers_as_people_read_them():
    assert [format_bytes(n) for n in (0, 999, 1000, 33_056, 1_725_844)] == [
        "0 B",
        "999 B",
        "1 KB",
        "33.1 KB",
        "1.73 MB",
    ]
    assert format_ms(0.0696) == "69.6 µs"
    assert format_ms(2.345) == "2.35 ms"
    assert significant(1234.5) == "1,230"
    assert times(100, 50, "smaller", "larger") == "2x smaller"
    assert times(50, 100, "smaller", "larger") == "2x larger"
    assert times(100, 100.1, "smaller", "larger") == "the same"


def test_headline_without_a_result(report):
    report["result"] = None
    assert headline(report) == "No file could be made."


def test_from_how_many_files_the_chosen_one_was_picked_is_said(full):
    assert "others picked it" not in read(full)[1]
    full["trials"] += [{**full["trials"][1], "id": f"{number:03d}"} for number in range(3, 6)]
    full["metric"]["judged_on"] = "held-back"
    assert "These samples judge it only: others picked it, from 4 files." in read(full)[1]
    full["metric"]["judged_on"] = "train"
    assert "others picked it" not in read(full)[1]


def test_a_smaller_file_that_was_passed_over_is_explained(full):
    chosen = full["result"]["id"]
    other = next(t["id"] for t in full["trials"] if t["id"] != chosen)
    full["alternatives"] = {"smallest": other}
    said = f"#{other} has convolutions of fewer than 8 bits, which run slowly"
    assert said not in read(full)[1]
    next(t for t in full["trials"] if t["id"] == other)["slow_kernels"] = True
    assert said in read(full)[1]
    full["alternatives"] = {"smallest": chosen}
    assert said not in read(full)[1]
