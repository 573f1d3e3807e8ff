"""Blame: every figure against files written by hand, and advice that holds when it is followed."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pytest
from zoo import ZOO, samples, settle

import dwindle as dw
from dwindle.blaming import Blame, blame
from dwindle.cli import main
from dwindle.exporting.convert import float_file
from dwindle.exporting.verify import activations_of
from dwindle.lifting.flatbuffer import read_graph
from dwindle.measuring.litert import LiteRTRunner
from dwindle.micro.stripping import strip
from dwindle.quantization.assignment import display_names
from dwindle.quantization.calibration import calibrate
from dwindle.quantization.schemes import SCHEMES, resolve_scheme
from dwindle.quantization.writing import write_quantized
from dwindle.reporting import blame_svg

LAYERS = ["conv", "pool", "hidden", "digit", "softmax"]


@pytest.fixture(scope="module")
def files(trained, digits, tmp_path_factory):
    """Files of the digits' network: float, 8 bits, and 8 bits with the weights of `hidden` cut at a twentieth."""
    folder = tmp_path_factory.mktemp("blame")
    content = float_file(trained)
    ranges = calibrate(content, [digits[0][0][:200]])
    kernel = next(op.inputs[1] for op in read_graph(content).operations if op.name == "FULLY_CONNECTED")
    cut = {kernel.name: np.abs(kernel.value).max(axis=1, keepdims=True) / 20}
    (folder / "float.tflite").write_bytes(content)
    (folder / "int8.tflite").write_bytes(write_quantized(content, SCHEMES["int8"], ranges))
    (folder / "bad.tflite").write_bytes(write_quantized(content, SCHEMES["int8"], ranges, weight_bounds=cut))
    (x, y), (x_test, y_test) = digits
    np.savez(folder / "digits.npz", x_train=x[:200], y_train=y[:200], x_test=x_test, y_test=y_test)
    return folder


@pytest.fixture(scope="module")
def bad(files, digits):
    return blame(files / "float.tflite", files / "bad.tflite", digits[1])


def accuracy(content, data):
    return float((LiteRTRunner(content).predict([data[0]])[0].argmax(axis=1) == data[1]).mean())


def rows_of(found):
    return {row.name: row for row in found.rows}


def test_the_bad_layer_is_the_one_that_is_named(bad, files, digits):
    rows = rows_of(bad)
    assert [row.operator for row in bad.rows] == [
        "CONV_2D",
        "MAX_POOL_2D",
        "FULLY_CONNECTED",
        "FULLY_CONNECTED",
        "SOFTMAX",
    ]
    assert list(rows)[:4] == ["conv", "pool", "hidden", "digit"]
    assert bad.metric == "accuracy"
    assert bad.samples == len(digits[1][0])
    assert bad.float_value == accuracy(files / "float.tflite", digits[1])
    assert bad.quantized_value == accuracy(files / "bad.tflite", digits[1]) < bad.float_value - 0.1
    assert max(rows.values(), key=lambda row: row.without).name == "hidden"
    assert min(rows.values(), key=lambda row: row.only).name == "hidden"
    assert rows["hidden"].without >= bad.float_value - 0.01
    assert all(abs(row.only - bad.float_value) < 0.01 for name, row in rows.items() if name != "hidden")
    assert re.match(
        r"Keep `hidden` in 16 bits: \+[\d.]+ points for [+-][\d.]+ KB \(scheme \{'\*': 'int8', 'hidden': 'int16x8'\}\)\.$",
        bad.advice,
    )
    assert rows["conv"].sqnr_db > 30 > 10 > rows["hidden"].sqnr_db


