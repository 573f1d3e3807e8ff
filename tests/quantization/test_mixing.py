"""Widths under a budget of bytes or of accuracy, measured on written files."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from zoo import ZOO, samples, settle

import dwindle as dw
from dwindle.data import Split
from dwindle.exporting.convert import float_file
from dwindle.lifting.flatbuffer import read_graph
from dwindle.measuring.litert import LiteRTRunner
from dwindle.quantization.assignment import assign, display_names
from dwindle.quantization.calibration import calibrate
from dwindle.quantization.mixing import judging_samples, sensitivity, within_budget, within_drop
from dwindle.quantization.schemes import SCHEMES, resolve_scheme, without_layers
from dwindle.quantization.writing import write_quantized

L = keras.layers


def classifier():
    """Return a model with two equal branches, of which one hardly matters, trained to nothing."""
    inputs = keras.Input((16,))
    loud = L.Dense(64, activation="relu", name="loud")(inputs)
    quiet = L.Dense(64, activation="relu", name="quiet")(inputs)
    x = L.Add()(
        [L.Dense(10, use_bias=False, name="loud_end")(loud), L.Dense(10, use_bias=False, name="quiet_end")(quiet)]
    )
    model = settle(keras.Model(inputs, x))
    model.get_layer("quiet_end").kernel.assign(model.get_layer("quiet_end").kernel * 0.01)
    return model


@pytest.fixture(scope="module")
def branches():
    keras.utils.set_random_seed(0)
    model = classifier()
    x = samples(model, 300)
    content = float_file(model)
    return content, calibrate(content, x), x


@pytest.fixture(scope="module")
def lifted(branches, tmp_path_factory):
    path = tmp_path_factory.mktemp("mixing") / "float.tflite"
    path.write_bytes(branches[0])
    return dw.lift(path)


def written(branches, scheme):
    content, ranges, _ = branches
    return write_quantized(content, scheme, ranges if scheme.needs_data else None)


def bits(content, scheme):
    graph = read_graph(content)
    named = zip(display_names(graph), graph.operations, assign(graph, scheme), strict=True)
    return {name: choice.weights for name, op, choice in named if op.name in ("FULLY_CONNECTED", "CONV_2D")}


def test_sensitivity_is_what_files_with_one_narrower_layer_cost_and_save(branches):
    content, ranges, x = branches
    few = [array[:128] for array in x]
    expected = LiteRTRunner(content).predict(few)[0]

    def loss(file):
        return float(np.mean((LiteRTRunner(file).predict(few)[0] - expected) ** 2) / np.mean(expected**2))

    told = []
    moves = sensitivity(content, SCHEMES["int8"], ranges, x, progress=lambda done, every: told.append((done, every)))
    names = display_names(read_graph(content))
    assert [names[move.operators[0]] for move in moves] == [
        n for n in names if n in ("loud", "quiet", "loud_end", "quiet_end")
    ]
    assert told == [(i, 4) for i in range(1, 5)]
    whole = written(branches, SCHEMES["int8"])
    for move in moves:
        file = written(branches, resolve_scheme({"*": "int8", names[move.operators[0]]: "int4"}))
        assert move.bits == 4
        assert move.saved == len(whole) - len(file)
        assert move.error == pytest.approx(loss(file) - loss(whole), abs=1e-9)
    by_name = {names[move.operators[0]]: move for move in moves}
    assert by_name["quiet"].error < 0.01 * by_name["loud"].error


def test_the_layer_that_matters_less_gets_fewer_bits(branches):
    content, ranges, x = branches
    size = len(written(branches, SCHEMES["int8"]))
    one = len(written(branches, resolve_scheme({"*": "int8", "quiet": "int4"})))
    found = within_budget(content, SCHEMES["int8"], ranges, x, (size + one) // 2)
    assert bits(content, found) == {"loud": 8, "quiet": 4, "loud_end": 8, "quiet_end": 8}
    both = len(written(branches, resolve_scheme({"*": "int8", "quiet*": "int4"})))
    found = within_budget(content, SCHEMES["int8"], ranges, x, both)
    assert bits(content, found) == {"loud": 8, "quiet": 4, "loud_end": 8, "quiet_end": 4}


@pytest.mark.parametrize(
    ("scheme", "narrowest", "share"),
    [("int8", "int4", 0.6), ("int8-dynamic", "int2-dynamic", 0.6), ("int8-dynamic", "int2-dynamic", 0.2),
     ("int4-dynamic", "int2-dynamic", 0.5)],
)  # fmt: skip
def test_the_exported_file_is_within_the_budget(scheme, narrowest, share, branches, lifted, tmp_path):
    content, _, x = branches
    whole, least = (len(written(branches, SCHEMES[name])) for name in (scheme, narrowest))
    budget = int(least + share * (whole - least))
    twin = dw.quantize(lifted, scheme, x, budget=budget)
    artefact = dw.export(twin, tmp_path / "model.tflite", data=x)
    assert artefact.path.stat().st_size <= budget
    assert artefact.verification.passed
    assert artefact.scheme == f"{scheme}+layers"
    if share < 0.5:
        assert 2 in bits(content, dw.Scheme.from_dict(twin.quantization["scheme"])).values()


def test_a_budget_that_is_met_already_leaves_the_scheme_as_it_is(branches):
    content, ranges, x = branches
    size = len(written(branches, SCHEMES["int8"]))
    assert within_budget(content, SCHEMES["int8"], ranges, x, size) is SCHEMES["int8"]
    assert within_budget(content, SCHEMES["int8"], ranges, x, "1MB") is SCHEMES["int8"]
    assert within_budget(content, SCHEMES["int8"], ranges, x, size - 1) is not SCHEMES["int8"]


def test_a_budget_that_can_not_be_met_says_how_small_it_gets(branches):
    content, ranges, x = branches
    smallest = len(written(branches, SCHEMES["int4"]))
    with pytest.raises(
        dw.ConfigError,
        match=rf"`budget` is 1,000 bytes; the smallest file that int8 .* gives is {smallest:,} bytes; prune",
    ):
        within_budget(content, SCHEMES["int8"], ranges, x, "1KB")
    within_budget(content, SCHEMES["int8"], ranges, x, smallest)  # and that is true


def test_layers_of_the_scheme_stay_as_the_user_said_and_come_first(branches):
    content, ranges, x = branches
    scheme = resolve_scheme({"*": "int8", "loud": "int16x8", "quiet": "float32"})
    limit = len(written(branches, scheme)) - 1
    found = within_budget(content, scheme, ranges, x, limit)
    assert found.layers[:2] == scheme.layers
    assert without_layers(found) == SCHEMES["int8"]
    assert found.name == "int8+layers"
    assert bits(content, found)["quiet"] == 32
    assert len(written(branches, found)) <= limit


@pytest.mark.parametrize("name", ["shared_layer", "shared_convolution"])
def test_a_layer_that_is_used_several_times_gets_one_width(name):
    model = settle(ZOO[name]())
    content, x = float_file(model), samples(model, 60)
    scheme = SCHEMES["int4-dynamic" if name == "shared_layer" else "int8-dynamic"]
    whole = len(write_quantized(content, scheme, None))
    moves = sensitivity(content, scheme, None, x)
    assert max(len(move.operators) for move in moves) == (2 if name == "shared_layer" else 3)
    smallest = resolve_scheme(
        "int2-dynamic" if name == "shared_layer" else {"*": "int8-dynamic", "CONV_2D": "int4-dynamic"}
    )
    budget = len(write_quantized(content, smallest, None))
    found = within_budget(content, scheme, None, x, budget)
    assert len(write_quantized(content, found, None)) <= budget < whole


# ---------------------------------------------------------------- max_drop


def disagreement(content, file, x):
    first, second = (LiteRTRunner(c).predict(x)[0].argmax(axis=1) for c in (content, file))
    return float((first != second).mean())


def test_as_many_layers_as_the_drop_allows(branches):
    content, _, x = branches
    scheme, counts = SCHEMES["int8-dynamic"], []
    for limit in (0.02, 0.05, 0.2, 0.99):
        found = within_drop(content, scheme, None, x, limit, judged=Split(x=tuple(x), y=None))
        assert disagreement(content, written(branches, found), x) <= limit
        counts.append(len(written(branches, found)))
        if limit == 0.05:
            # Not one layer more: each that is left alone costs too much, or is as narrow as LiteRT has it.
            given = bits(content, found)
            for name, width in given.items():
                for narrower in [b for b in (4, 2) if b < width]:
                    more = dw.Scheme.from_dict(
                        {**found.to_dict(), "layers": [*found.to_dict()["layers"], [name, dw.Scheme(weights=narrower, dynamic=True).to_dict()]]}
                    )  # fmt: skip
                    assert disagreement(content, written(branches, more), x) > limit
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > counts[-1]
    assert counts[-1] == len(written(branches, SCHEMES["int2-dynamic"]))


def test_a_drop_against_labels_is_the_loss_of_accuracy(branches):
    content, _, x = branches
    right = LiteRTRunner(content).predict(x)[0].argmax(axis=1)
    labels = np.where(np.arange(300) % 3 == 0, (right + 1) % 10, right)  # the float file is right on two of three
    found = within_drop(content, SCHEMES["int8-dynamic"], None, x, "3%", judged=Split(x=tuple(x), y=labels))
    accuracy = float((LiteRTRunner(written(branches, found)).predict(x)[0].argmax(axis=1) == labels).mean())
    assert 200 / 300 - accuracy <= 0.03 + 1e-9
    one_hot = within_drop(
        content, SCHEMES["int8-dynamic"], None, x, "3%", judged=Split(x=tuple(x), y=np.eye(10)[labels])
    )
    assert one_hot == found
    # Where the float file is never right nothing can be lost, whatever changes its mind.
    free = within_drop(content, SCHEMES["int8-dynamic"], None, x, 0, judged=Split(x=tuple(x), y=(right + 1) % 10))
    assert set(bits(content, free).values()) == {2}


def test_a_scheme_that_loses_too_much_to_begin_with_is_an_error(branches):
    content, _, x = branches
    loss = disagreement(content, written(branches, SCHEMES["int2-dynamic"]), x)
    with pytest.raises(
        dw.ConfigError, match=rf"`max_drop` is 1.00%; the file in int2-dynamic loses {loss:.2%} before"
    ) as caught:
        within_drop(content, SCHEMES["int2-dynamic"], None, x, 0.01, judged=Split(x=tuple(x), y=None))
    assert "\n" not in str(caught.value)


def test_quantize_with_a_drop_gives_a_file_within_it(trained, digits, tmp_path):
    (x, y), (x_test, y_test) = digits
    data = dw.read_data({"x_train": x[:600], "y_train": y[:600], "x_val": x_test, "y_val": y_test})
    path = tmp_path / "float.tflite"
    path.write_bytes(float_file(trained))
    float_accuracy = dw.measure(path, (x_test, y_test)).accuracy
    twin = dw.quantize(dw.lift(path), "int8", data, max_drop="2%")
    artefact = dw.export(twin, tmp_path / "model.tflite", data=data)
    assert dw.measure(artefact.path, (x_test, y_test)).accuracy >= float_accuracy - 0.02
    whole = dw.export(dw.lift(path), tmp_path / "int8.tflite", scheme="int8", data=data)
    assert artefact.size_bytes < whole.size_bytes
    assert twin.quantization["scheme"]["layers"]


def test_samples_that_judge_are_validation_samples_first(digits):
    (x, y), (x_test, y_test) = digits
    every = dw.read_data(
        {"x_train": x[:100], "y_train": y[:100], "x_val": x[100:150], "y_val": y[100:150], "x_test": x_test}
    )
    np.testing.assert_array_equal(judging_samples(every).x[0], x[100:150])
    np.testing.assert_array_equal(judging_samples((x_test, y_test)).y, y_test)
    assert judging_samples(x).y is None
    assert len(judging_samples([x[:5], x[:5]]).x) == 2


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"budget": "1MB", "max_drop": 0.01}, dw.ConfigError, "`budget` and `max_drop` both choose"),
        ({"budget": "60 bananas"}, dw.ConfigError, "`budget` is '60 bananas'; it must be a size"),
        ({"budget": 0}, dw.ConfigError, "`budget` is 0; it must be a size above 0"),
        ({"max_drop": 1.5}, dw.ConfigError, r"`max_drop` is 1\.5; it must be at least 0 and below 100%"),
        ({"max_drop": "much"}, dw.ConfigError, "`max_drop` is 'much'"),
        ({"max_drop": 0.01, "data": None}, dw.DataError, "calibration data"),
        ({"budget": "1KB", "data": None}, dw.DataError, "calibration data"),
        (
            {"max_drop": 0.5, "labels": np.linspace(0, 1, 300)},
            dw.DataError,
            "labels of `data` are not whole numbers; use `budget`",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(lifted, branches, options, kind, message):
    x = branches[2][0]
    options = dict(options)
    labels = options.pop("labels", None)
    data = options.pop("data", x if labels is None else (x, labels))
    with pytest.raises(kind, match=message) as caught:
        dw.quantize(lifted, "int8", data, **options)
    assert "\n" not in str(caught.value)
