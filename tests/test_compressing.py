"""Goals and plans are plain data, checked where they are made; the search is honest about what it found."""

from __future__ import annotations

import contextlib
import json
import signal

import keras
import numpy as np
import pytest
from conftest import small_cnn

import dwindle as dw
from dwindle.compressing.goals import Goals, Verdict, parse_drop, parse_latency
from dwindle.compressing.plans import Plan, read_plan
from dwindle.compressing.recipes import Recipe
from dwindle.compressing.screening import has_slow_kernels
from dwindle.compressing.steps import training_loss
from dwindle.exporting import unchecked_file
from dwindle.lifting.flatbuffer import read_graph
from dwindle.units import parse_size


@pytest.mark.parametrize(
    ("text", "expected"), [("45KB", 45_000), ("44KiB", 45_056), ("1.5MB", 1_500_000), (2000, 2000), ("7 kb", 7000)]
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("0.5%", 0.005), (0.01, 0.01), ("0.02", 0.02), (0, 0.0)])
def test_drops(text, expected):
    assert parse_drop(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2ms", (2, None)), ("500us", (0.5, None)), (3, (3, None)), ("0.5x", (None, 0.5)), ("1s", (1000, None))],
)
def test_latencies(text, expected):
    assert parse_latency(text) == expected


@pytest.mark.parametrize("arguments", [{}, {"max_size": -1}, {"max_size": "much"}, {"max_drop": 2.0}, {"max_drop": "-1%"},
                                       {"max_latency": "0x"}, {"max_latency": "x"}, {"max_ram": "0KB"}, {"max_size": float("nan")}])  # fmt: skip
def test_goals_that_no_file_can_meet(arguments):
    with pytest.raises(dw.ConfigError, match="no goal is given" if not arguments else f"`{next(iter(arguments))}` is"):
        Goals(**arguments)


def test_goals_round_trip_and_know_their_keys():
    goals = Goals(max_drop="1%", max_size="100KB", max_latency="0.5x", max_ram="64KB")
    assert Goals.from_dict(json.loads(json.dumps(goals.to_dict()))) == goals
    with pytest.raises(dw.ConfigError, match="did you mean `max_size`"):
        Goals.from_dict({"max_sise": 3})


def test_judging_by_hand():
    goals = Goals(max_drop=0.01, max_size=1000, max_latency="0.5x")
    before = {"accuracy": 0.9, "latency_ms": {"p50": 2.0}}
    after = {"accuracy": 0.88, "size_bytes": 900, "latency_ms": {"p50": 1.0}}
    verdicts = {v.goal: (v.met, v.value) for v in goals.judge(before, after, higher_is_better=True)}
    assert verdicts == {"max_drop": (False, pytest.approx(0.02)), "max_size": (True, 900), "max_latency": (True, 0.5)}
    assert goals.judge(before, after, higher_is_better=False)[0].met


def test_slow_kernels_count_as_larger_where_nobody_said_what_is_to_be_small(trained, digits):
    before = {"size_bytes": 1000, "latency_ms": {"p50": 1.0, "p90": 2.0}, "accuracy": 0.9}
    slow = {**before, "size_bytes": 100, "slow_kernels": True}
    assert Goals(max_drop=0.1).cost(before, slow, True) == 400
    assert Goals(max_drop=0.1).cost(before, {**slow, "slow_kernels": False}, True) == 100
    assert Goals(max_drop=0.1, minimize="size").cost(before, slow, True) == 100
    assert Goals(max_drop=0.1, minimize="latency").cost(before, slow, True) == 1.0
    (x, _), _ = digits
    found = {
        scheme: has_slow_kernels(unchecked_file(trained, scheme, x[:50]))
        for scheme in ("float32", "int8", "int4", "int4-dynamic")
    }
    assert found == {"float32": False, "int8": False, "int4": True, "int4-dynamic": True}
    dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    assert not has_slow_kernels(unchecked_file(dense, "int4", np.eye(4, dtype="float32")))


