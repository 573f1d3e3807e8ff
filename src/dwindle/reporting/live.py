"""A search on the terminal while it runs: the goals, the best file so far, and the trials in progress."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from dwindle.units import parse_duration


class LiveDisplay:
    """Shows events of `dwindle.compressing.events` on standard error; a context manager that gives the watcher.

    Trials that have ended stay above as lines; below are what was asked for, the best file so far, a bar for each trial
    in progress, and the time that is left.

    Args:
        goals: What is to be reached.
        budget: Time for the search, as the user gave it; None: no limit.
        console: A `rich.console.Console`; None: standard error.
    """

    def __init__(self, goals: Any, budget: str | float | None = None, console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = console or Console(stderr=True)
        self._goals = _words(goals)
        self._begun = time.monotonic()
        self._seconds = None if budget is None else parse_duration(budget, "--budget")
        self._best = "none yet"
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(), console=self._console,
        )  # fmt: skip
        self._tasks: dict[int | None, Any] = {}
        self._live = Live(get_renderable=self._shown, console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def __call__(self, event: Any) -> None:
        """Show an event."""
        facts = event.facts
        if event.kind in ("begin", "progress"):
            if event.trial not in self._tasks:
                name = facts.get("name") or event.text.partition(":")[0]
                number = "" if event.trial is None else f"\\[{event.trial}] "
                self._tasks[event.trial] = self._bars.add_task(f"{number}{_safe(name)}", total=None, told="")
            if "epochs" in facts:
                told = f"epoch {facts['epoch']}/{facts['epochs']}"
                self._bars.update(self._tasks[event.trial], completed=facts["epoch"], total=facts["epochs"], told=told)
                if event.trial is None and facts["epoch"] == facts["epochs"]:
                    self._bars.remove_task(self._tasks.pop(None))
            return
        if event.kind == "best":
            self._best = event.text.removeprefix("best so far: ")
            return
        if event.kind == "end" and event.trial in self._tasks:
            self._bars.remove_task(self._tasks.pop(event.trial))
        style = "green" if facts.get("meets") else None
        self._console.print(event.text, style=style, markup=False, highlight=False)

    def _shown(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        gone = time.monotonic() - self._begun
        left = f"{_clock(gone)} gone"
        if self._seconds is not None:
            left += f", {_clock(max(0.0, self._seconds - gone))} left"
        lines = [Text(f"goals  {self._goals}", style="bold"), Text(f"best   {self._best}")]
        return Group(*lines, self._bars, Text(f"time   {left}; Ctrl-C stops and keeps what was found", style="dim"))


def _words(goals: Any) -> str:
    told = [f"{name.replace('_', ' ')} {value}" for name, value in goals.to_dict().items()
            if value is not None and name.startswith("max")]  # fmt: skip
    return f"{', '.join(told)}; smallest {goals.minimized}"


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _clock(seconds: float) -> str:
    whole = int(seconds)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole // 60 % 60:02d}:{whole % 60:02d}"
