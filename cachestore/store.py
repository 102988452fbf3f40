"""The store that the engine uses: RAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aquifer.cachestore.arena import RamArena
from aquifer.cachestore.keys import SegmentKey
from aquifer.cachestore.tier import Lease, TierStats

if TYPE_CHECKING:
    from typing_extensions import Buffer


class TieredStore:
    """Records by key, in the fastest tier that has them. Thread-safe.

    verify: raises a ValueError for a record that is damaged or not ours
    """

    def __init__(self, ram: RamArena, redis: None, verify: Callable[[memoryview], None]) -> None:
        self.ram = ram

    def get(self, keys: Sequence[SegmentKey]) -> list[Lease | None]:
        """Lease records in the order of `keys`; None is a miss. `lease.tier` says where it was found."""
        return self.ram.get(keys)

    def contains(self, keys: Sequence[SegmentKey]) -> list[str | None]:
        """Name the tier that has each record now. A hint for planning: `get` does not rely on it."""
        return ["ram" if found else None for found in self.ram.contains(keys)]

    def put(self, key: SegmentKey, record: Buffer) -> bool:
        """Keep a record unless one is there already. False when no tier took it.

        Raises ValueError if the record is larger than the arena's slot.
        """
        return self.ram.put(key, record)

    def delete(self, keys: Sequence[SegmentKey]) -> int:
        return self.ram.delete(keys)

    def pin(self, keys: Sequence[SegmentKey]) -> None:
        """Keep these records in RAM, now or when they arrive. Pins count; unpin undoes one."""
        self.ram.pin(keys)

    def unpin(self, keys: Sequence[SegmentKey]) -> None:
        self.ram.unpin(keys)

    def flush(self, timeout: float) -> bool:
        """Wait until every record has reached its tiers; False if that took longer than `timeout` seconds."""
        return True

    def stats(self) -> list[TierStats]:
        return [self.ram.stats()]

    def close(self) -> None:
        self.ram.close()
