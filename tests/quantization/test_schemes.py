"""Schemes: what can be said, what is refused and how, and which operator gets what."""

from __future__ import annotations

import json
from dataclasses import replace

import keras
import numpy as np
import pytest
from zoo import ZOO, samples, settle

import dwindle as dw
from dwindle.exporting.convert import float_file
from dwindle.lifting.flatbuffer import read_graph
from dwindle.quantization.assignment import assign, display_names, fitted, names_of, pattern_of, widened
from dwindle.quantization.schemes import SCHEMES, Scheme, for_layers, resolve_scheme, with_layers, without_layers

# What the documentation promises: bits of weights and of activations, dynamic, power of two.
PROMISED = {
    "float32": (32, 32, False, False), "float16": (16, 32, False, False), "int8": (8, 8, False, False),
    "int8-dynamic": (8, 32, True, False), "int8-weights": (8, 32, False, False), "int16x8": (8, 16, False, False),
    "int4": (4, 8, False, False), "int4-dynamic": (4, 32, True, False), "int2-dynamic": (2, 32, True, False),
    "pow2-8": (8, 8, False, True),
}  # fmt: skip
OTHERS = {
    "blocks": Scheme(weights=4, dynamic=True, granularity=32),
    "tensor": Scheme(weights=4, activations=8, granularity="tensor"),
    "mixed": resolve_scheme(
        {"*": "int8", "conv_*": {"*": "int4"}, "FULLY_CONNECTED": Scheme(weights=8, activations=16)}
    ),
    "some": for_layers(SCHEMES["int8"], ["a", "b*"]),
}


def test_every_name_has_the_widths_that_are_documented():
    found = {n: (s.weights, s.activations, s.dynamic, s.power_of_two) for n, s in SCHEMES.items()}
    assert found == PROMISED
    assert all(scheme.name == name and resolve_scheme(name) is scheme for name, scheme in SCHEMES.items())


@pytest.mark.parametrize("name", [*SCHEMES, *OTHERS])
def test_a_scheme_survives_a_dict_and_json(name):
    scheme = SCHEMES.get(name) or OTHERS[name]
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_names_of_unnamed_schemes_are_different():
    schemes = [
        Scheme(weights=8), Scheme(weights=4), Scheme(weights=4, dynamic=True), Scheme(weights=4, activations=8),
        Scheme(weights=4, activations=16), Scheme(weights=4, dynamic=True, granularity=64), Scheme(weights=16),
        Scheme(weights=4, granularity="tensor"), Scheme(weights=4, power_of_two=True), Scheme(weights=32),
    ]  # fmt: skip
    assert len({scheme.name for scheme in schemes}) == len(schemes)


