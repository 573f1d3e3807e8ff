"""Figures against independent references; damaged files never crash the process."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
from zoo import ZOO, samples, settle

import dwindle as dw
from dwindle.exporting.convert import float_file
from dwindle.lifting.flatbuffer import check_structure
from dwindle.measuring import LiteRTRunner, Measurement, compare, compare_latency, evaluate, higher_is_better
from dwindle.measuring.accuracy import accuracy
from dwindle.measuring.litert import TensorSpec, dequantize, quantize
from dwindle.measuring.paired import paired_drop


@pytest.fixture(scope="module")
def files(tmp_path_factory, trained, digits):
    folder = tmp_path_factory.mktemp("files")
    for scheme in ("float32", "float16", "int8", "int8-dynamic"):
        dw.export(trained, folder / f"{scheme}.tflite", scheme=scheme, data=digits[0][0][:100])
    return folder


def test_a_paired_loss_is_bounded_as_by_hand():
    y = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    before = np.array([0.1, 0.9, 0.2, 0.8, 0.1, 0.9, 0.7, 0.1])[:, None]  # wrong in the last two
    after = np.array([0.9, 0.1, 0.2, 0.8, 0.1, 0.9, 0.3, 0.2])[:, None]  # wrong in the first two and the last
    found = paired_drop(before, after, y)
    assert (found.samples, found.only_before, found.only_after, found.drop) == (8, 2, 1, 1 / 8)
    # b = 2.5, c = 1.5, n = 10: (1 + 1.6449 sqrt(4 - 0.1)) / 10
    assert found.upper == pytest.approx(0.1 + 0.16448536 * np.sqrt(3.9), rel=1e-6)


def test_the_bound_of_a_paired_loss_holds_in_95_of_100_draws():
    generator = np.random.default_rng(0)
    both, only_before, only_after = 0.95, 0.02, 0.01  # of all samples
    held = []
    for _ in range(2000):
        cell = generator.choice(4, 1000, p=[both, only_before, only_after, 1 - both - only_before - only_after])
        before, after = np.isin(cell, (0, 1)), np.isin(cell, (0, 2))
        found = paired_drop(before[:, None].astype(float), after[:, None].astype(float), np.ones(1000, int))
        held.append(found.upper >= only_before - only_after)
    assert 0.93 < np.mean(held) < 0.97


def test_accuracy_by_hand():
    outputs = np.array([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])
    assert accuracy(outputs, np.array([1, 0, 0])) == pytest.approx(2 / 3)
    assert accuracy(outputs, np.eye(2)[[1, 0, 0]]) == pytest.approx(2 / 3)
    assert accuracy(np.array([[0.2], [0.5]]), np.array([0, 1])) == 1.0


def test_files_side_by_side_against_figures_computed_apart(files, digits):
    (x, y), paths = digits[1], [files / "float32.tflite", files / "int8.tflite"]
    rows = compare(paths, (x, y))
    found = [LiteRTRunner(path).predict([x])[0] for path in paths]
    for row, path, outputs in zip(rows, paths, found, strict=True):
        assert row.measurement.accuracy == pytest.approx((outputs.argmax(-1) == y).mean())
        assert row.times_smaller == paths[0].stat().st_size / path.stat().st_size
        assert row.same_class == pytest.approx((outputs.argmax(-1) == found[0].argmax(-1)).mean())
        assert row.max_difference == pytest.approx(np.abs(outputs - found[0]).max())
    assert rows[0].times_faster == 1.0
    assert rows[0].max_difference == 0.0 < rows[1].max_difference
    with pytest.raises(dw.ConfigError, match="at least two"):
        compare([paths[0]])


def test_other_metrics_are_those_of_keras():
    y, outputs = np.array([[1.0], [2.0]]), np.array([[1.5], [4.0]])
    assert evaluate(outputs, y, "mae") == pytest.approx(1.25)
    assert evaluate(outputs, y, keras.metrics.MeanSquaredError()) == pytest.approx(2.125)
    assert evaluate(outputs, y, lambda a, b: float((b - a).max())) == pytest.approx(2.0)
    assert not higher_is_better("mae")
    assert not higher_is_better("mean_squared_error")
    assert higher_is_better("auc")
    assert higher_is_better("accuracy")
    with pytest.raises(dw.ConfigError, match="did you mean `mae`"):
        evaluate(outputs, y, "maee")


def test_a_measurement_agrees_with_the_model_and_the_file_system(trained, digits, files):
    (_, _), (x, y) = digits
    found = dw.measure(files / "float32.tflite", (x, y))
    assert found.accuracy == (trained.predict(x, verbose=0).argmax(1) == y).mean()
    assert found.samples == len(x)
    assert found.size_bytes == (files / "float32.tflite").stat().st_size
    assert found.parameters == trained.count_params()
    assert 0 < found.latency.min_ms <= found.latency.p50_ms <= found.latency.p90_ms
    assert found.latency.runs >= 30
    assert Measurement.from_dict(found.to_dict()) == found


def test_arena_of_tflm_holds_the_largest_activations(files):
    pytest.importorskip("tflite_micro")
    found = dw.measure(files / "float32.tflite")
    assert found.ram_source == "tflm-arena"
    conv, pool = 12 * 12 * 8 * 4, 6 * 6 * 8 * 4
    assert conv + pool <= found.ram_bytes <= 2 * (conv + pool) + 4000
    assert dw.measure(files / "int8.tflite").ram_bytes < found.ram_bytes
    half = dw.measure(files / "float16.tflite")
    assert half.arena_bytes is None
    assert "TensorFlow Lite Micro can't run the file" in half.arena_note
    assert half.ram_bytes == half.resident_bytes > 0


def test_a_model_fifty_times_larger_is_slower():
    def dense(units):
        return float_file(keras.Sequential([keras.Input((256,)), keras.layers.Dense(units), keras.layers.Dense(units)]))

    small, large = compare_latency([dense(32), dense(1024)], seconds=0.1)
    assert small.p50_ms < large.p50_ms
    with pytest.raises(dw.ConfigError, match="`threads` is 0"):
        compare_latency([dense(4)], threads=0)


def test_quantization_of_inputs_and_outputs_by_hand():
    spec = TensorSpec(name="x", index=0, shape=(1, 4), dtype=np.int8, scale=0.5, zero_point=-3)
    np.testing.assert_array_equal(quantize(np.array([0.0, 0.26, -99.0, 99.0], np.float32), spec), [-3, -2, -128, 127])
    np.testing.assert_array_equal(dequantize(np.array([-3, -2, 127], np.int8), spec), [0.0, 0.5, 65.0])


def test_inspection_counts_what_is_there(trained, files, tmp_path):
    found = dw.inspect_file(files / "float32.tflite")
    assert found.parameters == trained.count_params()
    assert found.weights_bytes >= 4 * trained.count_params()
    conv = next(row for row in found.rows if row.op == "CONV_2D")
    assert (conv.parameters, conv.bits, conv.output_shape) == (208, 32, (1, 12, 12, 8))
    by_scheme = {scheme: dw.inspect_file(files / f"{scheme}.tflite") for scheme in ("float16", "int8", "int8-dynamic")}
    for scheme, bits in (("float16", 16), ("int8", 8), ("int8-dynamic", 8)):
        rows = [row for row in by_scheme[scheme].rows if row.op in ("CONV_2D", "FULLY_CONNECTED")]
        assert [row.bits for row in rows] == [bits] * 3, scheme
        assert by_scheme[scheme].parameters == trained.count_params()
    pruned = dw.finalize(dw.prune(trained, 0.75, layers="hidden"))
    dw.export(pruned, tmp_path / "pruned.tflite")
    row = max(dw.inspect_file(tmp_path / "pruned.tflite").rows, key=lambda row: row.parameters)
    assert row.sparsity == pytest.approx(0.75)
    table = dw.inspect_model(dw.prune(trained, 0.75, layers="hidden"))
    hidden = next(row for row in table.rows if row.name == "hidden")
    assert hidden.sparsity == pytest.approx(0.75)
    assert table.parameters == trained.count_params()


@pytest.mark.parametrize("name", ["mlp", "residual", "recurrent"])
def test_batches_compute_what_single_samples_do(name):
    model = settle(ZOO[name]())
    runner = LiteRTRunner(float_file(model))
    inputs = samples(model, 11)
    together = runner.predict(inputs, batch_size=4)
    alone = runner.predict(inputs, batch_size=1)
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-4, atol=1e-5)


def test_broken_files_are_one_sentence(tmp_path, files):
    with pytest.raises(dw.DataError, match=r"missing\.tflite` can't be read"):
        dw.measure(tmp_path / "missing.tflite")
    (tmp_path / "text.tflite").write_text("no model, but long enough")
    with pytest.raises(dw.UnsupportedModelError, match="does not begin as a LiteRT model"):
        dw.measure(tmp_path / "text.tflite")
    with pytest.raises(dw.DataError, match=r"\(5,\).*\(28, 28, 1\)"):
        dw.measure(files / "int8.tflite", (np.zeros((3, 5), np.float32), np.zeros(3, np.int64)))
    with pytest.raises(dw.DataError, match="no labels"):
        dw.measure(files / "int8.tflite", np.zeros((3, 28, 28, 1), np.float32))


_TORTURE = """
import sys
import numpy as np
import dwindle as dw
from dwindle.measuring import LiteRTRunner
content = open(sys.argv[1], "rb").read()
kind, seed = sys.argv[2], int(sys.argv[3])
generator = np.random.default_rng(seed)
for number in range(60):
    broken = bytearray(content)
    if kind == "cut":
        broken = broken[: int(generator.integers(8, len(content) - 1))]
    else:
        for place in generator.integers(8, len(content), 3):
            broken[place] ^= int(generator.integers(1, 256))
    try:
        LiteRTRunner(bytes(broken))
    except dw.DwindleError:
        pass
