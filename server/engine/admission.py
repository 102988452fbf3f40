"""Who may start, in which mode, with how much of the device.

The mode is settled when a request arrives, from sizes alone: `auto` is resident where the whole KV fits the
device at all, else verified, else streamed, which are as exact. Room is taken as a whole when a request
starts, so that a running one can never be stopped by a lack of it.

                device pages                                index pages       RAM arena
    resident    whole sequence                              -                 -
    streamed    tail and answer, segments as budget allows  -                 whole document
    selective   tail and answer, some rows or all           whole document    whole document, while reading
    verified    as streamed, and some rows or all           whole document    whole document
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from aquifer.cachestore.keys import SegmentKey
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.pages import BlockTable, pages_of
from aquifer.server.engine.parts import EngineParts
from aquifer.server.engine.selective import Selection
from aquifer.server.engine.types import FailedEvent, GenerateRequest, KVMode


@dataclass(frozen=True)
class Plan:
    """How a request will be decoded, and what it needs.

    segments: full segments of the prompt that are restored or computed ahead of its last token.
    own_pages: pages for what comes after them: the prompt's tail and the answer.
    selection: for `selective` and `verified`.
    """

    mode: KVMode
    segments: int
    own_pages: int
    selection: Selection | None = None

    @property
    def resident(self) -> bool:
        return self.mode == "resident"

    @property
    def row_pages(self) -> int:
        return self.selection.row_pages if self.selection else 0

    @property
    def pages(self) -> int:
        """Device pages without which it cannot run."""
        return self.own_pages + self.row_pages + (self.segments if self.resident else 0)

    @property
    def index_pages(self) -> int:
        return self.segments if self.selection else 0

    @property
    def host_segments(self) -> int:
        return 0 if self.resident else self.segments


@dataclass
class Room:
    """What one running request holds."""

    table: BlockTable
    unread: list[int]
    """Segments of the document that are not on the device."""
    row_pages: list[int]
    index_pages: list[int]
    unindexed: list[int]
    """Segments that the index does not have yet."""
    host_keys: list[SegmentKey]
    """Segments that it reads from the RAM arena."""


class Admission:
    """Plans requests and hands out the device. Planning is thread-safe, the rest belongs to the engine."""

    def __init__(self, parts: EngineParts) -> None:
        self._pool, self._index = parts.pool, parts.index
        self._arena_slots = parts.store.ram.num_slots
        self._limits = parts.limits
        self._host_users: Counter[SegmentKey] = Counter()

    def plan(self, request: GenerateRequest) -> Plan | FailedEvent:
        """Settle the mode. A FailedEvent says what does not fit, even on an idle server."""
        plans = [self._plan_as(request, mode) for mode in _candidates(request)]
        for plan in plans:
            if self._obstacle(plan) is None:
                return plan
        prompt = len(request.token_ids)
        reasons = "; ".join(f"{plan.mode}: {self._obstacle(plan)}" for plan in plans)
        return FailedEvent("too_long", f"the KV of this prompt of {prompt:,} tokens does not fit. {reasons}")

    def admit(self, plan: Plan, wanted: Sequence[SegmentKey], unshared: Collection[SegmentKey]) -> Room | str:
        """Take room for a request whose reusable segments are `wanted`, or say what there is too little of
        now. Nothing is evicted for a request that cannot start.

        unshared: of those, what it does not take from the device even if it is there."""
        host_keys = [] if plan.resident else list(wanted)
        records = len(self._host_users.keys() | set(host_keys)) + 1  # and the sinks
        if host_keys and records > self._arena_slots:
            return f"{records:,} records in RAM, the arena holds {self._arena_slots:,} (AQUIFER_RAM_BYTES)"
        pool, index = self._pool, self._index
        pages = [None if key in unshared else pool.acquire(key) for key in wanted]
        index_pages = [index.acquire(key) for key in wanted[: plan.index_pages]]
        own = plan.own_pages + plan.row_pages
        if not plan.resident:
            self._make_room(pages, own)
        fresh = own + (pages.count(None) if plan.resident else 0)
        unindexed = [number for number, page in enumerate(index_pages) if page is None]
        lacking = self._lacking(fresh, len(unindexed))
        if lacking is not None:
            pool.release(_held(pages))
            index.release(_held(index_pages))
            return lacking

        self._host_users.update(host_keys)
        taken, filler = pool.allocate(fresh) or [], iter(index.allocate(len(unindexed)) or [])
        # The document's pages first, then the tail's: neighbours in the sequence lie side by side.
        tail_from = len(taken) - own
        tail, row_pages = taken[tail_from : tail_from + plan.own_pages], taken[tail_from + plan.own_pages :]
        unread = [number for number, page in enumerate(pages) if page is None]
        spare = iter(taken[:tail_from] if plan.resident else self._spare(len(unread)))
        document = [next(spare, None) if page is None else page for page in pages]
        return Room(
            table=BlockTable([*document, *tail]),
            unread=unread,
            row_pages=row_pages,
            index_pages=[next(filler) if page is None else page for page in index_pages],
            unindexed=unindexed,
            host_keys=host_keys,
        )

    def leave_document(self, room: Room, segments: int) -> None:
        """Give back the pages of the document's segments, and its share of the arena."""
        self._pool.release(_held(room.table.pages[:segments]))
        room.table.pages[:segments] = [None] * segments
        self._leave_arena(room)

    def release(self, room: Room) -> None:
        """Give back everything."""
        self._pool.release(room.table.held)
        self._pool.release(room.row_pages)
        self._index.release(room.index_pages)
        self._leave_arena(room)

    def _leave_arena(self, room: Room) -> None:
        for key in room.host_keys:
            self._host_users[key] -= 1
            if not self._host_users[key]:
                del self._host_users[key]
        room.host_keys = []

    def _plan_as(self, request: GenerateRequest, mode: KVMode) -> Plan:
        prompt = len(request.token_ids)
        prompt_only = request.prompt_only
        segments = (prompt if prompt_only else prompt - 1) // SEGMENT_TOKENS
        # A prompt-only request leaves its tail out: only full segments are stored.
        total = segments * SEGMENT_TOKENS if prompt_only else request.total_tokens
        own_pages, selection = pages_of(total) - segments, None
        if mode in ("selective", "verified"):
            budget = self._limits.selective_budget if request.budget is None else request.budget
            selection = Selection.of(
                prompt,
                budget,
                shared=self._limits.shared_selection,
                rows_per_slot=self._index.codec.rows_per_slot,
                # As many rows on the device as its part of it holds, if as many requests run as may.
                share_pages=self._pool.num_pages // self._limits.max_running - own_pages,
            )
        return Plan(mode, segments, own_pages, selection)

    def _obstacle(self, plan: Plan) -> str | None:
        """Why a plan cannot be carried out on an idle server, if so."""
        if plan.pages > self._pool.num_pages:
            need, have = (pages * self._pool.page_bytes for pages in (plan.pages, self._pool.num_pages))
            return f"needs {need:,} bytes on the device, this server has {have:,} (AQUIFER_GPU_KV_BYTES)"
        if plan.index_pages > self._index.num_pages:
            return (
                f"needs {plan.index_pages:,} segments indexed, this server has room for "
                f"{self._index.num_pages:,} (AQUIFER_SELECTIVE_RAM_BYTES, AQUIFER_GPU_KV_BYTES)"
            )
        if plan.host_segments and plan.host_segments + 1 > self._arena_slots:
            return (
                f"needs {plan.host_segments + 1:,} records in RAM, the arena holds {self._arena_slots:,} "
                "(AQUIFER_RAM_BYTES)"
            )
        return None

    def _make_room(self, pages: list[int | None], own: int) -> None:
        """Do without pages of the document, its end first, until `own` others can be had: what happens to
        be on the device must not keep a request from starting that needs none of it."""
        for number in reversed(range(len(pages))):
            if own <= self._pool.available_pages:
                return
            self._pool.release(_held(pages[number : number + 1]))
            pages[number] = None

    def _lacking(self, pages: int, index_pages: int) -> str | None:
        """What there is too little of now, if so."""
        if pages > self._pool.available_pages:
            need, have = (n * self._pool.page_bytes for n in (pages, self._pool.available_pages))
            return f"{need:,} bytes on the device, {have:,} are free now (AQUIFER_GPU_KV_BYTES)"
        if index_pages > self._index.available_pages:
            return (
                f"{index_pages:,} segments indexed, there is room for {self._index.available_pages:,} now "
                "(AQUIFER_SELECTIVE_RAM_BYTES)"
            )
        return None

    def _spare(self, missing: int) -> list[int]:
        """Pages for segments that need none, as far as the budget goes. The first segments get them."""
        budget = self._limits.streamed_bytes
        available = self._pool.available_pages
        pages = available // 2 if budget is None else min(available, budget // self._pool.page_bytes)
        return self._pool.allocate(min(missing, pages)) or []


def _held(pages: Sequence[int | None]) -> list[int]:
    return [page for page in pages if page is not None]


def _candidates(request: GenerateRequest) -> list[KVMode]:
    """Modes to try, best first."""
    if len(request.token_ids) <= SEGMENT_TOKENS:
        return ["resident"]  # nothing of it would be anywhere else
    one_by_one = not (request.prompt_only or request.score_ids)
    if request.mode == "auto":
        return ["resident", "verified", "streamed"] if one_by_one else ["resident", "streamed"]
    if request.mode in ("selective", "verified") and not one_by_one:
        return ["streamed"]  # selection is made for one new token at a time
    return [request.mode]