def test_the_advice_gives_what_it_says_when_it_is_followed(bad, files, digits, tmp_path):
    points, kilobytes = (
        float(value) for value in re.search(r"\+([\d.]+) points for ([+-][\d.]+) KB", bad.advice).groups()
    )
    scheme = eval(re.search(r"scheme (\{.*\})\)", bad.advice).group(1))  # as a user pastes it
    artefact = dw.export(
        dw.lift(files / "float.tflite"), tmp_path / "better.tflite", scheme=scheme, data=digits[0][0][:200]
    )
    better = accuracy(artefact.path, digits[1])
    assert 100 * (better - bad.quantized_value) == pytest.approx(points, abs=100 * 3 / 600)  # three samples
    size = (files / "bad.tflite").stat().st_size
    assert (artefact.size_bytes - size) / 1000 == pytest.approx(kilobytes, abs=0.06)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_only_and_without_are_the_accuracies_of_files_written_by_hand(scheme, files, digits, tmp_path):
    calibration = digits[0][0][:200]
    few = (digits[1][0][:300], digits[1][1][:300])
    model = dw.lift(files / "float.tflite")
    whole = dw.export(model, tmp_path / "q.tflite", scheme=scheme, data=calibration)
    rows = rows_of(blame(files / "float.tflite", whole.path, few))
    for name in ("conv", "hidden"):
        only = dw.export(model, tmp_path / "only.tflite", scheme={name: scheme}, data=calibration)
        assert rows[name].only == accuracy(only.path, few)
        rest = dw.export(model, tmp_path / "rest.tflite", scheme={"*": scheme, name: "float32"}, data=calibration)
        assert rows[name].without == accuracy(rest.path, few)


def test_fidelity_is_numpys(files, digits):
    """SQNR, largest error, range and saturation against activations read out of both files."""
    x = digits[1][0][:64]
    found = rows_of(blame(files / "float.tflite", files / "bad.tflite", digits[1], samples=64))
    graph = read_graph((files / "float.tflite").read_bytes())
    before, after = (activations_of((files / name).read_bytes(), [x]) for name in ("float.tflite", "bad.tflite"))
    stored = {t.name: t for t in read_graph((files / "bad.tflite").read_bytes()).tensors}
    for name, operation in zip(display_names(graph), graph.operations, strict=True):
        if name not in found:
            continue
        tensor = operation.outputs[0].name
        expected, got, row = before[tensor].astype(np.float64), after[tensor], found[name]
        assert row.sqnr_db == pytest.approx(
            10 * np.log10((expected**2).sum() / ((expected - got) ** 2).sum()), abs=1e-3
        )
        assert row.max_error == pytest.approx(np.abs(expected - got).max(), abs=1e-6)
        assert row.range == (expected.min(), expected.max())
        low, high = ((end - stored[tensor].zero_point) * stored[tensor].scale for end in (-128, 127))
        half = stored[tensor].scale / 2
        assert row.saturation == ((expected < low - half) | (expected > high + half)).mean()
        assert (row.weights, row.activations) == (8 if operation.name in ("CONV_2D", "FULLY_CONNECTED") else None, 8)


@pytest.mark.parametrize("compact", [("float.tflite",), ("bad.tflite",), ("float.tflite", "bad.tflite")])
def test_files_without_names_give_the_same_figures(compact, bad, files, digits):
    content, quantized = (
        strip((files / name).read_bytes()) if name in compact else (files / name).read_bytes()
        for name in ("float.tflite", "bad.tflite")
    )
    found = blame(content, quantized, digits[1])
    assert [dataclasses.replace(row, name="") for row in found.rows] == [
        dataclasses.replace(row, name="") for row in bad.rows
    ]
    assert re.sub(r"_\d+\b", "", found.advice).startswith(
        "Keep `fully_connected` in 16 bits: +" if "float.tflite" in compact else "Keep `hidden` in 16 bits: +"
    )


def test_a_range_that_is_too_narrow_shows_as_saturation_and_the_advice_is_for_both_sides_of_it(files, digits):
    content = (files / "float.tflite").read_bytes()
    ranges = calibrate(content, [digits[0][0][:200]])
    graph = read_graph(content)
    name = next(op.outputs[0].name for op in graph.operations if op.name == "FULLY_CONNECTED")
    ranges[name] = (0.0, ranges[name][1] / 25)
    found = blame(content, write_quantized(content, SCHEMES["int8"], ranges), digits[1])
    rows = rows_of(found)
    assert rows["hidden"].saturation > 0.3
    assert all(row.saturation < 0.02 for layer, row in rows.items() if layer not in ("hidden", "softmax"))
    # What `hidden` makes and `digit` reads is on one grid: alone, neither gets rid of it.
    assert found.advice.startswith("Keep `hidden` and `digit` in float: +")
    assert "'hidden': 'float32', 'digit': 'float32'" in found.advice


