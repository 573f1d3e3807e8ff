"""Runs: what is kept between trials and runs, where trials run, who judges, and what is told meanwhile."""

from __future__ import annotations

import io

import numpy as np
import pytest
import yaml
from small_searches import arrays, quick

import dwindle as dw
from dwindle.compressing.events import Event
from dwindle.compressing.run import begun_search
from dwindle.compressing.stages import Stages
from dwindle.compressing.steps import Workbench, run_steps
from dwindle.compressing.store import Store, read_trials
from dwindle.compressing.trying import Case, pair
from dwindle.data import Split, read_data, set_aside
from dwindle.measuring.latency import Latency

PLAN = (
    ("shrink", {"width": 0.5, "start": "teacher"}), ("prune", {"sparsity": 0.5}), ("train", {"epochs": 2}),
    ("train", {"epochs": 3}), ("quantize", {}), ("train", {"epochs": 1, "learning_rate": 2e-4}), ("export", {}),
)  # fmt: skip


def bench(task, folder=None):
    model, parts = task
    return Workbench(
        original=model, train=Split(x=(parts["train"][0],), y=parts["train"][1]),
        loss="sparse_categorical_crossentropy", distills=True, seed=3, tell=lambda _event: None,
        stages=None if folder is None else Stages(folder),
    )  # fmt: skip


