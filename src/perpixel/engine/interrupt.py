"""Ctrl-C and SIGTERM as a wish to stop after the step at hand, so that nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignals:
    """Context in which the first SIGINT or SIGTERM only sets `requested`; a second one acts as usual.

    Processes forked inside the context (the loader's workers) inherit the handlers; there a Ctrl-C, which a terminal
    sends to all of them, is left to this process, and a SIGTERM ends the worker.
    """

    def __init__(self) -> None:
        self.requested = False
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses to set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.requested = True
        self._restore()
