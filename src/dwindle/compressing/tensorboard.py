"""A search in TensorBoard's files: losses of each trial by epoch, and the figures of all trials."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from dwindle.compressing.events import Event
from dwindle.errors import ConversionError


class TensorBoardLog:
    """Writes events as scalars; a context manager that gives the watcher.

    Each trial is a run of its own, ``trial-NNN``, with ``loss`` by epoch; in ``trials`` the step is the trial's number
    and the scalars are ``metric``, ``size_bytes``, ``latency_ms`` (the median) and ``meets``.

    Args:
        folder: Where to write; it is made.

    Raises:
        ConversionError: If it can't be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._writers: dict[str, Any] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConversionError(f"`{folder}` can't be written: {error.strerror or error}") from None

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for writer in self._writers.values():
            writer.close()

    def __call__(self, event: Event) -> None:
        """Write what an event tells in numbers."""
        facts = event.facts
        if event.kind == "progress" and event.trial is not None and "loss" in facts:
            self._write(f"trial-{event.trial:03d}", facts["epoch"], {"loss": facts["loss"]})
        if event.kind == "end" and event.trial is not None and facts.get("status") == "done":
            figures = {"metric": facts["accuracy"], "size_bytes": facts["size_bytes"],
                       "latency_ms": facts["latency_ms"]["p50"], "meets": float(facts["meets"])}  # fmt: skip
            self._write("trials", event.trial, {name: value for name, value in figures.items() if value is not None})

    def _write(self, run: str, step: int, values: dict[str, float]) -> None:
        import tensorflow as tf

        v1 = tf.compat.v1
        if run not in self._writers:
            (self._folder / run).mkdir(exist_ok=True)
            name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}"
            self._writers[run] = tf.io.TFRecordWriter(str(self._folder / run / name))
            first = v1.Event(wall_time=time.time(), file_version="brain.Event:2")
            self._writers[run].write(first.SerializeToString())
        summary = v1.Summary(value=[v1.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._writers[run].write(v1.Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
        self._writers[run].flush()
