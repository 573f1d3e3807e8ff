"""Ctrl-C that long work cannot miss.

Python raises `KeyboardInterrupt` wherever it happens to be; where that is a finalizer or a callback of a native
library, the exception is printed and dropped, and the work goes on as if nobody had asked. Here the wish is remembered
as well, and long work asks for it at its own steps.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import keras


class Interruption:
    """Whether the user has asked to stop.

    Attributes:
        asked: Whether SIGINT has come.
        held: Whether it is only remembered just now.
    """

    def __init__(self) -> None:
        self.asked = False
        self.held = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let what is inside come to its end, and stop after it if that was asked for meanwhile.

        Raises:
            KeyboardInterrupt: At the end, if it was.
        """
        self.held = True
        try:
            yield
        finally:
            self.held = False
        self.check()

    def check(self) -> None:
        """Stop here if it was asked for.

        Raises:
            KeyboardInterrupt: If it was.
        """
        if self.asked:
            raise KeyboardInterrupt


class StopTraining(keras.callbacks.Callback):
    """Stop a training at the next batch once an interruption was asked for."""

    def __init__(self, interruption: Interruption) -> None:
        super().__init__()
        self._interruption = interruption

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras calls it so
        """Stop if it was asked for."""
        self._interruption.check()


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Remember SIGINT inside, besides raising `KeyboardInterrupt`; the former handler is back afterwards.

    Where SIGINT is ignored or handled by the program itself, and outside the main thread, that stays as it is.
    """
    interruption = Interruption()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def handle(number: int, frame: FrameType | None) -> None:
        interruption.asked = True
        if not interruption.held:
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
