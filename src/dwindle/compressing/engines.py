"""Where trials run: in this process, in processes beside it, or on a Ray cluster."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import json
import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dwindle.compressing.events import Event, Tell
from dwindle.compressing.plans import Plan
from dwindle.errors import ConfigError, DwindleError, MissingDependencyError

if TYPE_CHECKING:
    from dwindle.interruption import Interruption

ENGINES = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A trial to be done.

    Attributes:
        number: Its number.
        plan: What to do.
        working: An empty folder for its files.
    """

    number: int
    plan: Plan
    working: Path


def begins(task: Task) -> Event:
    """Return the event that a trial begins."""
    name = task.plan.name
    text = f"[{task.number}] {name}: begins"
    return Event(kind="begin", text=text, trial=task.number, facts={"name": name})


class Engine(Protocol):
    """Something that carries trials out, all of a batch, and gives their records as they end."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Yield each task with its record; its files are then in its folder."""
        ...

    def map(self, work: Callable[[Any, Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Yield ``work(case, item)`` for each item, in their order; ``work`` is a function of a module."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class Inline:
    """Trials one after the other, in this process.

    Args:
        case: What trials have in common.
        tell: Called when one begins.
    """

    def __init__(self, case: Any, tell: Tell) -> None:
        self._case = case
        self._tell = tell

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """See `Engine`."""
        from dwindle.compressing.trying import try_plan

        for task in tasks:
            self._tell(begins(task))
            yield task, try_plan(self._case, task.plan, task.number, task.working)

    def map(self, work: Callable[[Any, Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """See `Engine`."""
        return (work(self._case, item) for item in items)

    def close(self) -> None:
        """See `Engine`."""


class Processes:
    """Trials in processes of their own, each with its share of the cores.

    Args:
        case: What trials have in common; the processes read it from ``shared``.
        shared: An empty folder.
        workers: How many processes, at least 2.
        stages: Where stages are kept.
        tell: Called with what they say.
        interruption: Asked while they work.

    Raises:
        ConfigError: If the model or its loss can't be read back in another process.
    """

    def __init__(
        self, case: Any, shared: Path, workers: int, stages: Path, tell: Tell, interruption: Interruption
    ) -> None:
        share(case, shared)
        context = multiprocessing.get_context("spawn")
        self._said = context.Queue()
        self._interruption = interruption
        cores = max(1, (os.cpu_count() or 1) // workers)
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start, initargs=(str(shared), str(stages), cores, self._said)
        )
        self._over = threading.Event()
        self._listener = threading.Thread(target=self._listen, args=(tell,), daemon=True)
        self._listener.start()

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """See `Engine`."""
        coming = {self._pool.submit(_work, task): task for task in tasks}
        while coming:
            for future in self._done(coming):
                task = coming.pop(future)
                yield task, _result(future, f"[{task.number}] {task.plan.name}")

    def map(self, work: Callable[[Any, Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """See `Engine`."""
        for future in [self._pool.submit(_call, work, item) for item in items]:
            while not self._done([future]):
                pass
            yield _result(future, "its work")

    def _done(self, coming: Iterable[Any]) -> set[Any]:
        """Return which of these have ended, after waiting a moment for the first."""
        self._interruption.check()
        return concurrent.futures.wait(coming, 0.2, concurrent.futures.FIRST_COMPLETED).done

    def close(self) -> None:
        """See `Engine`."""
        running = list((self._pool._processes or {}).values()) if self._interruption.asked else []
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()
        self._over.set()
        self._listener.join(timeout=5)
        self._said.close()

    def _listen(self, tell: Tell) -> None:
        while not self._over.is_set():
            try:
                tell(self._said.get(timeout=0.2))
            except (queue.Empty, EOFError, OSError):
                continue


class Ray:
    """Trials on a Ray cluster: the one that ``RAY_ADDRESS`` names, else one on this machine.

    Model, data and the original's outputs go into Ray's object store once and are unpacked once per node.

    Args:
        case: As in `Processes`.
        shared: As in `Processes`.
        workers: How many trials at a time.
        tell: Called when one begins.
        interruption: Asked while they work.

    Raises:
        MissingDependencyError: If Ray is not installed.
        ConfigError: If the model or its loss can't be read back in another process.
    """

    def __init__(self, case: Any, shared: Path, workers: int, tell: Tell, interruption: Interruption) -> None:
        try:
            import ray
        except ImportError:
            raise MissingDependencyError(
                "`engine` is 'ray' and Ray is not installed; pip install 'dwindle[ray]'"
            ) from None
        share(case, shared)
        if case.bench.folder is not None and case.bench.folder.exists():
            shutil.copytree(case.bench.folder, shared / "teacher", dirs_exist_ok=True)
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
            ray.init(log_to_driver=False, logging_level="error", include_dashboard=False, **local)
        self._tell = tell
        self._interruption = interruption
        archive = shutil.make_archive(str(shared.with_name(f".{shared.name}")), "tar", shared)
        content = Path(archive).read_bytes()
        Path(archive).unlink()
        self._actors = self._started(ray.put(content), workers)

    def _started(self, content: Any, workers: int) -> list[Any]:
        name = f"dwindle-{os.getpid()}-{self._ray.get_runtime_context().get_job_id()}"
        cores = max(1, (os.cpu_count() or 1) // workers)
        remote = self._ray.remote(num_cpus=1, max_restarts=2, max_task_retries=2)(_Actor)
        return [remote.remote(content, name, cores) for _ in range(workers)]

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """See `Engine`."""

        def begin(actor: Any, task: Task) -> Any:
            self._tell(begins(task))
            return actor.work.remote(task.number, task.plan.to_dict())

        for task, (record, files) in self._spread(begin, tasks):
            for name, content in files.items():
                (task.working / name).write_bytes(content)
            yield task, record

    def map(self, work: Callable[[Any, Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """See `Engine`."""
        numbers = range(len(items))
        found = dict(self._spread(lambda actor, number: actor.call.remote(work, items[number]), numbers))
        return (found[number] for number in numbers)

    def _spread(self, begin: Callable[[Any, Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Let every actor work on a job at a time; yield each job with its result, as they end."""
        waiting, idle = list(jobs), list(self._actors)
        coming: dict[Any, tuple[Any, Any]] = {}
        while waiting or coming:
            self._interruption.check()
            while waiting and idle:
                job, actor = waiting.pop(0), idle.pop()
                coming[begin(actor, job)] = (job, actor)
            done, _ = self._ray.wait(list(coming), timeout=0.2)
            for reference in done:
                job, actor = coming.pop(reference)
                idle.append(actor)
                yield job, self._ray.get(reference)

    def close(self) -> None:
        """See `Engine`."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()


class _Actor:
    """What works on a node: it has unpacked the shared folder, once per node."""

    def __init__(self, content: bytes, name: str, cores: int) -> None:
        import io
        import tarfile

        from filelock import FileLock

        folder = Path(tempfile.gettempdir()) / name
        folder.mkdir(exist_ok=True)
        with FileLock(folder / ".lock"):
            if not (folder / "case.json").exists():
                with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                    archive.extractall(folder, filter="data")
        _limit(cores)
        self._case = read_case(folder, folder / "stages", lambda _event: None)

    def work(self, number: int, plan: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Carry one trial out; return its record and its files."""
        from dwindle.compressing.trying import try_plan

        with tempfile.TemporaryDirectory() as working:
            record = try_plan(self._case, Plan.from_dict(plan), number, Path(working))
            return record, {path.name: path.read_bytes() for path in Path(working).iterdir() if path.is_file()}

    def call(self, work: Callable[[Any, Any], Any], item: Any) -> Any:
        """Return ``work(case, item)``."""
        return work(self._case, item)


def share(case: Any, folder: Path) -> None:
    """Write what trials have in common into a folder, for `read_case`.

    Raises:
        ConfigError: If the model, its loss or the metric can't be read back.
    """
    import keras
    import numpy as np

    from dwindle.files import save_keras, write_text
    from dwindle.loading import load

    hint = "register your classes with keras.saving.register_keras_serializable, or leave `workers` out"
    if not isinstance(case.metric, str):
        raise ConfigError(f"`metric` is an object and trials run in other processes; name a metric, or {hint}")
    try:
        loss = keras.losses.serialize(keras.losses.get(case.bench.loss))
        keras.losses.get(keras.losses.deserialize(loss))
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(f"the model's loss {case.bench.loss!r} can't be read in another process; {hint}") from None
    save_keras(case.bench.original, folder / "original.keras")
    try:
        load(folder / "original.keras")
    except DwindleError as error:
        raise ConfigError(f"the model can't be read in another process ({error}); {hint}") from None
    counts: dict[str, int] = {}
    for part in ("train", "val", "test"):
        split = getattr(case.data, part)
        if split is None:
            continue
        counts[part] = len(split.x)
        for number, array in enumerate(split.x):
            np.save(folder / f"x-{part}-{number}.npy", array)
        if split.y is not None:
            np.save(folder / f"y-{part}.npy", split.y)
    target = {**asdict(case.target), "schemes": case.target.schemes and list(case.target.schemes)}
    facts = {"loss": loss, "seed": case.bench.seed, "distills": case.bench.distills, "metric": case.metric,
             "threads": case.threads, "packs": case.packs, "target": target, "inputs": counts,
             "teacher": None if case.bench.folder is None else str(case.bench.folder)}  # fmt: skip
    write_text(folder / "case.json", json.dumps(facts))


def read_case(folder: Path, stages: Path, tell: Tell) -> Any:
    """Return what trials have in common, from the folder that `share` wrote; arrays are memory-mapped."""
    import keras
    import numpy as np

    from dwindle.compressing.stages import Stages
    from dwindle.compressing.steps import Workbench
    from dwindle.compressing.trying import Case
    from dwindle.data import Data, Split
    from dwindle.loading import load
    from dwindle.targets import Target

    facts = json.loads((folder / "case.json").read_text(encoding="utf8"))

    def split(part: str) -> Split | None:
        if part not in facts["inputs"]:
            return None
        arrays = [np.load(folder / f"x-{part}-{n}.npy", mmap_mode="r") for n in range(facts["inputs"][part])]
        labels = folder / f"y-{part}.npy"
        return Split(x=tuple(arrays), y=np.load(labels, mmap_mode="r") if labels.exists() else None)

    parts = {part: split(part) for part in ("train", "val", "test")}
    teacher = folder / "teacher"
    if not teacher.exists() and facts["teacher"] is not None:
        teacher = Path(facts["teacher"])
    target = {**facts["target"], "schemes": facts["target"]["schemes"] and tuple(facts["target"]["schemes"])}
    bench = Workbench(
        original=load(folder / "original.keras"), train=parts["train"], loss=keras.losses.deserialize(facts["loss"]),
        distills=facts["distills"], seed=facts["seed"], tell=tell, folder=teacher, stages=Stages(stages),
    )  # fmt: skip
    data = Data(**parts, source="shared", class_names=None, sha256="")
    return Case(bench=bench, data=data, metric=facts["metric"], target=Target(**target), threads=facts["threads"],
                packs=facts["packs"])  # fmt: skip


_worker: dict[str, Any] = {}


def _limit(cores: int) -> None:
    """Keep a process to its share of the cores; before its backend starts."""
    for name in ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(cores)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _start(shared: str, stages: str, cores: int, said: Any) -> None:
    """Begin a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to handle
    _limit(cores)
    from dwindle.measuring.litert import quiet_stderr

    with ExitStack() as stack:
        stack.enter_context(quiet_stderr())
        _worker["case"] = read_case(Path(shared), Path(stages), lambda event: said.put(_with_trial(event)))


def _with_trial(event: Event) -> Event:
    from dataclasses import replace

    return replace(event, trial=_worker.get("trial"))


def _work(task: Task) -> dict[str, Any]:
    """Carry one trial out, in a worker process."""
    from dwindle.compressing.trying import try_plan

    _worker["trial"] = task.number
    _worker["case"].bench.tell(begins(task))
    return try_plan(_worker["case"], task.plan, task.number, task.working)


def _call(work: Callable[[Any, Any], Any], item: Any) -> Any:
    """Return ``work(case, item)``, in a worker process."""
    return work(_worker["case"], item)


def _result(future: Any, what: str) -> Any:
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise ConfigError(
            f"a worker process ended in the middle of {what}; is there memory for them all, and does your script call "
            "dw.compress under `if __name__ == '__main__':`?"
        ) from None