def test_which_schemes_need_data_and_which_are_float():
    assert [n for n, s in SCHEMES.items() if s.needs_data] == ["int8", "int16x8", "int4", "pow2-8"]
    assert [n for n, s in SCHEMES.items() if s.is_float] == ["float32", "float16"]
    part = resolve_scheme({"conv": "int8"})
    assert (part.needs_data, part.is_static, part.is_float) == (True, False, False)
    assert resolve_scheme({"conv": "float16"}).is_float


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"weights": 3}, r"`weights` is 3; it must be one of `2`, `4`, `8`, `16`, `32`"),
        ({"activations": 4}, r"`activations` is 4"),
        ({"granularity": "channels"}, r"`granularity` is 'channels'.*did you mean `channel`"),
        ({"granularity": 48, "weights": 4, "dynamic": True}, r"`granularity` is 48"),
        ({"weights": 16, "activations": 8}, r"float weights \(16 bits\) and integer activations"),
        ({"weights": 32, "dynamic": True}, r"float weights \(32 bits\)"),
        ({"weights": 32, "power_of_two": True}, "power-of-two"),
        ({"weights": 16, "granularity": "tensor"}, "floats have no scales"),
        ({"weights": 8, "activations": 8, "dynamic": True}, "leave `activations` out"),
        ({"weights": 2}, "add dynamic=True"),
        ({"weights": 2, "activations": 8}, "add dynamic=True"),
        ({"weights": 8, "dynamic": True, "granularity": 32}, "needs 2 or 4-bit weights and dynamic=True"),
        ({"weights": 4, "granularity": 32}, "needs 2 or 4-bit weights and dynamic=True"),
        ({"weights": 4, "dynamic": True, "granularity": 32, "power_of_two": True}, "blocks of 32 inputs"),
        ({"weights": 8, "activations": 16, "power_of_two": True}, "power-of-two steps and 16-bit activations"),
        ({"layers": {"conv": SCHEMES["int8"]}}, r"`layers` of a scheme is .* \(pattern, Scheme\) pairs"),
        ({"layers": (("conv", "int8"),)}, r"`layers` of a scheme is .* \(pattern, Scheme\) pairs"),
        ({"layers": (("conv", OTHERS["mixed"]),)}, r"'conv' has layers of its own"),
    ],
)
def test_combinations_that_litert_has_not_are_refused(widths, message):
    with pytest.raises(dw.ConfigError, match=message) as caught:
        Scheme(**widths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weight": 8}, r"unknown keys \['weight'\].*did you mean `weights`"),
        ({"weights": 8, "version": 3, "bits": 1}, r"unknown keys \['bits', 'version'\]"),
        ({"weights": 5}, r"`weights` is 5"),
        ({"layers": [["conv", {"weigths": 8}]]}, "did you mean `weights`"),
        ({"layers": [["conv"]]}, r"layers \[\['conv'\]\]; they must be \[pattern, scheme\] pairs"),
        ({"layers": 3}, "layers 3; they must be"),
    ],
)
def test_saved_schemes_that_are_wrong_are_refused(data, message):
    with pytest.raises(dw.ConfigError, match=message):
        Scheme.from_dict(data)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("int9", r"`scheme` is 'int9'; it must be one of `float32`, .*did you mean `int8`"),
        ("int8-dynamics", "did you mean `int8-dynamic`"),
        (8, "`scheme` is 8; it must be one of"),
        (None, "`scheme` is None"),
        (["int8"], "`scheme` is .* it must be one of"),
        ("float8", r"LiteRT has no float8, use `float16`, `int8` or `int8-weights`"),
        ("float8_e4m3", "LiteRT has no float8"),
        ("FP8", "LiteRT has no float8"),
        ({}, "`scheme` is an empty mapping"),
        ({"conv": "int9"}, r"`scheme\['conv'\]` is 'int9'.*did you mean `int8`"),
        ({"conv": "int16x8", "*": "int8"}, r"'\*' after 'conv', and a later pattern wins; put '\*' first"),
        ({"conv": {"*": "int8", "b": "int4"}}, "'conv' has layers of its own"),
    ],
)
def test_names_and_mappings_that_are_wrong_are_refused(given, message):
    with pytest.raises(dw.ConfigError, match=message) as caught:
        resolve_scheme(given)
    assert "\n" not in str(caught.value)


def test_a_mapping_begins_with_the_rest_and_a_later_pattern_wins():
    found = resolve_scheme({"*": "int8", "conv*": "int4", "conv_1": "int16x8"})
    assert without_layers(found) == SCHEMES["int8"]
    assert found.layers == (("conv*", SCHEMES["int4"]), ("conv_1", SCHEMES["int16x8"]))
    assert resolve_scheme({"*": "int8"}) == SCHEMES["int8"]
    assert without_layers(resolve_scheme({"conv": "int8"})) == SCHEMES["float32"]
    more = resolve_scheme({"*": found, "dense": "int8-dynamic"})
    assert more.layers == (*found.layers, ("dense", SCHEMES["int8-dynamic"]))
    assert with_layers(found, []) is found


def test_layers_are_names_or_patterns():
    assert for_layers(SCHEMES["int8"], None) is SCHEMES["int8"]
    one, several = for_layers(SCHEMES["int8"], "conv"), for_layers(SCHEMES["int8"], ["conv", "dense*"])
    assert one.layers == (("conv", SCHEMES["int8"]),)
    assert [pattern for pattern, _ in several.layers] == ["conv", "dense*"]
    assert without_layers(several).weights == 32
    for wrong in ([], 3, [3], {"conv": "int8"}):
        with pytest.raises(dw.ConfigError, match=r"`layers` is .*; it must be a name or pattern"):
            for_layers(SCHEMES["int8"], wrong)
    with pytest.raises(dw.ConfigError, match="put the patterns into the mapping"):
        for_layers(OTHERS["mixed"], "conv")


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)), layers.Conv2D(4, 3, activation="relu", name="conv"), layers.Conv2D(4, 3, name="conv_2"),
            layers.Flatten(), layers.Dense(64, activation="relu", name="hidden"), layers.Dense(4, name="out"),
        ]
    )  # fmt: skip
    path = tmp_path_factory.mktemp("schemes") / "cnn.tflite"
    path.write_bytes(float_file(settle(model)))
    return dw.lift(path)  # which is exported without another conversion


