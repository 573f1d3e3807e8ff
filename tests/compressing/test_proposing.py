"""The strategy against landscapes whose best point is known: no training, records are computed from a formula."""

from __future__ import annotations

import math

import keras
import pytest

import dwindle as dw
from dwindle.compressing.proposing import NARROWEST, WIDEST, Proposer, _narrowed, _Study
from dwindle.compressing.recipes import Recipe
from dwindle.compressing.trying import blank

EPOCHS = 20
BASELINE = {
    "status": "done",
    "accuracy": 0.99,
    "size_bytes": 1_700_000,
    "latency_ms": {"p50": 4.0, "p90": 4.1},
    "ram_bytes": 60_000,
    "packed_bytes": 1_500_000,
}


def figures(width, scheme="int8", depth=1.0):
    """A file gets smaller with the square of its width; four bits are half the bytes and twice the time."""
    few = scheme == "int4"
    return {
        "size_bytes": round(2000 + 430_000 * width**2 * depth * (0.55 if few else 1)),
        "latency_ms": {"p50": 0.2 + 1.8 * width * (2 if few else 1), "p90": 0.3 + 1.8 * width * (2 if few else 1)},
        "baseline_p50_ms": 4.0, "baseline_p90_ms": 4.1, "ram_bytes": round(20_000 * width), "packed_bytes": 0,
    }  # fmt: skip


def loss(width, epochs, start, scheme):
    """Narrow nets lose more; training repairs it; new weights and few bits cost some."""
    asymptote = 0.0002 * (0.3 / width) ** 2 * (1.5 if scheme == "int4" else 1.0)
    return asymptote * (1 + (8 if start == "teacher" else 12) * math.exp(-epochs / 5))


def width_of(steps):
    """How wide a plan makes the model, and what its students begin with."""
    options = dict(steps)
    if options.get("prune", {}).get("structure") == "channel":
        return math.sqrt(1 - options["prune"]["sparsity"]), "teacher"
    shrink = options.get("shrink", {"width": 1.0, "start": "teacher"})
    return shrink["width"], shrink["start"]


def found_by(goals, schemes=("int8",), trials=60, seed=0, higher=True, landscape=loss, of_kind=None):
    """Run the strategy to its end; return the records of all trials."""
    baseline = {**BASELINE, "plan": {"steps": [{"export": {"scheme": "float32"}}]}}
    proposer = Proposer(
        model=keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), goals=goals, higher_is_better=higher,
        baseline=baseline, schemes=schemes, epochs=EPOCHS, trials=trials, seed=seed,
        screen=lambda recipes: [(of_kind or figures)(recipe.width, recipe.scheme) for recipe in recipes],
    )  # fmt: skip
    generator, records = proposer.batches(without_training=False, without_samples=False), []
    plans = next(generator)
    while True:
        batch = []
        for plan in plans:
            scheme = plan.steps[-1][1]["scheme"]
            width, start = width_of(plan.steps)
            epochs = sum(o["epochs"] for step, o in plan.steps if step == "train" and o["learning_rate"] > 2e-4)
            record = blank(len(records), plan, status="done", reason=None) | figures(width, scheme)
            record["packed_bytes"] = round(0.9 * record["size_bytes"])
            lost = landscape(width, epochs, start, scheme) if width < 1 else 0.0005
            record["accuracy"] = BASELINE["accuracy"] - lost if higher else BASELINE["accuracy"] + lost
            records.append(record)
            batch.append(record)
        try:
            plans = generator.send(batch)
        except StopIteration:
            return records


def cheapest(goals, records, higher=True):
    meeting = [r for r in records if all(v.met for v in goals.judge(BASELINE, r, higher))]
    return min(goals.cost(BASELINE, r, higher) for r in meeting) if meeting else None


