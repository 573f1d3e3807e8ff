"""The page shows the dict's numbers, loads nothing, runs nothing, and survives missing parts."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from dwindle.reporting import format_bytes, format_ms, headline, render_html, terminal_summary, write_report
from dwindle.reporting.numbers import significant, times
from dwindle.reporting.plot import make_plot, pareto


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


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.text, self.references, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def read(report):
    page = Page()
    page.feed(render_html(report))
    return page, " ".join(" ".join(page.text).split())


def test_the_page_shows_the_numbers_of_the_dict(report):
    _, text = read(report)
    for expected in ("2x smaller and 2x faster, accuracy 98.00% → 97.00%", "All goals met", "500 KB", "0.2 ms", "-1.00 points",
                     "the same class for 19 (1 of the others is an exact tie)", "1 output quantum", "too large", "ab" * 32, "25%"):  # fmt: skip
        assert expected in text, expected


def test_the_page_loads_nothing_and_has_no_script(report):
    page, _ = read(report)
    assert all(reference.startswith("data:") for reference in page.references)
    assert "script" not in page.tags
    assert "url(" not in render_html(report)


def test_hostile_names_stay_text(report):
    report["trials"][1]["name"] = report["model"]["name"] = "<script>alert(1)</script>"
    page, text = read(report)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in text


@pytest.mark.parametrize(
    "missing",
    ["result", "verdicts", "layers", "verification", "goals", "environment", "model", "data", "metric", "trials"],
)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_a_part_may_be_missing(report, missing, how, capsys):
    if how == "absent":
        del report[missing]
    else:
        report[missing] = None
    assert "</html>" in render_html(report)
    terminal_summary(report)
    assert capsys.readouterr().out


def test_verdicts_of_interrupted_and_missed_runs(report):
    report["status"] = "interrupted"
    assert "--resume" in read(report)[1]
    report.update(status="not met", met=False)
    report["verdicts"][0]["met"] = False
    assert "Missed: size 500.0 KB, at most 600.0 KB" in read(report)[1]


def test_the_json_is_the_dict(report, tmp_path):
    data, page = write_report(report, tmp_path)
    assert json.loads(data.read_text()) == report
    assert page.read_text() == render_html(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_pareto_front_is_that_of_brute_force():
    points = [tuple(point) for point in np.random.default_rng(0).integers(0, 12, (40, 2)).astype(float)]
    front = {points[i] for i in pareto(points)}
    expected = {
        a for a in points if not any((b[0] <= a[0] and b[1] > a[1]) or (b[0] < a[0] and b[1] >= a[1]) for b in points)
    }
    assert front == expected


def test_the_plot_is_in_scale(report):
    plot = make_plot(report)
    first, second = plot.points
    assert second.x < first.x
    assert second.y > first.y
    assert (first.kind, second.kind) == ("original", "chosen")
    assert second.x < plot.size_limit < first.x


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