def test_plans_round_trip_through_yaml(tmp_path):
    plan = Plan(name="p", steps=(("shrink", {"width": 0.3}), ("train", {"epochs": 4}), ("export", {"scheme": "int8"})))
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    assert read_plan(tmp_path / "plan.yaml") == plan
    assert plan.steps[1][1]["temperature"] == 4.0
    # YAML takes a number without a point for a word.
    (tmp_path / "plan.yaml").write_text("steps: [{train: {learning_rate: 1e-3}}, {export: {}}]")
    assert read_plan(tmp_path / "plan.yaml").steps[0][1]["learning_rate"] == 0.001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: []", "must end in the step `export`"),
        ("steps: [{export: {scheme: int9}}]", r"'int9'"),
        ("steps: [{shrink: {wdth: 1}}, {export: {}}]", "did you mean `width`"),
        ("steps: [{prune: 0.8}, {export: {}}]", "must be a mapping"),
        ("steps: [export]", "must be one name"),
        ("version: 2\nsteps: [{export: {}}]", "version 2"),
        ("[", "can't be read"),
        ("3", "must be a mapping"),
        ("steps: [{export: {scheme: [int8]}}]", r"scheme \['int8'\]; known are"),
        ("steps: [{export: {scheme: {'*': [int8]}}}]", r"scheme \['int8'\]; known are"),
        ("steps: [{train: {shift: a}}, {export: {}}]", "`shift` 'a'; it must be a number, such as 0.0"),
        ("steps: [{train: {epochs: 1.5}}, {export: {}}]", "`epochs` 1.5; it must be a whole number, such as 1"),
        ("steps: [{train: {epochs: .inf}}, {export: {}}]", "`epochs` inf; it must be a whole number, such as 1"),
        ("steps: [{export: {compact: 1}}]", "`compact` 1; it must be true or false"),
    ],
)
def test_bad_plans(text, message, tmp_path):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(dw.ConfigError, match=message):
        read_plan(tmp_path / "plan.yaml")
    with pytest.raises(dw.ConfigError, match="can't be read"):
        read_plan(tmp_path / "none.yaml")


def test_training_loss_follows_output_and_labels(trained):
    assert training_loss(trained, np.zeros(3, np.int64)) == "sparse_categorical_crossentropy"
    fresh = small_cnn()
    assert isinstance(training_loss(fresh, np.zeros(3, np.int64)), keras.losses.SparseCategoricalCrossentropy)
    assert isinstance(training_loss(fresh, np.eye(10)), keras.losses.CategoricalCrossentropy)
    one = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, activation="sigmoid")])
    assert isinstance(training_loss(one, np.zeros(3)), keras.losses.BinaryCrossentropy)
    line = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    assert isinstance(training_loss(line, np.zeros(3)), keras.losses.MeanSquaredError)


def test_without_labels_only_quantization_is_tried(trained, digits, tmp_path):
    x = digits[1][0][:80]
    result = dw.compress(trained, goals=Goals(max_size="20KB"), data=x, out=tmp_path / "out")
    assert result.met
    names = [trial["name"] for trial in result.report["trials"]]
    assert names == ["original, float32", "int8 after training", "int8 weights, dynamic", "float16"]
    assert result.report["result"]["accuracy"] is None


