"""What a tier is: the words shared by the RAM arena, Redis and the store above them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from aquifer.cachestore.keys import SegmentKey

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Lease:
    """A record that stays where it is, unchanged, until it is released.

    `tier` says where the record was found; `address` where it lies, if that is in the arena (which a
    server with a device page-locks), else None. Release every lease (it is a context manager): a
    leased arena slot is never evicted. There is no release on garbage collection, because a view of
    `data` may well outlive the lease object.
    """

    __slots__ = ("_data", "address", "tier")

    def __init__(self, data: memoryview, tier: str, address: int | None = None) -> None:
        self._data: memoryview | None = data
        self.tier = tier
        self.address = address

    @property
    def data(self) -> memoryview:
        """The record, read-only bytes. Raises ValueError once the lease is released."""
        if self._data is None:
            raise ValueError("this lease was released; its bytes may belong to another record now")
        return self._data

    def again(self) -> Lease:
        """Another lease of the same record."""
        return Lease(self.data, self.tier, self.address)

    def release(self) -> None:
        """Give the record back. Calling it again does nothing."""
        self._data = self.address = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@contextmanager
def released_if_it_fails(leases: Sequence[Lease | None]) -> Iterator[None]:
    """Leases end where the block raises, those that it added too; to end one twice does no harm."""
    try:
        yield
    except BaseException:
        for lease in leases:
            if lease is not None:
                lease.release()
        raise


Fill = Callable[[memoryview], None]
"""Writes a record into memory of just its size; called again if it is wanted in another place."""


def copy_of(record: Buffer) -> tuple[int, Fill]:
    """The size of a record, and what writes a copy of it."""
    source = memoryview(record).cast("B")

    def fill(target: memoryview) -> None:
        target[:] = source

    return source.nbytes, fill


def lease_of_own(num_bytes: int, fill: Fill, tier: str) -> Lease:
    """A record in memory of its own, which goes with its last view."""
    memory = memoryview(bytearray(num_bytes))
    fill(memory)
    return Lease(memory.toreadonly(), tier)


@dataclass(frozen=True, slots=True)
class TierStats:
    """What one tier holds now, and what it did since the start.

    hits, misses:    one per key asked for; an expired, unreachable or corrupt record is a miss too
    errors, corrupt: how many of the misses and failed writes had that cause
    evictions:       records pushed out by others (Redis: as far as the server tells)
    dropped_writes:  records not stored: no room, tier down, or write queue full
    pinned:          records held that may not be evicted
    """

    name: str
    up: bool
    used_bytes: int
    capacity_bytes: int | None
    entries: int
    hits: int
    misses: int
    errors: int
    corrupt: int
    read_bytes: int
    read_seconds: float
    write_bytes: int
    write_seconds: float
    evictions: int
    dropped_writes: int
    pinned: int


@dataclass(slots=True)
class Counters:
    """The counted half of TierStats. Whoever owns it guards it with a lock."""

    hits: int = 0
    misses: int = 0
    errors: int = 0
    corrupt: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0
    write_bytes: int = 0
    write_seconds: float = 0.0
    evictions: int = 0
    dropped_writes: int = 0

    def as_stats(
        self,
        *,
        name: str,
        up: bool,
        used_bytes: int,
        capacity_bytes: int | None,
        entries: int,
        pinned: int = 0,
    ) -> TierStats:
        return TierStats(
            name=name,
            up=up,
            used_bytes=used_bytes,
            capacity_bytes=capacity_bytes,
            entries=entries,
            pinned=pinned,
            **asdict(self),
        )


class Tier(Protocol):
    """A place that holds records. Every failure to find a record is a miss, never an exception."""

    @property
    def name(self) -> str: ...

    def get(self, keys: Sequence[SegmentKey]) -> list[Lease | None]:
        """Lease what is here, in the order of `keys`; None is a miss. All keys in one round trip."""

    def put(self, key: SegmentKey, record: Buffer) -> bool:
        """Keep a record unless one is there already; the first writer wins. False: not stored."""

    def contains(self, keys: Sequence[SegmentKey]) -> list[bool]:
        """Say what is here now. A hint: a record may be gone by the time it is asked for."""

    def delete(self, keys: Sequence[SegmentKey]) -> int:
        """Forget records; return how many there were."""

    def stats(self) -> TierStats: ...

    def close(self) -> None: ...
