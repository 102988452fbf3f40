"""What a process does for documents beside keeping their records: pins them in RAM, and sees to their end."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aquifer.server.document_records import Document, Place, unpack

if TYPE_CHECKING:
    from aquifer.server.engine.engine import Engine


@dataclass(frozen=True)
class Held:
    """A document and its tokens, as `pack` gives them, which it takes to let it go."""

    document: Document
    packed: bytes


@dataclass(frozen=True)
class _Expiry(Held):
    timer: asyncio.TimerHandle


class HeldDocuments:
    """Pins and lifetimes of documents. One object per process, used on the event loop."""

    def __init__(self, engine: Engine, bos: array[int], expired: Callable[[Held], Awaitable[None]]) -> None:
        """expired: called when a document's lifetime is over."""
        self._engine, self._bos, self._expired = engine, bos, expired
        self._pins: dict[Place, Held] = {}
        self._expiries: dict[Place, _Expiry] = {}
        self._expiring: set[asyncio.Future[None]] = set()

    def places(self) -> set[Place]:
        """Of all that is pinned, or has a lifetime."""
        return self._pins.keys() | self._expiries.keys()

    def held(self, place: Place) -> Held | None:
        """What is pinned here, or has a lifetime that is not over."""
        expiry = self._expiries.get(place)
        if expiry is not None and expiry.timer.when() <= asyncio.get_running_loop().time():
            return None  # it is about to be let go
        return self._pins.get(place) or expiry

    async def hold(self, document: Document, packed: bytes) -> None:
        """Pin a document if that is wanted, and let it expire when its lifetime, as it is now, is over."""
        self.schedule(document, packed)
        if document.pinned:
            await asyncio.to_thread(self._engine.pin, self._bos + unpack(packed), document.salt)
            self._pins[document.place] = Held(document, packed)

    async def unpin(self, place: Place) -> None:
        """Lift this process's pin of a document, if there is one."""
        pin = self._pins.pop(place, None)
        if pin is not None:
            await asyncio.to_thread(self._engine.unpin, self._bos + unpack(pin.packed), pin.document.salt)

    async def let_go(self, place: Place) -> None:
        """Lift a document's pin and forget its lifetime, if this process has them."""
        self._unschedule(place)
        await self.unpin(place)

    async def forget(self, packed: bytes, salt: str) -> int:
        """Delete KV in every tier; returns the segments deleted."""
        return await asyncio.to_thread(self._engine.forget, self._bos + unpack(packed), salt)

    def schedule(self, document: Document, packed: bytes) -> None:
        """Let a document expire when its lifetime, as it is now, is over."""
        self._unschedule(document.place)
        if document.expires is not None:
            lifetime = max(0.0, document.expires - time.time())
            timer = asyncio.get_running_loop().call_later(lifetime, self._expire, Held(document, packed))
            self._expiries[document.place] = _Expiry(document, packed, timer)

    async def close(self) -> None:
        """Let nothing expire any more."""
        for place in list(self._expiries):
            self._unschedule(place)
        if self._expiring:
            await asyncio.wait(self._expiring)

    def _unschedule(self, place: Place) -> None:
        expiry = self._expiries.pop(place, None)
        if expiry is not None:
            expiry.timer.cancel()

    def _expire(self, held: Held) -> None:
        task = asyncio.ensure_future(self._expired(held))
        self._expiring.add(task)
        task.add_done_callback(self._expiring.discard)