def test_weights_that_are_too_narrow_are_named_and_more_bits_help(files, digits, tmp_path):
    model = dw.lift(files / "float.tflite")
    scheme = {"*": "int8-dynamic", "hidden": "int2-dynamic"}
    narrow = dw.export(model, tmp_path / "narrow.tflite", scheme=scheme)
    found = blame(files / "float.tflite", narrow.path, digits[1])
    assert rows_of(found)["hidden"].weights == 2
    assert rows_of(found)["hidden"].saturation is None
    said = re.match(
        r"Keep `hidden` with 8-bit weights: \+([\d.]+) points for \+([\d.]+) KB \(add 'hidden': 'int8-dynamic' to its scheme\)\.$",
        found.advice,
    )
    assert said, found.advice
    wider = dw.export(model, tmp_path / "wider.tflite", scheme={**scheme, "hidden": "int8-dynamic"})
    gained = 100 * (accuracy(wider.path, digits[1]) - accuracy(narrow.path, digits[1]))
    assert float(said.group(1)) == pytest.approx(gained, abs=0.01)
    assert float(said.group(2)) == pytest.approx((wider.size_bytes - narrow.size_bytes) / 1000, abs=0.06)


def test_a_good_file_needs_nothing(files, digits):
    found = blame(files / "float.tflite", files / "int8.tflite", digits[1])
    assert found.advice.startswith("Nothing to do")
    assert all(abs(row.only - found.float_value) <= 0.01 for row in found.rows)


def test_without_labels_files_are_compared_with_the_float_file(files, digits):
    x = digits[1][0]
    found = blame(files / "float.tflite", files / "bad.tflite", x)
    first, second = (
        LiteRTRunner(files / name).predict([x])[0].argmax(axis=1) for name in ("float.tflite", "bad.tflite")
    )
    assert found.metric == "same class as the float file"
    assert (found.float_value, found.quantized_value) == (1.0, (first == second).mean())
    assert "Keep `hidden` in 16 bits: +" in found.advice


def regression():
    """Return a model with one output, and its float and badly quantized file."""
    keras.utils.set_random_seed(0)
    model = settle(
        keras.Sequential([keras.Input((32,)), keras.layers.Dense(128, activation="relu", name="a"), keras.layers.Dense(1, name="b")])
    )  # fmt: skip
    x = samples(model, 200)
    content = float_file(model)
    kernel = read_graph(content).operations[0].inputs[1]
    cut = {kernel.name: np.abs(kernel.value).max(axis=1, keepdims=True) / 8}
    return content, write_quantized(content, SCHEMES["int8"], calibrate(content, x), weight_bounds=cut), x[0]


def test_an_error_is_better_when_it_is_smaller():
    content, quantized, x = regression()
    y = LiteRTRunner(content).predict([x])[0][:, 0]
    found = blame(content, quantized, (x, y), metric="mae")
    rows = rows_of(found)
    assert (found.metric, found.float_value) == ("mae", pytest.approx(0, abs=1e-6))
    assert rows["a"].only > 5 * rows["b"].only
    assert rows["a"].without < 0.2 * found.quantized_value
    said = re.match(r"Keep `a` in (?:16 bits|float): better by ([\d.]+) mae for", found.advice)
    assert said, found.advice
    assert 0.5 * found.quantized_value < float(said.group(1)) <= found.quantized_value
    # The picture says what is lost: more error is a loss.
    bars = [e.get("fill") for e in ElementTree.fromstring(blame_svg(found.to_dict())).findall(".//{*}rect")][1:]
    assert bars[1] == "#b5482f"


def test_one_output_without_labels_is_a_class_from_a_half_on():
    content, quantized, x = regression()
    found = blame(content, quantized, x)
    first, second = (LiteRTRunner(c).predict([x])[0] >= 0.5 for c in (content, quantized))
    assert found.quantized_value == (first == second).mean() < 1


