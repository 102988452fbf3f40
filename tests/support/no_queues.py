"""Stands for the queues of a device where there is none: everything happens at once."""

from __future__ import annotations

import contextlib

from torch import Tensor


class _Happened:
    def query(self) -> bool:
        return True


class _NoQueue:
    def here(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def after(self, *events: object) -> None: ...

    def mark(self) -> _Happened:
        return _Happened()

    def hold(self, *tensors: Tensor) -> None: ...


class NoQueues:
    copies = chain = emits = rows = _NoQueue()

    def callers(self) -> None: ...

    def let_caller_wait(self, event: object) -> None: ...