print("survived")
"""


def test_truncated_files_never_crash_the_process(files):
    done = subprocess.run(
        [sys.executable, "-c", _TORTURE, str(files / "int8.tflite"), "cut", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "survived", done.stderr[-2000:]


def test_every_truncation_is_found(files):
    content = (files / "int8.tflite").read_bytes()
    refused = 0
    cuts = range(16, len(content) - 1, 97)
    for cut in cuts:
        try:
            check_structure(content[:cut])
        except dw.UnsupportedModelError:
            refused += 1
    assert refused == len(cuts)


def test_fewer_of_large_samples_run_together(tmp_path):
    from dwindle.measuring.litert import samples_at_once

    assert samples_at_once([np.zeros((9, 28, 28, 1))], 256) == 256
    assert samples_at_once([np.zeros((9, 224, 224, 3))], 256) == 6
    assert samples_at_once([np.zeros((9, 512, 512, 3)), np.zeros((9, 512, 512, 3))], 256) == 1
    assert samples_at_once([np.zeros((9,))], 64) == 64
    image = keras.Input((400, 400, 3))
    model = keras.Model(image, keras.layers.Flatten()(keras.layers.AveragePooling2D(100)(image)))
    path = dw.export(model, tmp_path / "m.tflite").path
    x = np.random.default_rng(0).random((5, 400, 400, 3), dtype=np.float32)
    runner, told = LiteRTRunner(path), []
    run = runner.run
    runner.run = lambda *given: told.append(len(given[0])) or run(*given)
    np.testing.assert_allclose(runner.predict([x])[0], model.predict(x, verbose=0), rtol=1e-4)
    assert told == [2, 2, 1]