def best_possible(goals, schemes=("int8",)):
    costs = []
    for scheme in schemes:
        for step in range(400):
            width = NARROWEST * (WIDEST / NARROWEST) ** (step / 399)
            record = figures(width, scheme) | {"accuracy": 0.99 - loss(width, 3 * EPOCHS, "teacher", scheme)}
            if all(v.met for v in goals.judge(BASELINE, record, True)):
                costs.append(goals.cost(BASELINE, record, True))
    return min(costs)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("goals", "schemes"), [
    (dw.Goals(max_drop=0.001), ("int8",)),
    (dw.Goals(max_drop=0.01), ("int8", "int4")),
    (dw.Goals(max_drop=0.001, max_size="20KB", max_latency="0.35x"), ("int8",)),
    (dw.Goals(max_drop=0.002, minimize="latency"), ("int8", "int4")),
    (dw.Goals(max_drop=0.002, max_latency="0.15x", latency="p90"), ("int8", "int4")),
])  # fmt: skip
def test_what_is_found_is_near_the_best_there_is(goals, schemes, seed):
    records = found_by(goals, schemes, seed=seed)
    assert len(records) <= 60
    assert cheapest(goals, records) <= 1.3 * best_possible(goals, schemes)


def test_without_a_limit_on_the_loss_the_most_accurate_file_is_looked_for():
    goals = dw.Goals(max_size="20KB")
    records = found_by(goals)
    assert cheapest(goals, records) <= 1.2 * best_possible(goals)
    assert max(r["size_bytes"] for r in records if r["size_bytes"] <= 20_000) > 15_000


def test_goals_that_nothing_meets_leave_a_front_and_come_to_an_end():
    goals = dw.Goals(max_drop=0.0, max_size="2KB")
    records = found_by(goals)
    assert cheapest(goals, records) is None
    students = sorted(r["size_bytes"] for r in records if {"shrink", "prune"} & set(r["plan"]["steps"][0]))
    assert students[0] < 4_000
    assert students[-1] > 50_000
    assert len(students) >= 5


def test_a_metric_that_is_better_when_lower():
    goals = dw.Goals(max_relative_drop="1%")
    records = found_by(goals, higher=False)
    assert cheapest(goals, records, higher=False) < 40_000


def test_the_same_records_lead_to_the_same_proposals():
    goals = dw.Goals(max_drop=0.001)
    one, two = (found_by(goals, ("int8", "int4"), seed=3) for _ in range(2))
    assert [r["plan"] for r in one] == [r["plan"] for r in two]
    assert [r["plan"] for r in one] != [r["plan"] for r in found_by(goals, ("int8", "int4"), seed=4)]


def test_the_number_of_trials_is_bounded():
    assert len(found_by(dw.Goals(max_drop=0.001), trials=12)) == 12


def test_dense_layers_have_bits_of_their_own_where_they_hold_the_bytes():
    goals = dw.Goals(max_size="20KB")
    assert any("dense layers int4" in r["name"] for r in found_by(goals, ("int8", "int4")))
    assert not any("dense layers int4" in r["name"] for r in found_by(goals, ("int8",)))


def test_hopeless_short_trainings_are_not_made_longer():
    def landscape(width, epochs, start, scheme):
        return 0.5 if width < 0.3 else loss(width, epochs, start, scheme)

    goals = dw.Goals(max_drop=0.0003)
    records = found_by(goals, landscape=landscape)
    longer = [r["plan"] for r in records if "+" in r["name"]]
    assert longer
    assert all(width_of(dw.Plan.from_dict(plan).steps)[0] >= 0.299 for plan in longer)


def test_a_longer_plan_begins_as_the_shorter_one():
    recipe = Recipe(width=0.3)
    short, longer = recipe.plan((5,), 0), recipe.plan((5, 15), 5)
    assert longer.steps[:2] == short.steps[:2]
    assert [step for step, _ in longer.steps] == ["shrink", "train", "train", "quantize", "train", "export"]