@pytest.mark.parametrize("place", ["begins", "epoch 1/"])
def test_an_interruption_that_a_callback_swallows_still_stops_the_search(place, trained, digits, tmp_path):
    (x, y), _ = digits
    # A shell that runs the tests in the background has them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lines = []

    def say(line):
        lines.append(line)
        if line.startswith("[1]") and place in line:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    plan = Plan(
        name="student", steps=(("shrink", {"width": 0.3}), ("train", {"epochs": 3}), ("export", {"scheme": "int8"}))
    )
    result = dw.compress(
        trained, (x[:200], y[:200]), (x[200:300], y[200:300]), Goals(max_drop="90%"), tmp_path / "out", plan=plan, say=say
    )  # fmt: skip
    assert result.interrupted
    assert [trial["id"] for trial in result.report["trials"]] == ["000"]
    assert not any("epoch 2/" in line for line in lines)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("steps", "reached"), [
    ([{"prune": {"sparsity": 0.5, "structure": "channel"}}], lambda one, whole: one["parameters"] < whole / 2),
    ([{"prune": {"sparsity": 0.5, "structure": [2, 4]}}, {"cluster": {"clusters": 8}}],
     lambda one, whole: one["zeros"] >= 0.48 * whole),
    ([{"factorize": {"energy": 0.8}}, {"quantize": {}}], lambda one, whole: one["parameters"] < whole),
    ([{"shrink": {"width": 0.5, "start": "teacher"}}], lambda one, whole: one["parameters"] < whole / 2),
])  # fmt: skip
def test_every_technique_is_a_step_of_plans(steps, reached, trained, digits, tmp_path):
    (x, y), _ = digits
    plan = Plan.from_dict({"steps": [*steps, {"train": {"epochs": 1}}, {"export": {"scheme": "int8"}}]})
    assert Plan.from_dict(plan.to_dict()) == plan
    result = dw.compress(
        trained, (x[:200], y[:200]), (x[200:300], y[200:300]), Goals(max_drop="90%"), tmp_path / "out", plan=plan
    )  # fmt: skip
    tensors = [
        t.value for t in read_graph(result.file.read_bytes()).tensors if t.value is not None and t.value.ndim > 1
    ]
    one = {"parameters": sum(t.size for t in tensors), "zeros": sum(int((t == 0).sum()) for t in tensors)}
    assert reached(one, trained.count_params())


def test_a_plan_chooses_bits_by_kinds_of_layers(trained, digits, tmp_path):
    (x, y), _ = digits
    recipe = Recipe(width=0.5, scheme="int4-dense")
    assert recipe.name == "0.5 as wide, its own channels, int8, dense layers int4"
    plan = recipe.plan((1,), 1, compact=True)
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    assert read_plan(tmp_path / "plan.yaml") == plan
    result = dw.compress(
        trained, (x[:200], y[:200]), (x[200:300], y[200:300]), Goals(max_drop="90%"), tmp_path / "out", plan=plan
    )  # fmt: skip
    bits = {}
    for operation in read_graph(result.file.read_bytes()).operations:
        if len(operation.inputs) > 1 and operation.inputs[1].value is not None:
            bits.setdefault(operation.name, set()).add(operation.inputs[1].bits)
    assert bits["CONV_2D"] == {8}
    assert bits["FULLY_CONNECTED"] == {4}
    with pytest.raises(dw.ConfigError, match="scheme 'int5'; known are"):
        Plan(name="wrong", steps=(("export", {"scheme": {"*": "int8", "CONV_2D": "int5"}}),))


def test_a_time_budget_ends_the_search_between_trials(trained, digits, tmp_path):
    (x, y), _ = digits
    result = dw.compress(
        trained, (x[:200], y[:200]), (x[200:300], y[200:300]), Goals(max_drop="90%"), tmp_path / "out", budget=1e-6
    )  # fmt: skip
    states = [trial["status"] for trial in result.report["trials"]]
    assert states[0] == "done"
    assert set(states[1:]) == {"skipped"}
    assert {trial["reason"] for trial in result.report["trials"][1:]} == {"the time budget is spent"}
    assert not (tmp_path / "out" / "teacher").exists()
    with pytest.raises(dw.ConfigError, match="`budget` is 'soon'; it must be a time above 0"):
        dw.compress(trained, (x, y), goals=Goals(max_drop="1%"), out=tmp_path / "other", budget="soon")


def test_a_bound_on_the_loss_is_told_as_what_it_is():
    told = Verdict(goal="max_drop", unit="points", limit=0.005, value=-0.0023, met=True, upper=0.0017).text
    assert told == "gain of 0.23 points (with 95% confidence at most 0.17 lost), at most 0.50 lost"
    told = Verdict(goal="max_drop", unit="points", limit=0.005, value=-0.01, met=True, upper=-0.002).text
    assert told == "gain of 1.00 points (with 95% confidence at least 0.20 gained), at most 0.50 lost"


