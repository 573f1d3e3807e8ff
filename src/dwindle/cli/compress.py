"""``dwindle compress`` and ``dwindle demo``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from dwindle.cli.common import (
    MET,
    check_exists,
    command_line,
    data_options,
    display,
    load_source,
    rescaling,
    run_options,
    show,
    source_options,
    start_keras,
)
from dwindle.compressing.engines import ENGINES
from dwindle.compressing.goals import COSTS, LATENCIES


def add(commands: Any) -> None:
    """Add ``compress``."""
    sub = commands.add_parser("compress", help="find the smallest file that meets goals")
    sub.set_defaults(run=_compress)
    _options(sub)
    sub.add_argument("--dry-run", action="store_true", help="check everything and say what would be tried")


def add_plan(commands: Any) -> None:
    """Add ``plan``."""
    sub = commands.add_parser("plan", help="say what compress would try, and try nothing")
    sub.set_defaults(run=_compress, dry_run=True)
    _options(sub)


def _options(sub: Any) -> None:
    sub.add_argument("model", metavar="MODEL", help=".keras, .h5, .tflite, .onnx, .pt2 or a SavedModel folder")
    data_options(sub, required=True)
    sub.add_argument("--max-drop", metavar="DROP", help="largest loss of the metric, such as 0.5%% or 0.005")
    sub.add_argument("--max-relative-drop", metavar="DROP", help="the same, of the original's metric, such as 2%%")
    sub.add_argument("--max-size", metavar="SIZE", help="largest file, such as 45KB (1 KB = 1000 bytes)")
    sub.add_argument("--max-packed", metavar="SIZE", help="largest packed file, such as 8KB (see dwindle pack)")
    sub.add_argument("--max-latency", metavar="TIME", help="largest latency, such as 2ms, or 0.5x of the original's")
    sub.add_argument("--latency", default="p50", choices=LATENCIES, help="which latency is meant (default p50)")
    sub.add_argument("--max-ram", metavar="SIZE", help="largest RAM while it runs, such as 64KB")
    sub.add_argument(
        "--minimize", choices=COSTS,
        help="what is to be small among the files that meet the goals (default size; drop where it has no limit)",
    )  # fmt: skip
    sub.add_argument(
        "--target", default="litert",
        help="what runs the file: litert (the default), micro, a board such as cortex-m4-256k, or a .yaml file",
    )  # fmt: skip
    sub.add_argument("--metric", default="accuracy", help="accuracy or another Keras metric (default accuracy)")
    sub.add_argument("--epochs", type=int, default=20, help="epochs of a student's training (default 20)")
    sub.add_argument("--plan", metavar="FILE", help="run the plan in this YAML file instead of the search")
    sub.add_argument("--budget", metavar="TIME", help="time for the search, such as 20m")
    sub.add_argument("--tensorboard", metavar="DIR", help="write losses and figures for TensorBoard as well")
    sub.add_argument("--trials", type=int, default=40, help="how many trials at most (default 40)")
    sub.add_argument("--workers", type=int, default=1, help="trials at a time, sharing the cores (default 1)")
    sub.add_argument("--engine", default="local", choices=ENGINES, help="where trials run: here, or on a Ray cluster")
    source_options(sub)
    run_options(sub, "dwindle-out")


def _compress(options: argparse.Namespace) -> int:
    from dwindle.compressing.goals import Goals
    from dwindle.compressing.plans import read_plan
    from dwindle.compressing.store import check_out_folder
    from dwindle.targets import read_target
    from dwindle.units import parse_duration

    device = read_target(options.target)
    goals = Goals(
        max_drop=options.max_drop, max_relative_drop=options.max_relative_drop,
        max_size=options.max_size or device.max_size, max_packed=options.max_packed, max_latency=options.max_latency,
        max_ram=options.max_ram or device.max_ram, latency=options.latency, minimize=options.minimize,
    )  # fmt: skip
    if options.budget is not None:
        parse_duration(options.budget, "--budget")
    if options.command == "compress":
        check_out_folder(options.out, resume=options.resume, force=options.force)
    plan = read_plan(options.plan) if options.plan else None
    factor = rescaling(options.rescale)
    from dwindle.data import read_data

    check_exists(options.model)
    data = read_data(options.data, rescale=factor, seed=options.seed, validation_fraction=0)
    start_keras()
    model = load_source(options.model, options)
    if options.dry_run:
        return _dry_run(model, goals, data, device, plan, options)
    from dwindle.compressing import compress
    from dwindle.compressing.tensorboard import TensorBoardLog

    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(display(options, goals))
        if options.tensorboard:
            watch = _both(watch, stack.enter_context(TensorBoardLog(options.tensorboard)))
        result = compress(
            model, goals=goals, out=options.out, data=data, target=device, metric=options.metric,
            epochs=options.epochs, seed=options.seed, threads=options.threads, plan=plan, budget=options.budget,
            trials=options.trials, workers=options.workers, engine=options.engine, resume=options.resume,
            force=options.force, watch=watch, source=str(options.model), command=command_line(),
        )  # fmt: skip
    return show(result, options)


def _both(one: Callable[[Any], None], other: Callable[[Any], None]) -> Callable[[Any], None]:
    def watch(event: Any) -> None:
        one(event)
        other(event)

    return watch


def _dry_run(model: Any, goals: Any, data: Any, device: Any, plan: Any, options: argparse.Namespace) -> int:
    from dwindle.compressing.previewing import preview

    plans = [plan] if plan else preview(
        model, goals, data, target=device, metric=options.metric, epochs=options.epochs, seed=options.seed,
        threads=options.threads,
    )  # fmt: skip
    for number, each in enumerate(plans, start=1):
        print(f"[{number}] {each.name}: {'; '.join(each.words())}")
    if plan is None:
        print("then longer trainings of the promising ones, and new candidates near the best")
    return MET


def add_demo(commands: Any) -> None:
    """Add ``demo``."""
    sub = commands.add_parser("demo", help="train LeNet-5 on MNIST digits and compress it, in a few minutes")
    sub.set_defaults(run=_demo)
    sub.add_argument("--epochs", type=int, default=None, help="epochs of the original's training")
    run_options(sub, "demo-out")


def _demo(options: argparse.Namespace) -> int:
    from dwindle.compressing.store import check_out_folder

    check_out_folder(options.out, resume=options.resume, force=options.force)
    start_keras()
    from dwindle.demo import GOALS, run_demo

    with display(options, GOALS) as watch:
        result = run_demo(
            out=options.out, epochs=options.epochs, seed=options.seed, threads=options.threads, resume=options.resume,
            force=options.force, watch=watch, command=command_line(),
        )  # fmt: skip
    return show(result, options)