@pytest.mark.parametrize("name", ["shared_layer", "depthwise", "several_inputs_and_outputs"])
def test_every_quantized_operator_that_computes_has_a_row(name):
    model = settle(ZOO[name]())
    content, x = float_file(model), samples(model, 40)
    graph = read_graph(content)
    quantized = write_quantized(content, SCHEMES["int8"], calibrate(content, x))
    found = blame(content, quantized, x)
    integers = {t.name for op in read_graph(quantized).operations for t in op.outputs if t.is_quantized}
    shown = [n for n, op in zip(display_names(graph), graph.operations, strict=True)
             if op.outputs[0].name in integers and op.name != "RESHAPE"]  # fmt: skip
    assert [row.name for row in found.rows] == shown
    assert len(shown) >= 3
    assert len({row.name for row in found.rows}) == len(found.rows)
    for row in found.rows:
        assert 0 <= row.only <= 1
        assert 0 <= row.without <= 1
        assert row.sqnr_db > 10
        assert row.range[0] <= row.range[1]


@pytest.mark.parametrize("io_type", ["int8", "uint8"])
def test_files_with_integer_inputs_give_the_same_figures(io_type, files, digits):
    content = (files / "float.tflite").read_bytes()
    few = (digits[1][0][:200], digits[1][1][:200])
    ranges = calibrate(content, [digits[0][0][:200]])
    plain, other = (
        blame(content, write_quantized(content, SCHEMES["int8"], ranges, io_type=kind), few)
        for kind in ("float32", io_type)
    )
    assert [(r.name, r.only, r.without) for r in plain.rows] == [(r.name, r.only, r.without) for r in other.rows]


def test_a_file_from_other_weights_is_noticed(files, digits):
    content = (files / "float.tflite").read_bytes()
    graph = read_graph(content)
    from dwindle.lifting.flatbuffer import replace_constants

    kernel = next(op.inputs[1] for op in graph.operations if op.name == "FULLY_CONNECTED")
    other = replace_constants(content, {kernel.name: kernel.value * np.random.default_rng(0).normal(size=kernel.shape)})
    found = blame(content, write_quantized(other, SCHEMES["int8-weights"], None), digits[1], samples=200)
    assert "pass the float file that the quantized one was made from" in found.advice


def test_dict_and_json_round_trips(bad, tmp_path):
    assert Blame.from_dict(bad.to_dict()) == bad
    path = bad.save(tmp_path / "blame.json")
    assert Blame.from_dict(json.loads(path.read_text())) == bad
    with pytest.raises(dw.ConfigError, match=r"\.json"):
        bad.save(tmp_path / "blame.txt")


def test_the_picture_is_xml_and_has_every_operator(bad):
    found = bad.to_dict()
    found["rows"][0]["name"] = 'a<b>&"c'
    found["advice"] = "Keep <this> & " + "that " * 60
    found["rows"][1].update(sqnr_db=None, max_error=0.0)
    found["rows"][2].update(sqnr_db=None, max_error=None, only=None)
    root = ElementTree.fromstring(blame_svg(found))
    texts = ["".join(element.itertext()) for element in root.findall(".//{*}text")]
    for row in found["rows"]:
        assert row["name"] in texts
    assert "exact" in texts
    assert texts.count("–") == 2
    assert " ".join(t for t in reversed(texts) if t.startswith(("Keep", "that"))).count("that") == 60
    width, height = (float(root.get(side)) for side in ("width", "height"))
    for element in root.findall(".//{*}rect"):
        assert 0 <= float(element.get("x", 0)) + float(element.get("width")) <= width
    assert all(0 < float(element.get("y")) <= height for element in root.findall(".//{*}text"))


# ---------------------------------------------------------------- the command


@pytest.fixture
def run(files, capsys):
    def call(*arguments):
        """Return exit status, standard output and error, with {} replaced by the folder."""
        capsys.readouterr()
        try:
            status = main(["blame", *(str(argument).replace("{}", str(files)) for argument in arguments)])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