def test_a_loss_within_noise_is_called_so(trained, digits, tmp_path):
    (x, y), _ = digits
    plan = Plan(name="int8", steps=(("export", {"scheme": "int8"}),))
    result = dw.compress(
        trained, (x[:200], y[:200]), (x[230:260], y[230:260]), Goals(max_drop="1%"), tmp_path / "out", plan=plan,
        test=(x[200:230], y[200:230]),
    )  # fmt: skip
    told = result.report["confidence"]
    assert told["samples"] == 30
    assert told["upper"] > 0.01 >= told["drop"]
    (verdict,) = result.report["verdicts"]
    assert verdict["within_noise"]
    assert "with 95% confidence at most" in verdict["text"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "All goals met, within the noise of 30 samples." in page


def test_what_the_original_says_is_recorded_once_for_all_trials(trained, digits, tmp_path, monkeypatch):
    from dwindle.distillation import recording

    (x, y), _ = digits
    written = []
    real = recording._write
    monkeypatch.setattr(recording, "_write", lambda *args: (written.append(1), real(*args)))
    steps = ({"shrink": {"width": 0.5}}, {"train": {"epochs": 1}}, {"quantize": {}}, {"train": {"epochs": 1}})
    plan = Plan.from_dict({"steps": [*steps, {"export": {"scheme": "int8"}}]})
    dw.compress(
        trained, (x[:200], y[:200]), (x[200:300], y[200:300]), Goals(max_drop="90%"), tmp_path / "out", plan=plan
    )
    assert written == [1]


def test_a_regression_model_is_compressed_by_its_error(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 8)).astype(np.float32)
    y = (x @ generator.normal(size=(8, 1))).astype(np.float32)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, y, epochs=5, verbose=0)
    plan = Plan(
        name="p", steps=(("prune", {"sparsity": 0.5}), ("train", {"epochs": 1}), ("export", {"scheme": "int8"}))
    )
    result = dw.compress(model, train=(x, y), goals=Goals(max_drop=0.9), metric="mae", plan=plan, out=tmp_path / "out")
    before, after = result.report["baseline"]["accuracy"], result.report["result"]["accuracy"]
    assert result.met == (after - before <= 0.9)
    assert not result.report["metric"]["higher_is_better"]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"goals": None}, dw.ConfigError, "`goals` is None"),
        ({"model": "x"}, dw.ConfigError, "built keras.Model"),
        ({"epochs": 0}, dw.ConfigError, "`epochs` is 0"),
        ({"train": None}, dw.DataError, "no data is given"),
        ({"train": np.zeros(3)}, dw.DataError, r"must be a tuple \(x, y\)"),
    ],
)
def test_bad_input(trained, digits, tmp_path, arguments, kind, message):
    with pytest.raises(kind, match=message):
        dw.compress(
            **{"model": trained, "train": digits[0], "goals": Goals(max_drop=0.1), "out": tmp_path / "out", **arguments}
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["lifted", "subclassed"])
def test_lifted_and_subclassed_models_have_students_too(kind, trained, digits, tmp_path):
    @keras.saving.register_keras_serializable("test")
    class Wrapped(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = keras.models.clone_model(trained)

        def call(self, inputs):
            return self.inner(inputs)

    model = dw.lift(trained)
    if kind == "subclassed":
        model = Wrapped()
        model(digits[0][0][:1])
    plan = Plan(
        name="p", steps=(("shrink", {"width": 0.5}), ("train", {"epochs": 1}), ("quantize", {}), ("export", {}))
    )
    lines = []
    result = dw.compress(
        model, train=digits[0], goals=Goals(max_size="9KB"), plan=plan, out=tmp_path / "out", say=lines.append
    )
    assert result.met, result.report["trials"]
    assert any("is a subclassed model" in line for line in lines) == (kind == "subclassed")
