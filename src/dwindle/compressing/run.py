"""Compress: the user says what the file must reach; plans are tried and measured until it does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import keras
import numpy as np

import dwindle
from dwindle.compressing.engines import ENGINES, Engine, Processes, Ray
from dwindle.compressing.events import Event, Tell
from dwindle.compressing.evidence import evidence
from dwindle.compressing.goals import Goals, Verdict
from dwindle.compressing.plans import Plan
from dwindle.compressing.search import Search, fingerprint
from dwindle.compressing.stages import Stages
from dwindle.compressing.steps import Workbench, training_loss
from dwindle.compressing.store import Store, check_out_folder
from dwindle.compressing.trying import Case, figures_of
from dwindle.compressing.trying import pair as pair_of
from dwindle.data import Data, Split, fit_to_model, halved, read_data
from dwindle.distillation import record
from dwindle.errors import ConfigError, DataError, DwindleError, check_choice
from dwindle.exporting import output_quanta, pack_inputs, predict
from dwindle.exporting.verify import BOUNDS, compare
from dwindle.files import write_text
from dwindle.interruption import interruptible
from dwindle.lifting import lift
from dwindle.measuring import (
    LiteRTRunner,
    check_metric,
    compare_latency,
    environment,
    higher_is_better,
    inspect_file,
    measure,
)
from dwindle.measuring.paired import PairedDrop, paired_drop
from dwindle.quantization.schemes import resolve_scheme
from dwindle.reporting import write_report
from dwindle.targets import Target, read_target
from dwindle.units import parse_duration
from dwindle.weights import is_graph


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `compress` found.

    Attributes:
        met: Whether the chosen file meets every goal, judged on data that did not pick it.
        interrupted: Whether the search was stopped before its end.
        file: The chosen file, ``model.tflite`` in the out folder; None if nothing could be written.
        verdicts: Each goal with what was measured.
        report: The content of ``report.json``.
    """

    met: bool
    interrupted: bool
    file: Path | None
    verdicts: tuple[Verdict, ...]
    report: Mapping[str, Any]