@pytest.fixture(scope="module")
def graph(cnn):
    return read_graph(float_file(cnn))


def widths(graph, scheme):
    """Return, by layer, bits of weights and activations that a scheme comes to."""
    named = zip(display_names(graph), graph.operations, assign(graph, scheme), strict=True)
    return {name: (choice.weights, choice.activations) for name, op, choice in named if len(op.inputs) > 2}


def test_a_pattern_matches_layers_and_operators(graph):
    found = widths(graph, resolve_scheme({"*": "int8", "conv_2": "int16x8", "FULLY_CONNECTED": "int4", "out": "int8"}))
    assert found == {"conv": (8, 8), "conv_2": (8, 16), "hidden": (4, 8), "out": (8, 8)}
    assert widths(graph, resolve_scheme({"conv*": "int8"})) == {
        "conv": (8, 8), "conv_2": (8, 8), "hidden": (32, 32), "out": (32, 32),
    }  # fmt: skip
    assert widths(graph, for_layers(SCHEMES["int8"], "hidden"))["hidden"] == (8, 8)
    assert all(not choice.layers for choice in assign(graph, resolve_scheme({"*": "int8", "out": "int4"})))


def test_a_width_that_an_operator_can_not_have_is_an_error_where_it_is_asked_for_by_name(graph):
    with pytest.raises(
        dw.ConfigError,
        match=r"2-bit weights \(int2-dynamic\) in `conv`, and LiteRT has no CONV_2D with them; use one of .*int8",
    ):
        assign(graph, resolve_scheme({"*": "int8-dynamic", "conv": "int2-dynamic"}))
    # The sentence's own advice works.
    assert widths(graph, resolve_scheme({"*": "int8-dynamic", "conv": "int8-dynamic"}))["conv"] == (8, 32)
    # A wildcard gives the next width that there is, and says so.
    for scheme in (SCHEMES["int2-dynamic"], resolve_scheme({"*": "int2-dynamic", "out": "int8-dynamic"})):
        assert widths(graph, scheme)["hidden"] == (2, 32)
        assert widths(graph, scheme)["conv"] == (4, 32)
        assert widened(graph, scheme) == ["CONV_2D has 4-bit weights (2): LiteRT has no narrower"]
    assert widened(graph, SCHEMES["int8"]) == []


def test_blocks_are_for_fully_connected_layers_of_whole_blocks(graph):
    found = dict(zip(display_names(graph), assign(graph, OTHERS["blocks"]), strict=True))
    # conv_2 gives 4 x 4 x 4 = 64 inputs, and hidden 64.
    assert (found["hidden"].granularity, found["out"].granularity) == (32, 32)
    assert found["conv"].granularity == "channel"
    wider = Scheme(weights=4, dynamic=True, granularity=128)
    assert {choice.granularity for choice in assign(graph, wider)} == {"channel"}


def test_a_pattern_that_matches_nothing_names_the_nearest_layer(graph):
    with pytest.raises(
        dw.ConfigError, match=r"'hiden', which matches no layer or operator.*it has .*conv.*did you mean `hidden`"
    ):
        assign(graph, resolve_scheme({"*": "int8", "hiden": "int4"}))


@pytest.mark.parametrize("name", ["mlp", "shared_layer", "two_towers", "concat", "attention", "inverted_residual"])
def test_names_shown_are_unique_and_a_pattern_hits_its_operator_alone(name):
    graph = read_graph(float_file(ZOO[name]()))
    shown = display_names(graph)
    assert len(set(shown)) == len(shown)
    for number in range(len(shown)):
        scheme = Scheme(
            name="x", weights=32, layers=((pattern_of(graph, number), replace(SCHEMES["int8"], name="hit")),)
        )
        hits = [i for i, op in enumerate(graph.operations) if fits(scheme.layers[0][0], op, shown[i])]
        assert hits == [number]


def fits(pattern, operation, shown):
    import fnmatch

    return any(n == pattern or fnmatch.fnmatchcase(n, pattern) for n in (*names_of(operation), shown))


