"""Stands for the queues of a device where there is none: what is asked of them is done at once, and has
happened then, or when a test says so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor


class Mark:
    """What happened, or will."""

    def __init__(self, happened: bool) -> None:
        self.happened = happened

    def query(self) -> bool:
        return self.happened


class _NoQueue:
    def __init__(self, *, late: bool) -> None:
        """late: what is marked has not happened yet."""
        self._late = late
        self.log: list[object] = []
        """What was asked of it, in order: marks that it waits for, and "work" for every piece of that."""

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        self.log.append("work")
        yield

    def after(self, *events: object) -> None:
        self.log += events

    def mark(self) -> Mark:
        self.marked = Mark(not self._late)
        return self.marked

    def hold(self, *tensors: Tensor) -> None: ...


class NoQueues:
    def __init__(self, *, late: bool = False) -> None:
        queues = (_NoQueue(late=late) for _ in range(5))
        self.copies, self.chain, self.emits, self.rows, self.sinks = queues
        self.called: list[Mark] = []
        """What the caller had queued, each time that somebody asked."""
        self.awaited: list[object] = []
        """What the caller waits for."""

    def callers(self) -> Mark:
        self.called.append(Mark(True))
        return self.called[-1]

    def let_caller_wait(self, event: object) -> None:
        self.awaited.append(event)