def compress(
    model: keras.Model,
    train: Any = None,
    validation: Any = None,
    goals: Goals | None = None,
    out: str | Path = "dwindle-out",
    *,
    test: Any = None,
    data: Any = None,
    target: str | Path | Target = "litert",
    metric: Any = "accuracy",
    epochs: int = 20,
    seed: int = 0,
    threads: int = 1,
    plan: Plan | None = None,
    budget: float | str | None = None,
    trials: int = 40,
    workers: int = 1,
    engine: str = "local",
    resume: bool = False,
    force: bool = False,
    say: Callable[[str], None] | None = None,
    watch: Tell | None = None,
    source: str | None = None,
    command: str | None = None,
) -> Result:
    """Find a smaller, faster ``.tflite`` of ``model`` that meets the goals, measured on the file itself.

    It tries quantization after training and in training, then smaller students of the model, in width, depth, rank and
    bits: many for a short time with the model as teacher, and the promising ones longer. Sizes, times and RAM of
    candidates are measured before anything is trained. Each trial's file is written, verified and measured; validation
    data picks the one that costs least of those that meet the goals, and data that had no part in that judges.

    Args:
        model: A trained Keras model; it is not changed.
        train: ``(x, y)`` training samples.
        validation: ``(x, y)`` samples that pick; carved from the training samples where it is left out.
        goals: What the file must reach.
        out: Folder for ``model.tflite``, ``model.keras``, ``report.html``, ``report.json``, ``model-card.md``,
            ``plan.yaml`` and ``trials/``.
        test: ``(x, y)`` samples that judge. Without them half of the validation samples is held back for it.
        data: Instead of these three: anything that `dwindle.data.read_data` reads.
        target: What runs the file: ``"litert"``, ``"micro"``, a board such as ``"cortex-m4-256k"``, or a YAML file; see
            `dwindle.targets`. Its sizes are goals where you set none. For microcontrollers every file has to run in
            TensorFlow Lite Micro, and ``out`` gets the chosen one's C++ sources in ``micro``.
        metric: ``"accuracy"`` or another Keras metric.
        epochs: Epochs of a student's training; fine-tuning takes a part of it.
        seed: Fixes the result on one machine.
        threads: Threads of the latency measurement.
        plan: Run this plan alone instead of the search.
        budget: Time for the search: seconds, ``"20m"`` or ``"1h"``. No trial begins that would not end in it, as far as
            is known; what runs then is finished.
        trials: About how many trials there are at most.
        workers: How many trials run at a time, each in a process with its share of the cores.
        engine: ``"local"``, or ``"ray"``: on a Ray cluster, that of ``RAY_ADDRESS`` or one on this machine.
        resume: Go on with the run in ``out``.
        force: Write over the run in ``out``.
        say: Called with progress lines; nothing is printed otherwise.
        watch: Called with the same as `dwindle.compressing.events.Event`.
        source: Where the model came from, for the report.
        command: How to do this again, for the report.

    Returns:
        The result; ``result.met`` says whether the goals are met. On Ctrl-C what was found so far is written, and
        ``result.interrupted`` is True.

    Raises:
        ConfigError: For goals, a folder or a plan that are not valid.
        DataError: If the data does not fit the model.
    """
    for name, value in (("trials", trials), ("workers", workers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"`{name}` is {value!r}; it must be a whole number of at least 1")
    check_choice("engine", engine, ENGINES)
    seconds = None if budget is None else parse_duration(budget, "budget")
    begun = time.monotonic()
    search, held_back = begun_search(
        model, train, validation, test, data, goals=goals, out=out, target=target, metric=metric, epochs=epochs,
        seed=seed, threads=threads, resume=resume, force=force, say=say, watch=watch,
    )  # fmt: skip
    search.most, search.plan = trials, plan
    search.deadline = None if seconds is None else begun + seconds
    try:
        interrupted = _run(search, workers, engine)
        facts = {"source": source or model.name, "command": command or _call(search.goals, out, seed), "seed": seed,
                 "seconds": round(time.monotonic() - begun, 1), "interrupted": interrupted, "threads": threads,
                 "held_back": held_back}  # fmt: skip
        result = _conclude(search, facts)
        if not interrupted:
            search.store.tidy()
        search.tell(Event(kind="note", text=f"{search.store.size_bytes() / 1e6:,.1f} MB in {search.store.folder}"))
    finally:
        search.store.close()
    return result


def begun_search(
    model: keras.Model, train: Any = None, validation: Any = None, test: Any = None, data: Any = None, *,
    goals: Goals | None, out: str | Path, target: str | Path | Target, metric: Any, epochs: int, seed: int,
    threads: int, resume: bool = False, force: bool = False, say: Callable[[str], None] | None = None,
    watch: Tell | None = None,
) -> tuple[Search, bool]:  # fmt: skip
    """Check everything, make the out folder, and return a search that has tried nothing yet.

    Args and errors are those of `compress`; the caller closes the search's store.

    Returns:
        The search, and whether half of the samples that would pick was held back to judge.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ConfigError(f"`model` is {model!r}; it must be a built keras.Model (dw.load makes one)")
    device = read_target(target)
    if goals is None and (device.max_size or device.max_ram):
        goals = Goals(max_size=device.max_size, max_ram=device.max_ram)
    if goals is None:
        raise ConfigError("`goals` is None; pass dw.Goals(max_drop=0.01, max_size='100KB') or the like")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ConfigError(f"`epochs` is {epochs!r}; it must be a whole number of at least 1")
    goals = goals.on(max_size=device.max_size, max_ram=device.max_ram)
    check_metric(metric)
    check_out_folder(out, resume=resume, force=force)
    tell = _telling(say, watch)
    if not is_graph(model):
        tell(Event(kind="note", text=f"{model.name} is a subclassed model: it is lifted, the same computation"))
        model = lift(model)
    fitted, held_back = _data_for(model, train, validation, test, data, seed)
    marks = {"seed": seed, "epochs": epochs, "model": fingerprint(model), "data": fitted.sha256, "target": device.name}
    store = Store(out, marks, resume=resume, force=force)
    try:
        case = _case(model, fitted, metric, device, threads, goals, seed, store, tell)
    except BaseException:
        store.close()
        raise
    return Search(case=case, goals=goals, store=store, epochs=epochs, tell=tell), held_back


def _telling(say: Callable[[str], None] | None, watch: Tell | None) -> Tell:
    """Return what hands events on, as lines and as they are."""

    def tell(event: Event) -> None:
        if say is not None:
            say(event.text)
        if watch is not None:
            watch(event)

    return tell


def _case(
    model: keras.Model, data: Data, metric: Any, target: Target, threads: int, goals: Goals, seed: int, store: Store,
    tell: Tell,
) -> Case:  # fmt: skip
    teaches = len(model.outputs) == 1 and len(model.outputs[0].shape) == 2 and int(model.outputs[0].shape[1] or 0) > 1
    loss = training_loss(model, None if data.train is None else data.train.y)
    bench = Workbench(
        original=model, train=data.train, loss=loss, distills=teaches, seed=seed, tell=tell, folder=store.teacher,
        stages=Stages(store.stages),
    )  # fmt: skip
    return Case(bench=bench, data=data, metric=metric, target=target, threads=threads, packs=goals.needs_packed)


def _run(search: Search, workers: int, engine: str) -> bool:
    """Search; return whether the user stopped it."""
    with interruptible() as interruption:
        bench = replace(search.case.bench, interruption=interruption, tell=_within(search))
        search.case = replace(search.case, bench=bench)
        try:
            search.engine = _engine(search, workers, engine)
            try:
                search.run()
            finally:
                if search.engine is not None:
                    search.engine.close()
        except Exception:
            # A native library that is interrupted in a callback raises an error of its own.
            if not interruption.asked:
                raise
        except KeyboardInterrupt:
            pass
        else:
            return False
    search.tell(Event(kind="note", text="interrupted: writing down what was found so far; go on with --resume"))
    return True


def _within(search: Search) -> Tell:
    """Return what says a step's progress with the trial that it belongs to."""

    def tell(event: Event) -> None:
        if event.kind == "begin":
            search.tell(event)
            return
        number = search.current if event.trial is None else event.trial
        search.tell(replace(event, trial=number, text=f"[{number}]: {event.text}"))

    return tell


def _engine(search: Search, workers: int, engine: str) -> Engine | None:
    """Return where trials run; None for this process, one after the other."""
    if workers == 1 and engine == "local":
        return None
    case, store = search.case, search.store
    if case.bench.distills and case.bench.train is not None and case.bench.folder is not None:
        record(case.bench.original, pack_inputs(case.bench.original, case.bench.train.x), case.bench.folder)
    shutil.rmtree(store.shared, ignore_errors=True)
    store.shared.mkdir()
    if engine == "ray":
        return Ray(case, store.shared, workers, search.tell, case.bench.interruption)
    return Processes(case, store.shared, workers, store.stages, case.bench.tell, case.bench.interruption)


def _data_for(model: keras.Model, train: Any, validation: Any, test: Any, data: Any, seed: int) -> tuple[Data, bool]:
    """Return the user's data in the model's shape, and whether half of what picks was held back to judge."""
    if data is None:
        named = {}
        for name, given in (("train", train), ("val", validation), ("test", test)):
            if given is None:
                continue
            if not isinstance(given, tuple) or len(given) != 2:
                raise DataError(f"`{name}` is a {type(given).__name__}; it must be a tuple (x, y), or pass `data`")
            named[f"x_{name}"], named[f"y_{name}"] = given
        if not named:
            raise DataError("no data is given; pass `train` and `validation` as (x, y), or `data`")
        data = named
    found = read_data(data)
    shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    units = model.outputs[0].shape[-1] if len(model.outputs) == 1 and len(model.outputs[0].shape) == 2 else None
    dtypes = [keras.backend.standardize_dtype(tensor.dtype) for tensor in model.inputs]
    fitted = fit_to_model(found, shapes, units, input_dtypes=dtypes)
    picking = fitted.val or fitted.test
    if picking is None or (fitted.val is not None and fitted.test is not None):
        return fitted, False
    picks, judges = halved(picking, seed)
    return replace(fitted, val=picks, test=judges), True


def _call(goals: Goals, out: str | Path, seed: int) -> str:
    asked = ", ".join(f"{key}={value!r}" for key, value in goals.to_dict().items() if value is not None)
    return f"dw.compress(model, train=..., goals=dw.Goals({asked}), out={str(out)!r}, seed={seed})"


def _conclude(search: Search, facts: Mapping[str, Any]) -> Result:
    """Judge the best trial on held-back data, publish its files and write the report."""
    chosen = search.best() if search.trials else None
    report = _frame(search, facts)
    report["model"]["sha256"] = fingerprint(search.case.bench.original)
    verdicts: list[Verdict] = []
    if chosen is not None:
        baseline, result, verification = _judge(search, chosen)
        sure = _confidence(search, chosen)
        upper = None if sure is None else sure.upper
        verdicts = search.goals.judge(baseline, result, higher_is_better(search.case.metric), upper)
        report["confidence"] = None if sure is None else sure.to_dict()
        search.store.publish(chosen["id"])
        result["file"] = "model.tflite"
        folder = search.store.folder
        if search.case.target.runtime == "micro":
            result["micro"] = _sources(search, folder)
        write_text(folder / "plan.yaml", Plan.from_dict(chosen["plan"]).to_yaml())
        report |= {
            "baseline": baseline, "result": result, "verification": verification, "plan": chosen["plan"],
            "alternatives": search.alternatives(),
            "layers": {"baseline": _rows(folder / search.trials[0]["file"]), "result": _rows(folder / "model.tflite")},
        }  # fmt: skip
        if not facts["interrupted"]:  # who stops a search does not want to wait
            report["evidence"] = evidence(
                folder / search.trials[0]["file"], folder / "model.tflite",
                search.case.data.evaluation(), search.case.data.class_names,
                twin=folder / "model.keras", metric=search.case.metric, threads=search.case.threads,
            )  # fmt: skip
    met = bool(verdicts) and all(verdict.met for verdict in verdicts)
    report["verdicts"] = [verdict.to_dict() for verdict in verdicts]
    report["met"] = met
    report["status"] = "interrupted" if facts["interrupted"] else ("met" if met else "not met")
    write_report(report, search.store.folder)
    file = search.store.folder / "model.tflite" if chosen is not None else None
    return Result(met=met, interrupted=facts["interrupted"], file=file, verdicts=tuple(verdicts), report=report)


def _judge(search: Search, chosen: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Measure the original's and the chosen file once more: on test data, and side by side."""
    split = search.case.data.test or search.case.data.val or search.case.data.train
    pair = pair_of(split)
    files = [search.store.folder / search.trials[0]["file"], search.store.folder / chosen["file"]]
    timed = compare_latency(files, threads=search.case.threads)
    judged = []
    for trial, path, latency in zip((search.trials[0], chosen), files, timed, strict=True):
        figures = figures_of(measure(path, pair, metric=search.case.metric, threads=search.case.threads))
        figures["latency_ms"] = {"p50": latency.p50_ms, "p90": latency.p90_ms}
        if trial is chosen:
            figures["baseline_p50_ms"], figures["baseline_p90_ms"] = timed[0].p50_ms, timed[0].p90_ms
        kept = {k: v for k, v in trial.items() if k != "plan"}
        judged.append({**kept, **figures, "validation_accuracy": trial["accuracy"]})
    verification = _verify(chosen, files[1], split)
    if verification is not None:
        judged[1]["verification"] = verification
    return judged[0], judged[1], verification


def _sources(search: Search, folder: Path) -> dict[str, Any]:
    """Write the chosen model's sources for a microcontroller; return what was measured, or why there are none."""
    from dwindle.loading import load
    from dwindle.micro import export_micro

    split = search.case.data.train or search.case.data.val or search.case.data.test
    samples = None if split is None else list(split.take(256).x)
    try:
        made = export_micro(load(folder / "model.keras"), folder / "micro", data=samples, decode=True)
    except DwindleError as error:
        search.tell(Event(kind="note", text=f"no sources for the microcontroller: {error}"))
        return {"reason": str(error)}
    kept = ("size_bytes", "arena_bytes", "needed_bytes", "operators", "notes")
    return {name: value for name, value in made.to_dict().items() if name in kept} | {"folder": "micro"}


def _confidence(search: Search, chosen: Mapping[str, Any]) -> PairedDrop | None:
    """Return how sure the loss of accuracy is, on the samples that judge; None for other metrics or without labels."""
    split = search.case.data.test or search.case.data.val or search.case.data.train
    if search.case.metric != "accuracy" or split is None or split.y is None:
        return None
    files = [search.store.folder / trial["file"] for trial in (search.trials[0], chosen)]
    before, after = (LiteRTRunner(file).predict(list(split.x))[0] for file in files)
    return paired_drop(before, after, np.asarray(split.y))


def _verify(chosen: Mapping[str, Any], file: Path, split: Split | None) -> dict[str, Any] | None:
    """Compare the chosen file with its trainable twin on the whole judging set, where the twin rounds alike."""
    from dwindle.loading import load

    static = resolve_scheme(chosen["plan"]["steps"][-1]["export"]["scheme"]).needs_data
    if split is None or not static:
        return chosen.get("verification")
    twin = load(file.with_name("model.keras"))
    if not getattr(twin, "quantization", None):
        return chosen.get("verification")
    found = LiteRTRunner(file).predict(list(split.x))
    expected = predict(twin, list(split.x))
    result = compare(
        expected, found, BOUNDS["static"], reference="the model in quantized training",
        quanta=output_quanta(file.read_bytes()),
    )  # fmt: skip
    return result.to_dict()


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row.to_dict() for row in inspect_file(path).rows]


def _frame(search: Search, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of the report that do not depend on what was chosen."""
    model, data, goals, metric = search.case.bench.original, search.case.data, search.goals, search.case.metric

    def described(tensors: Any) -> list[dict[str, Any]]:
        return [
            {"name": t.name, "shape": [1, *t.shape[1:]], "dtype": keras.backend.standardize_dtype(t.dtype)}
            for t in tensors
        ]

    counts = {f"{name}_samples": len(part) if part is not None else 0
              for name, part in (("train", data.train), ("validation", data.val), ("test", data.test))}  # fmt: skip
    return {
        "version": 1,
        "dwindle": dwindle.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": facts["command"],
        "seed": facts["seed"],
        "seconds": facts["seconds"],
        "model": {
            "name": model.name, "source": facts["source"], "parameters": int(model.count_params()),
            "inputs": described(model.inputs), "outputs": described(model.outputs),
        },
        "target": {"name": search.case.target.name, "runtime": search.case.target.runtime},
        "data": {"source": data.source, "sha256": data.sha256, "class_names": data.class_names, **counts},
        "metric": {
            "name": metric if isinstance(metric, str) else getattr(metric, "name", "metric"),
            "higher_is_better": higher_is_better(metric),
            "judged_on": _judged_on(data, facts["held_back"]),
        },
        "goals": {
            "max_drop": goals.max_drop, "max_relative_drop": goals.max_relative_drop, "max_size_bytes": goals.max_size,
            "max_packed_bytes": goals.max_packed, "max_latency_ms": goals.max_latency_ms,
            "max_latency_factor": goals.max_latency_factor, "latency": goals.latency, "max_ram_bytes": goals.max_ram,
            "minimize": goals.minimized,
        },
        "baseline": search.trials[0] if search.trials else None,
        "result": None,
        "trials": [{k: v for k, v in trial.items() if k != "plan"} for trial in search.trials],
        "environment": {**environment(), "threads": str(facts["threads"])},
    }  # fmt: skip


def _judged_on(data: Data, held_back: bool) -> str:
    if held_back:
        return "held-back"
    return "test" if data.test else "validation" if data.val else "train"