def test_files_are_compact_where_kilobytes_count():
    small, large = {"size_bytes": 1_700_000}, {"size_bytes": 50_000_000}
    assert dw.Goals(max_size="20KB").compacts(large)
    assert not dw.Goals(max_size="5MB").compacts(small)
    assert dw.Goals(max_drop=0.01).compacts(small)
    assert not dw.Goals(max_drop=0.01).compacts(large)
    assert not dw.Goals(max_drop=0.01, minimize="latency").compacts(small)
    written = [r["plan"]["steps"][-1]["export"]["compact"] for r in found_by(dw.Goals(max_size="20KB"))]
    assert all(written)


def narrowed(answers):
    """Return the width that is found where `answers` says of each whether it fits, and what was asked."""
    search, asked = _narrowed(), []
    width = next(search)
    while True:
        asked.append(width)
        try:
            width = search.send(answers(width))
        except StopIteration as end:
            return end.value, asked


@pytest.mark.parametrize("limit", [0.04, 0.05, 0.161, 0.3, 0.79])
def test_the_widest_width_is_found_to_a_twentieth(limit):
    found, asked = narrowed(lambda width: width <= limit)
    assert limit / 1.06 <= found <= limit
    assert len(asked) <= 8


def test_widths_too_narrow_to_be_possible_do_not_hide_those_that_fit():
    found, _ = narrowed(lambda width: None if width < 0.33 else width <= 0.5)
    assert 0.5 / 1.06 <= found <= 0.5


def test_what_no_width_can_do_is_given_up():
    assert narrowed(lambda _: None) == (None, [WIDEST])
    assert narrowed(lambda _: False)[0] is None
    assert narrowed(lambda _: True) == (WIDEST, [WIDEST])


def test_the_optimizer_is_told_of_wider_ones_than_it_asks_for():
    study = _Study(0, widest=0.22, deepens=False, schemes=["int8"], packs=False)
    study.tell(Recipe(width=0.248, energy=0.9), 1.0)
    assert study.ask().width <= 0.22


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("goals", [
    dw.Goals(max_drop=0.001, max_packed="12KB"),
    dw.Goals(max_drop=0.001, minimize="packed"),
    dw.Goals(max_drop=0.0005, max_size="24KB", minimize="drop"),
])  # fmt: skip
def test_the_optimizer_takes_whatever_was_tried(goals, seed, monkeypatch):
    # Kinds of candidates differ in size at the same width, so that some are tried wider than any that is known yet.
    made = []

    def smaller_each_time(width, scheme):
        made.append(width)
        return figures(width * 0.97 ** (len(made) % 9), scheme)

    monkeypatch.setattr("dwindle.compressing.proposing.residual_blocks", lambda _: [type("B", (), {"pinned": False})])
    assert len(found_by(goals, ("int8", "int4"), seed=seed, of_kind=smaller_each_time)) > 10


def test_training_at_full_size_is_left_out_where_quantization_alone_meets_the_goals():
    def tuned(goals):
        return [r for r in found_by(goals) if r["plan"]["steps"][0] == {"quantize": {"scheme": "int8"}}]

    assert not tuned(dw.Goals(max_drop=0.001))
    assert tuned(dw.Goals(max_drop=0.0001))
    assert tuned(dw.Goals(max_drop=0.001, minimize="drop"))


def test_widths_that_are_the_same_network_are_tried_once():
    """Layers keep multiples of some channels: sizes come in steps of a tenth."""

    def stepped(width, scheme):
        return figures(math.ceil(10 * width) / 10, scheme)

    records = found_by(dw.Goals(max_drop=0.001), of_kind=stepped)
    short = [r for r in records if sum("train" in step for step in r["plan"]["steps"]) == 1]
    seen = []
    for record in short:
        steps = [next(iter(step.items())) for step in record["plan"]["steps"]]
        width, start = width_of(steps)
        kind = [step for step, _ in steps], start, dict(steps).get("prune", {}).get("target"), math.ceil(10 * width)
        seen.append((*kind, dict(steps).get("factorize", {}).get("energy"), dict(steps).get("prune", {}).get("scope")))
    assert len(seen) == len({str(one) for one in seen})