def test_a_plan_that_goes_on_from_a_stage_ends_in_the_same_weights(task, tmp_path):
    plan = dw.Plan(name="p", steps=PLAN)
    shorter = dw.Plan(name="s", steps=(*PLAN[:3], ("export", {})))
    whole = run_steps(plan.steps, bench(task))
    run_steps(shorter.steps, bench(task, tmp_path))
    assert len(list(tmp_path.glob("*.keras"))) == 1
    told = []
    watched = bench(task, tmp_path)
    object.__setattr__(watched, "tell", lambda event: told.append(event.text))
    continued = run_steps(plan.steps, watched)
    assert [text.split(",")[0] for text in told] == ["epoch 1/3", "epoch 2/3", "epoch 3/3", "epoch 1/1"]
    for one, two in zip(whole.get_weights(), continued.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    kept = np.asarray(dw.finalize(run_steps(plan.steps[:4], bench(task, tmp_path))).layers[0].kernel)
    assert (kept == 0).mean() >= 0.5


def test_stages_are_bounded_and_damaged_ones_are_made_anew(task, tmp_path):
    stages = Stages(tmp_path, most=2)
    steps = [(("train", {"epochs": n}),) for n in range(4)]
    for step in steps:
        stages.keep(step, task[0])
    assert len(list(tmp_path.glob("*.keras"))) == 2
    assert stages.nearest(steps[0]) == (0, None)
    assert stages.nearest(steps[3])[0] == 1
    for path in tmp_path.glob("*.keras"):
        path.write_bytes(path.read_bytes()[:500])
    assert stages.nearest(steps[3]) == (0, None)


def test_two_runs_do_not_share_a_folder(task, tmp_path):
    model, parts = task
    store = Store(tmp_path / "out", {"seed": 0})
    with pytest.raises(dw.ConfigError, match="is in use by another run"):
        dw.compress(model, data=arrays(parts), goals=dw.Goals(max_drop=0.1), out=tmp_path / "out", force=True)
    store.close()
    Store(tmp_path / "out", {"seed": 0}, force=True).close()


def test_a_store_keeps_what_has_a_row_and_nothing_else(tmp_path):
    store = Store(tmp_path / "out", {"seed": 0})
    for number in range(3):
        working = store.begin(number)
        (working / "model.tflite").write_bytes(b"x" * number)
        (working / "model.keras").write_bytes(b"twin")
        store.finish(number, working, {"id": f"{number:03d}"})
    store.begin(3)
    store.forget_twins(["000", "002"])
    store.close()
    assert [r["id"] for r in read_trials(tmp_path / "out")] == ["000", "001", "002"]
    assert [p.parent.name for p in (tmp_path / "out").rglob("model.keras")] == ["001"]
    again = Store(tmp_path / "out", {"seed": 0}, resume=True)
    assert again.finished(2) == {"id": "002"}
    assert again.finished(3) is None
    assert sorted(p.name for p in (tmp_path / "out" / "trials").iterdir()) == ["000", "001", "002"]
    again.close()
    with pytest.raises(dw.ConfigError, match="another seed"):
        Store(tmp_path / "out", {"seed": 1}, resume=True)
    (tmp_path / "out" / "trials.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(dw.ConfigError, match="is damaged"):
        Store(tmp_path / "out", {"seed": 0}, resume=True)
    with pytest.raises(dw.ConfigError, match="holds no run"):
        read_trials(tmp_path)


def test_who_picks_does_not_judge(task, tmp_path):
    model, parts = task
    searches = {}
    for name, given in (
        ("all", parts),
        ("no test", {k: parts[k] for k in ("train", "val")}),
        ("one", {"test": parts["test"]}),
    ):
        search, held_back = begun_search(
            model, data=arrays(given), goals=dw.Goals(max_drop=0.1), out=tmp_path / name, target="litert",
            metric="accuracy", epochs=1, seed=0, threads=1,
        )  # fmt: skip
        search.store.close()
        searches[name] = (search.case.data, held_back)
    assert not searches["all"][1]
    assert len(searches["all"][0].val) == 200
    for name, total in (("no test", 200), ("one", 200)):
        data, held_back = searches[name]
        assert held_back
        assert abs(len(data.val) - total / 2) <= 4
        assert len(data.val) + len(data.test) == total
        picks, judges = ({row.tobytes() for row in split.x[0]} for split in (data.val, data.test))
        assert not picks & judges


def test_halves_have_the_same_classes():
    y = np.repeat([0, 1, 2], [30, 20, 10])
    one, two = set_aside(Split(x=(np.arange(60.0)[:, None],), y=y), 0.5, 0)
    assert (np.bincount(one.y) == [15, 10, 5]).all()
    assert (np.bincount(two.y) == [15, 10, 5]).all()


def test_a_search_ends_in_a_smaller_file_that_meets_its_goals(task, tmp_path):
    events = []
    result = quick(task, tmp_path / "out", watch=events.append)
    assert result.met
    report = result.report
    chosen = report["result"]
    meeting = [t for t in report["trials"][1:] if t["meets"]]
    assert chosen["size_bytes"] == min(t["size_bytes"] for t in meeting)
    assert report["alternatives"]["smallest"] == chosen["id"]
    assert result.file.stat().st_size == chosen["size_bytes"] <= 5000
    kinds = {event.kind for event in events}
    assert kinds == {"note", "begin", "progress", "end", "best"}
    assert [e.trial for e in events if e.kind == "end"] == list(range(len(report["trials"])))
    assert not any((tmp_path / "out" / name).exists() for name in ("stages", "teacher", "shared"))
    twins = {p.parent.name for p in (tmp_path / "out" / "trials").rglob("model.keras")}
    assert chosen["id"] in twins
    # The plan that was found makes the same file again.
    plan = dw.Plan.from_dict(yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text()))
    again = quick(task, tmp_path / "again", plan=plan)
    assert again.report["result"]["sha256"] == chosen["sha256"]


def test_goals_on_packed_size_and_relative_loss(task, tmp_path):
    goals = dw.Goals(max_relative_drop="60%", max_packed="3KB", minimize="packed")
    result = quick(task, tmp_path / "out", goals=goals)
    chosen = result.report["result"]
    assert result.met
    packed = dw.packing.pack(result.file, tmp_path / "m.dwz").packed_bytes
    assert chosen["packed_bytes"] == packed <= 3000
    assert {verdict.goal for verdict in result.verdicts} == {"max_relative_drop", "max_packed"}
    assert packed == min(t["packed_bytes"] for t in result.report["trials"] if t["meets"])


def test_goals_are_judged_by_hand():
    before = {"accuracy": 2.0, "latency_ms": {"p50": 1.0, "p90": 4.0}}
    after = {
        "accuracy": 2.5,
        "size_bytes": 9,
        "packed_bytes": 5,
        "ram_bytes": 3,
        "latency_ms": {"p50": 0.9, "p90": 1.0},
    }
    goals = dw.Goals(max_relative_drop=0.2, max_packed=4, max_latency="0.5x", latency="p90", minimize="ram")
    verdicts = {v.goal: (v.value, v.met) for v in goals.judge(before, after, higher_is_better=False)}
    assert verdicts == {"max_relative_drop": (0.25, False), "max_packed": (5.0, False), "max_latency": (0.25, True)}
    assert goals.cost(before, after, False) == 3
    assert dw.Goals(max_size=1).minimized == "drop"
    assert dw.Goals(max_relative_drop=0.1).minimized == "size"
    assert dw.Goals.from_dict(goals.to_dict()) == goals
    with pytest.raises(dw.ConfigError, match="`minimize` is 'bytes'"):
        dw.Goals(max_size=1, minimize="bytes")


def test_a_trial_too_long_for_the_budget_is_not_begun(task, tmp_path):
    lines = []
    result = quick(task, tmp_path / "out", budget="6s", trials=40, epochs=40, say=lines.append)
    assert result.report["seconds"] < 60
    assert any("the time budget" in line for line in lines)


def test_the_live_display_shows_goals_best_and_trials():
    from rich.console import Console

    from dwindle.reporting.live import LiveDisplay

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    with LiveDisplay(dw.Goals(max_drop="1%"), "20m", console) as watch:
        watch(Event(kind="begin", text="[1] one: begins", trial=1, facts={"name": "one [x]"}))
        watch(Event(kind="progress", text="[1]: epoch 1/4", trial=1, facts={"epoch": 1, "epochs": 4}))
        watch._live.refresh()
        watch(Event(kind="end", text="[1] one: 0.98, 4 KB", trial=1, facts={"meets": True}))
        watch(Event(kind="best", text="best so far: [1] one", trial=1))
        watch._live.refresh()
    shown = screen.getvalue()
    for text in ("max drop 0.01", "smallest size", "[1] one [x]", "epoch 1/4", "best   [1] one", "left", "0.98, 4 KB"):
        assert text in shown


def test_samples_of_a_case():
    data = read_data(
        {"x_train": np.zeros((20, 2), np.float32), "y_train": np.zeros(20, int), "x_test": np.ones((4, 2), np.float32)}
    )
    case = Case(bench=None, data=data, metric="accuracy", target=None)
    assert case.calibration is data.train
    assert case.judging is data.val
    assert pair(data.test) is None


def test_what_tensorboard_gets(tmp_path):
    import tensorflow as tf

    from dwindle.compressing.tensorboard import TensorBoardLog

    with TensorBoardLog(tmp_path / "logs") as watch:
        watch(Event(kind="progress", text="", trial=4, facts={"epoch": 1, "epochs": 2, "loss": 0.5}))
        watch(Event(kind="progress", text="", trial=4, facts={"epoch": 2, "epochs": 2, "loss": 0.25}))
        figures = {"status": "done", "accuracy": 0.9, "size_bytes": 1000, "latency_ms": {"p50": 0.1}, "meets": True}
        watch(Event(kind="end", text="", trial=4, facts=figures))
    found = {}
    for run in ("trial-004", "trials"):
        (path,) = (tmp_path / "logs" / run).iterdir()
        events = [tf.compat.v1.Event.FromString(row) for row in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()]
        assert events[0].file_version == "brain.Event:2"
        found[run] = [(event.step, {v.tag: v.simple_value for v in event.summary.value}) for event in events[1:]]
    assert found["trial-004"] == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]
    assert found["trials"][0][0] == 4
    assert found["trials"][0][1] == pytest.approx({"metric": 0.9, "size_bytes": 1000, "latency_ms": 0.1, "meets": 1.0})


