"""Compress: the user says what the file must reach; plans are tried and measured until it does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras

from dwindle.compressing.concluding import Result, conclude
from dwindle.compressing.engines import ENGINES, Engine, Processes, Ray
from dwindle.compressing.events import Event, Tell
from dwindle.compressing.goals import Goals
from dwindle.compressing.plans import Plan
from dwindle.compressing.search import Search, fingerprint
from dwindle.compressing.stages import Stages
from dwindle.compressing.steps import Workbench, training_loss
from dwindle.compressing.store import Store, check_out_folder
from dwindle.compressing.trying import Case
from dwindle.data import Data, fit_to_model, read_data, set_aside
from dwindle.distillation import record
from dwindle.errors import ConfigError, DataError, check_choice
from dwindle.exporting import pack_inputs
from dwindle.interruption import interruptible
from dwindle.lifting import lift
from dwindle.measuring import (
    check_metric,
)
from dwindle.open_lengths import with_lengths_of
from dwindle.targets import Target, read_target
from dwindle.units import parse_duration
from dwindle.weights import is_graph

# Share of the time budget that is left for judging the chosen file and for the report.
CONCLUDING = 0.05


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
        validation: ``(x, y)`` samples that pick between trials.
        goals: What the file must reach.
        out: Folder for ``model.tflite``, ``model.keras``, ``report.html``, ``report.json``, ``model-card.md``,
            ``plan.yaml`` and ``trials/``.
        test: ``(x, y)`` samples that judge. Where there are only validation or only test samples, half of them picks
            and half judges. Where there is neither, a fifth of the training samples is taken for it; an original
            that was trained on them looks better there than it is, and so all losses look larger.
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
            is known, 5% of it being left for the report; what runs then is finished.
        trials: How many trials there are at most, besides the original.
        workers: How many trials run at a time, each in a process with its share of the cores. A script that uses them
            calls this under ``if __name__ == "__main__":``, since the processes import it.
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
    search.deadline = None if seconds is None else begun + (1 - CONCLUDING) * seconds
    try:
        interrupted = _run(search, workers, engine)
        facts = {"source": source or model.name, "command": command or _call(search.goals, out, seed), "seed": seed,
                 "seconds": round(time.monotonic() - begun, 1), "interrupted": interrupted, "threads": threads,
                 "held_back": held_back}  # fmt: skip
        result = conclude(search, facts)
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
    loss = training_loss(model, None if fitted.train is None else fitted.train.y)  # a model that is built anew has none
    model, notes = with_lengths_of(model, (fitted.train or fitted.evaluation()).x)
    for note in notes:
        tell(Event(kind="note", text=note))
    marks = {"seed": seed, "epochs": epochs, "model": fingerprint(model), "data": fitted.sha256, "target": device.name}
    store = Store(out, marks, resume=resume, force=force)
    try:
        case = _case(model, loss, fitted, metric, device, threads, goals, seed, store, tell)
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
    model: keras.Model, loss: Any, data: Data, metric: Any, target: Target, threads: int, goals: Goals, seed: int,
    store: Store, tell: Tell,
) -> Case:  # fmt: skip
    teaches = len(model.outputs) == 1 and len(model.outputs[0].shape) == 2 and int(model.outputs[0].shape[1] or 0) > 1
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
    found = data if isinstance(data, Data) else read_data(data, validation_fraction=0)
    shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    units = model.outputs[0].shape[-1] if len(model.outputs) == 1 and len(model.outputs[0].shape) == 2 else None
    dtypes = [keras.backend.standardize_dtype(tensor.dtype) for tensor in model.inputs]
    fitted = fit_to_model(found, shapes, units, input_dtypes=dtypes)
    if fitted.val is None and fitted.test is None and fitted.train is not None:
        # The original may have learned these by heart; there is nothing else to pick and to judge with.
        left, aside = set_aside(fitted.train, 0.2, seed)
        fitted = replace(fitted, train=left, val=aside)
    picking = fitted.val or fitted.test
    if picking is None or (fitted.val is not None and fitted.test is not None):
        return fitted, False
    picks, judges = set_aside(picking, 0.5, seed)
    return replace(fitted, val=picks, test=judges), True


def _call(goals: Goals, out: str | Path, seed: int) -> str:
    asked = ", ".join(f"{key}={value!r}" for key, value in goals.to_dict().items() if value is not None)
    return f"dw.compress(model, train=..., goals=dw.Goals({asked}), out={str(out)!r}, seed={seed})"