def test_a_number_never_makes_a_name_that_another_layer_has():
    layers = keras.layers
    inputs = keras.Input((6,))
    shared = layers.Dense(6, activation="relu", name="dense")
    x = layers.Dense(6, activation="relu", name="dense_1")(shared(shared(inputs)))
    graph = read_graph(float_file(keras.Model(inputs, x)))
    assert sorted(display_names(graph)) == ["dense", "dense_1", "dense_2"]
    last = graph.operations[-1]
    assert display_names(graph)[-1] == "dense_1"
    assert widths(graph, resolve_scheme({"dense_1": "int8"}))["dense_1"] == (8, 8)
    assert fitted(SCHEMES["int8"], last) == SCHEMES["int8"]


@pytest.mark.parametrize("name", [*SCHEMES, "blocks", "tensor"])
def test_every_scheme_gives_a_file_with_the_weights_and_activations_that_it_says(name, cnn, tmp_path):
    scheme = SCHEMES.get(name) or OTHERS[name]
    data = samples(cnn, 100)
    artefact = dw.export(cnn, tmp_path / "model.tflite", scheme=scheme, data=data)
    assert artefact.verification.passed
    graph = read_graph(artefact.path.read_bytes())
    kernels = [
        t for t in graph.tensors if t.value is not None and t.shape in [(4, 3, 3, 3), (4, 3, 3, 4), (64, 64), (4, 64)]
    ]
    assert len(kernels) == 4
    bits = sorted({tensor.bits for tensor in kernels})
    assert bits == ([2, 4] if scheme.weights == 2 else [scheme.weights])
    made = {t.bits for op in graph.operations if op.name in ("CONV_2D", "FULLY_CONNECTED") for t in op.outputs}
    assert made == {scheme.activations}
    if scheme.power_of_two:
        scales = np.concatenate(
            [np.ravel(t.scale) for t in kernels]
            + [t.scale for op in graph.operations for t in op.outputs if t.is_quantized]
        )
        np.testing.assert_array_equal(np.log2(scales) % 1, 0)
    if scheme.granularity == "tensor":
        assert {tensor.scale.size for tensor in kernels} == {1}
    if scheme.granularity == 32:
        assert sorted({tensor.block for tensor in kernels}) == [0, 32]


def test_without_data_a_static_scheme_says_what_it_needs_and_the_others_work(cnn, tmp_path):
    for name, scheme in SCHEMES.items():
        if scheme.needs_data:
            with pytest.raises(dw.DataError, match=r"needs calibration data.*`data` is None.*`int8-dynamic`"):
                dw.export(cnn, tmp_path / "never.tflite", scheme=name)
        elif name in ("int8-weights", "int8-dynamic"):
            assert dw.export(cnn, tmp_path / f"{name}.tflite", scheme=name).verification.passed
    assert not (tmp_path / "never.tflite").exists()
    assert (tmp_path / "int8-weights.tflite").stat().st_size < 0.45 * dw.export(cnn, tmp_path / "f.tflite").size_bytes


def test_layers_keep_the_rest_float_in_the_file(cnn, tmp_path):
    twin = dw.quantize(cnn, "int8", samples(cnn, 100), layers="hidden")
    artefact = dw.export(twin, tmp_path / "model.tflite", data=samples(cnn, 100))
    graph = read_graph(artefact.path.read_bytes())
    found = {
        op.inputs[1].shape: op.inputs[1].bits for op in graph.operations if op.name in ("CONV_2D", "FULLY_CONNECTED")
    }
    assert found == {(4, 3, 3, 3): 32, (4, 3, 3, 4): 32, (64, 64): 8, (4, 64): 32}


@pytest.mark.parametrize("scheme", ["int8", "int16x8", "int8-dynamic"])
def test_a_long_loop_stays_float_and_that_is_said(scheme, tmp_path):
    layers = keras.layers
    model = keras.Sequential([keras.Input((300, 4)), layers.Conv1D(8, 3), layers.LSTM(6), layers.Dense(3)])
    x = np.random.default_rng(0).normal(size=(40, 300, 4)).astype(np.float32)
    file = dw.export(model, tmp_path / "m.tflite", scheme=scheme, data=x)
    assert file.verification.passed
    assert "stays float32: WHILE (1)" in file.notes
    kinds = {w.name: w.bits for op in read_graph(file.path.read_bytes()).operations for w in op.inputs[1:2] if w}
    assert 8 in kinds.values()  # the rest is quantized