def test_the_margin_of_a_loss_by_hand():
    goals, before = dw.Goals(max_drop=0.01), {"accuracy": 0.98}
    after = {"accuracy": 0.975, "loss_error": 0.002}
    assert goals.cautious(before, after, True)["accuracy"] == pytest.approx(0.975 - 2.3263478740408408 * 0.002)
    assert goals.cautious(before, {**after, "loss_error": 0.1}, True)["accuracy"] == pytest.approx(0.975 - 0.0075)
    assert goals.cautious(before, {**after, "loss_error": None}, True) == {**after, "loss_error": None}
    worse = goals.cautious({"accuracy": 2.0}, {"accuracy": 2.004, "loss_error": 0.001}, False)
    assert worse["accuracy"] == pytest.approx(2.004 + 0.0023263478740408408)
    assert dw.Goals(max_size=1).cautious(before, after, True) is after
    assert dw.Goals(max_drop=0.01, max_relative_drop=0.005).allowed_loss({"accuracy": 0.8}) == pytest.approx(0.004)


def test_the_error_of_a_paired_loss_by_hand():
    from dwindle.measuring.paired import paired_drop

    y = np.zeros(100, int)
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    before = np.array([right] * 90 + [wrong] * 10)
    after = np.array([wrong] * 8 + [right] * 82 + [right] * 3 + [wrong] * 7)
    found = paired_drop(before, after, y)
    assert (found.only_before, found.only_after, found.drop) == (8, 3, pytest.approx(0.05))
    assert found.error == pytest.approx(np.sqrt(8.5 + 3.5 - 25 / 102) / 102)
    assert found.upper == pytest.approx(5 / 102 + 1.6448536269514722 * found.error)


@pytest.mark.parametrize("took", [1e-6, 1e6])
def test_the_chosen_file_has_its_twin_whichever_was_faster(took, task, tmp_path, monkeypatch):
    # The plan's file is the original's own, and only times, which vary, tell the two trials apart.
    times = Latency(p50_ms=took, p90_ms=took, mean_ms=took, min_ms=took, runs=1, threads=1)
    monkeypatch.setattr("dwindle.compressing.search.compare_latency", lambda files, **_: [times] * len(files))
    plan = dw.Plan(name="as it is", steps=(("export", {"scheme": "float32"}),))
    result = quick(task, tmp_path / "out", plan=plan)
    assert result.file.with_name("model.keras").exists()
