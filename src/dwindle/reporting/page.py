"""The report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from dwindle.reporting.numbers import format_bytes, format_metric, format_ms, significant, times
from dwindle.reporting.plot import make_plot


def headline(report: Mapping[str, Any]) -> str:
    """Return the verdict in one sentence.

    Args:
        report: The content of ``report.json``.
    """
    before, after = report.get("baseline"), report.get("result")
    if not before or not after:
        return "No file could be made yet." if report.get("status") == "interrupted" else "No file could be made."
    name = (report.get("metric") or {}).get("name", "accuracy")
    size = times(before.get("size_bytes"), after.get("size_bytes"), "smaller", "larger")
    speed = times(_p50(before), _p50(after), "faster", "slower")
    metric = f"{name} {format_metric(before.get('accuracy'), name)} → {format_metric(after.get('accuracy'), name)}"
    return f"{size[0].upper()}{size[1:]} and {speed}, {metric}."


def verdict_line(report: Mapping[str, Any]) -> str:
    """Return whether the goals are met, and which are not."""
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


def render_html(report: Mapping[str, Any]) -> str:
    """Return the page for a report, HTML text without any reference to another file or address.

    Args:
        report: The content of ``report.json``; keys other than ``version``, ``baseline`` and ``trials`` may be missing.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.Undefined)
    environment.filters.update(bytes=format_bytes, ms=format_ms, sig=significant)
    template = files("dwindle.reporting").joinpath("report.html.jinja").read_text(encoding="utf8")
    name = (report.get("metric") or {}).get("name", "accuracy")
    return environment.from_string(template).render(
        r=report, headline=headline(report), verdict=verdict_line(report), plot=make_plot(report),
        cards=_cards(report), metric=lambda value: format_metric(value, name), metric_name=name,
        layers=_layers(report), snippets=_snippets(report),
    )  # fmt: skip


def _p50(trial: Mapping[str, Any]) -> float | None:
    value = (trial.get("latency_ms") or {}).get("p50")
    return None if value is None else float(value)


def _cards(report: Mapping[str, Any]) -> list[dict[str, str]]:
    before, after = report.get("baseline"), report.get("result")
    if not before or not after:
        return []
    name = (report.get("metric") or {}).get("name", "accuracy")
    change = "–"
    if before.get("accuracy") is not None and after.get("accuracy") is not None:
        difference = after["accuracy"] - before["accuracy"]
        change = f"{100 * difference:+.2f} points" if "accuracy" in name else f"{difference:+.4g}"
    arena = {"tflm-arena": "RAM (TFLM arena)", "litert-resident": "RAM (LiteRT process)"}
    p90 = f"p90 {format_ms((after.get('latency_ms') or {}).get('p90'))}"
    return [
        {"name": "File size", "before": format_bytes(before.get("size_bytes")),
         "after": format_bytes(after.get("size_bytes")), "more": f"{after.get('size_bytes', 0):,} bytes",
         "change": times(before.get("size_bytes"), after.get("size_bytes"), "smaller", "larger")},
        {"name": "Latency, p50", "before": format_ms(_p50(before)), "after": format_ms(_p50(after)), "more": p90,
         "change": times(_p50(before), _p50(after), "faster", "slower")},
        {"name": name[0].upper() + name[1:], "before": format_metric(before.get("accuracy"), name),
         "after": format_metric(after.get("accuracy"), name), "change": change,
         "more": f"on {(report.get('metric') or {}).get('judged_on', 'test')} data"},
        {"name": arena.get(str(after.get("ram_source")), "RAM"), "before": format_bytes(before.get("ram_bytes")),
         "after": format_bytes(after.get("ram_bytes")), "more": "measured while it ran",
         "change": times(before.get("ram_bytes"), after.get("ram_bytes"), "less", "more")
         if before.get("ram_source") == after.get("ram_source") else "–"},
    ]  # fmt: skip


def _layers(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of operators with the width of each bar in percent."""
    tables = []
    for key, title in (("baseline", "Original"), ("result", "Result")):
        rows: Sequence[Mapping[str, Any]] = (report.get("layers") or {}).get(key) or []
        if not rows:
            continue
        largest = max((row["size_bytes"] for row in rows), default=0) or 1
        kept = [{**row, "width": round(100 * row["size_bytes"] / largest, 1)} for row in rows if row["size_bytes"]]
        rest = len(rows) - len(kept)
        total = sum(row["size_bytes"] for row in rows)
        tables.append({"title": title, "rows": kept, "rest": rest, "total": total})
    return tables


def _snippets(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return how to load and run the file, by platform."""
    inputs = (report.get("model") or {}).get("inputs") or [{}]
    shape = inputs[0].get("shape") or [1]
    floats = 1
    for size in shape:
        floats *= int(size or 1)
    outputs = (report.get("model") or {}).get("outputs") or [{}]
    units = int((outputs[0].get("shape") or [1, 1])[-1] or 1)
    python = (
        "import numpy as np\nfrom ai_edge_litert.interpreter import Interpreter\n\n"
        'interpreter = Interpreter("model.tflite", num_threads=1)\ninterpreter.allocate_tensors()\n'
        "entry, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]\n"
        f"x = np.zeros({list(shape)}, np.float32)  # one sample, scaled as in training\n"
        'interpreter.set_tensor(entry["index"], x)\ninterpreter.invoke()\n'
        'print(interpreter.get_tensor(result["index"]))'
    )
    kotlin = (
        '// build.gradle: implementation("com.google.ai.edge.litert:litert:1.+")\n'
        "import org.tensorflow.lite.Interpreter\nimport org.tensorflow.lite.support.common.FileUtil\n\n"
        'val interpreter = Interpreter(FileUtil.loadMappedFile(context, "model.tflite"))\n'
        f"val input = java.nio.ByteBuffer.allocateDirect({4 * floats}).order(java.nio.ByteOrder.nativeOrder())\n"
        f"val output = Array(1) {{ FloatArray({units}) }}\n"
        "interpreter.run(input, output)"
    )
    swift = (
        "// Podfile: pod 'TensorFlowLiteSwift'\nimport TensorFlowLite\n\n"
        'let path = Bundle.main.path(forResource: "model", ofType: "tflite")!\n'
        "let interpreter = try Interpreter(modelPath: path)\ntry interpreter.allocateTensors()\n"
        f"let input = [Float](repeating: 0, count: {floats})\n"
        "try interpreter.copy(input.withUnsafeBufferPointer(Data.init(buffer:)), toInputAt: 0)\n"
        "try interpreter.invoke()\nlet output = try interpreter.output(at: 0).data"
    )
    cpp = (
        '#include "tensorflow/lite/interpreter_builder.h"\n#include "tensorflow/lite/kernels/register.h"\n'
        '#include "tensorflow/lite/model_builder.h"\n\n'
        'auto model = tflite::FlatBufferModel::BuildFromFile("model.tflite");\n'
        "tflite::ops::builtin::BuiltinOpResolver resolver;\nstd::unique_ptr<tflite::Interpreter> interpreter;\n"
        "tflite::InterpreterBuilder(*model, resolver)(&interpreter);\ninterpreter->AllocateTensors();\n"
        f"float* input = interpreter->typed_input_tensor<float>(0);  // {floats} values\n"
        f"interpreter->Invoke();\nfloat* output = interpreter->typed_output_tensor<float>(0);  // {units} values"
    )
    return [
        {"name": "Python", "code": python}, {"name": "Android (Kotlin)", "code": kotlin},
        {"name": "iOS (Swift)", "code": swift}, {"name": "Linux (C++)", "code": cpp},
    ]  # fmt: skip
