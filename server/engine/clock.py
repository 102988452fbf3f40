"""How long work takes that a device does in its own time."""

from __future__ import annotations

import time

import structlog
import torch

log = structlog.get_logger(__name__)


class Clock:
    """Times what is asked of the current stream of a device until `stop`; on a CPU, the caller."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        self._started = self._stopped = time.perf_counter()

    def stop(self) -> None:
        """The work ends with what was asked for last."""
        self._stopped = time.perf_counter()
        if self._events:
            self._events[1].record()

    @property
    def over(self) -> bool:
        """Whether the work is done. A device that failed does nothing any more."""
        try:
            return self._events is None or self._events[1].query()
        except RuntimeError:
            return True

    def seconds(self) -> float:
        """Wait until the work is done. Returns how long it took, 0 if the device failed."""
        if self._events is None:
            return self._stopped - self._started
        try:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1000
        except RuntimeError as error:
            log.error("the device failed", exc_info=error)
            return 0.0