GOOD = ("{}/float.tflite", "{}/bad.tflite", "--data", "{}/digits.npz")


def test_the_command_prints_a_table_json_and_a_picture(run, bad, files):
    status, out, _ = run(*GOOD, "--plot", "{}/blame.svg")
    assert status == 0
    assert all(name in out for name in LAYERS)
    assert " ".join(bad.advice.split()[:4]) in " ".join(out.split())
    ElementTree.fromstring((files / "blame.svg").read_text())
    status, out, _ = run(*GOOD, "--json")
    assert status == 0
    assert Blame.from_dict(json.loads(out)) == bad


BAD = {
    "no float file": (("{}/none.tflite", "{}/bad.tflite", "--data", "{}/digits.npz"), r"none\.tflite"),
    "no data": (("{}/float.tflite", "{}/bad.tflite"), "--data"),
    "data that is not there": (("{}/float.tflite", "{}/bad.tflite", "--data", "{}/none.npz"), r"none\.npz` does not exist"),
    "not quantized": (("{}/float.tflite", "{}/float.tflite", "--data", "{}/digits.npz"), "no quantized operator"),
    "swapped": (("{}/bad.tflite", "{}/float.tflite", "--data", "{}/digits.npz"), "no quantized operator"),
    "another model": (("{}/other.tflite", "{}/bad.tflite", "--data", "{}/vectors.npz"), "does not have the float file's operators"),
    "shape": (("{}/float.tflite", "{}/bad.tflite", "--data", "{}/vectors.npz"), r"shape \(12,\) and the file takes \(28, 28, 1\)"),
    "damaged": (("{}/float.tflite", "{}/cut.tflite", "--data", "{}/digits.npz"), "truncated or damaged"),
    "metric": ((*GOOD, "--metric", "acuracy"), "`metric` is 'acuracy'.*did you mean `accuracy`"),
    "samples": ((*GOOD, "--samples", "0"), "`--samples` is 0"),
    "picture": ((*GOOD, "--plot", "{}/blame.bmp"), r"\.svg"),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken(files):
    other = settle(ZOO["mlp"]())
    (files / "other.tflite").write_bytes(float_file(other))
    np.savez(files / "vectors.npz", x_test=samples(other, 5)[0], y_test=np.zeros(5, np.int64))
    (files / "cut.tflite").write_bytes((files / "bad.tflite").read_bytes()[:2000])


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_status_2(case, run, broken):
    arguments, message = BAD[case]
    status, out, error = run(*arguments)
    assert status == 2
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert out == ""
    if case != "no data":  # argparse's own
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("data", "options", "kind", "message"),
    [
        ([np.zeros((5, 28, 28, 1), np.float32)] * 2, {}, dw.DataError, "2 arrays and the file has 1 inputs"),
        (
            np.zeros((0, 28, 28, 1), np.float32),
            {},
            dw.DataError,
            "0 samples; every input needs the same number, at least 1",
        ),
        (np.zeros((5, 28, 28), np.float32), {}, dw.DataError, r"shape \(28, 28\) and the file takes \(28, 28, 1\)"),
        (np.full((5, 28, 28, 1), np.nan, np.float32), {}, dw.DataError, "NaN or infinite"),
        (np.ones((5, 28, 28, 1), np.float32), {"samples": 0}, dw.ConfigError, "`samples` is 0; it must be at least 1"),
        (np.ones((5, 28, 28, 1), np.float32), {"metric": "acc!"}, dw.ConfigError, "`metric` is 'acc!'"),
        ((np.ones((5, 28, 28, 1), np.float32), np.zeros(4)), {}, dw.DataError, "same number"),
    ],
)
def test_bad_data_is_one_clear_sentence(files, data, options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        blame(files / "float.tflite", files / "bad.tflite", data, **options)
    assert "\n" not in str(caught.value)


def test_resolving_what_is_advised_needs_no_file():
    assert resolve_scheme({"*": "int8", "hidden": "int16x8"}).layers == (("hidden", SCHEMES["int16x8"]),)
