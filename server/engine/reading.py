"""Reading a prompt, step by step: restore what is stored, compute the rest, keep what was computed.

One step is a group of restored segments, a chunk of prefill, or a group of segments made selectable, so that
other requests wait for no more than that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from aquifer.cachestore.keys import SegmentKey
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.clock import Clock
from aquifer.server.engine.fetch import StoredSegment
from aquifer.server.engine.parts import EngineParts
from aquifer.server.engine.restore import GROUP_SEGMENTS, Restorer
from aquifer.server.engine.runner import LayerKV, ModelRunner
from aquifer.server.engine.selective import build_index, cells_to_fill
from aquifer.server.engine.state import Phase, RequestState
from aquifer.server.engine.streams import SegmentReader
from aquifer.server.engine.writer import SegmentWriter, split_segments

_SCORE_ROWS = 256
"""Positions whose full logits exist at once while scoring."""


class Claims:
    """Segments that a request is producing right now. Others that need them wait, and share them then."""

    def __init__(self) -> None:
        self._owners: dict[SegmentKey, RequestState] = {}

    def any_of(self, keys: Sequence[SegmentKey]) -> bool:
        """Whether some request is producing one of these."""
        return any(key in self._owners for key in keys)

    def add(self, state: RequestState) -> None:
        """Claim what an admitted request will produce and nobody else has or produces."""
        segments = state.keys.segments
        for index in (*state.missing, *state.unindexed, *range(state.plan.segments, len(segments))):
            if segments[index] not in state.lost:
                self._owners.setdefault(segments[index], state)

    def drop(self, state: RequestState, indices: Iterable[int]) -> None:
        """Let others start that need these segments, if all that this request makes of them is there."""
        for index in set(indices).difference(state.unindexed):
            key = state.keys.segments[index]
            if self._owners.get(key) is state:
                del self._owners[key]

    def drop_all(self, state: RequestState) -> None:
        """Claim nothing for this request any more."""
        for key in [key for key, owner in self._owners.items() if owner is state]:
            del self._owners[key]


@dataclass(frozen=True)
class _Step:
    """One that a device may still be at. done: what follows, given its seconds. holds: what must live until
    then."""

    clock: Clock
    done: Callable[[float], None]
    holds: object = None


class PromptReader:
    """Does the steps. Belongs to the engine's thread."""

    def __init__(
        self,
        parts: EngineParts,
        runner: ModelRunner,
        reader: SegmentReader,
        writer: SegmentWriter,
        claims: Claims,
        on_written: Callable[[RequestState], None],
    ) -> None:
        """on_written: called for every record of a request that reached the RAM tier or was refused by it."""
        self._parts, self._runner, self._reader, self._writer = parts, runner, reader, writer
        self._claims, self._on_written = claims, on_written
        self._restorer = Restorer(reader, parts.pool)
        self._under_way: deque[_Step] = deque()

    @property
    def device_bytes(self) -> int:
        """What it keeps of the device beside pages."""
        return self._restorer.device_bytes

    def lost(self, state: RequestState) -> set[SegmentKey]:
        """Of a document to be stored, what the device has and RAM has not, though it has room for all: it is
        fetched or computed, because nothing is stored from pages."""
        keys, ram, pool = state.keys, self._parts.store.ram, self._parts.pool
        if not (state.request.prompt_only and state.request.store) or len(keys.records) > ram.num_slots:
            return set()
        held = zip(keys.records, ram.contains(keys.records), strict=True)
        lost = {key for key, there in held if not there}.difference(self._writer.waiting)
        if keys.sinks in lost:
            lost.update(keys.segments[:1])  # they are stored together
        return {key for key in lost if pool.holds(key)}

    def advance(self, state: RequestState) -> None:
        """Take one step, if there is one to take."""
        if state.restores:
            self._restore_group(state)
        elif state.ranges:
            self._compute_chunk(state)
        elif state.unindexed:
            self._index_group(state)

    def settle(self, most: int | None = None) -> None:
        """Go on from steps that are done. most: how many a device may still be at; None: any number."""
        while self._under_way:
            waits = most is not None and len(self._under_way) > most
            if not waits and not self._under_way[0].clock.over:
                return
            step = self._under_way.popleft()
            step.done(step.clock.seconds())

    def _restore_group(self, state: RequestState) -> None:
        group = list(islice(state.restores, self._restorer.group_segments))
        clock, source = self._restorer.restore(group, state.cache.table)
        self._under_way.append(_Step(clock, partial(self._restored, state, group), source))
        for segment in group:
            # Not before: if it fails, the request's end gives them back, when the device reads nothing more.
            state.restores.popleft()
            self._register(state, segment.index)
        self._claims.drop(state, [segment.index for segment in group])
        self.settle(most=1)  # the next step is prepared while a device is at this one

    def _restored(self, state: RequestState, group: Sequence[StoredSegment], seconds: float) -> None:
        state.spent += group
        if state.first_choice is None or state.phase is not Phase.READING:
            state.let_go()  # else the first token goes out first: the loop lets go then
        tokens = len(group) * SEGMENT_TOKENS
        self._reader.metrics.codec_tokens.labels(op="decode").inc(tokens)
        self._reader.metrics.codec_seconds.labels(op="decode").inc(seconds)
        state.restore_seconds += seconds
        if len({segment.tier for segment in group}) == 1:
            fetch_share = state.fetch_seconds * len(group) / state.fetched
            self._parts.gate.measured(group[0].tier, tokens, seconds + fetch_share)

    def _compute_chunk(self, state: RequestState) -> None:
        clock = Clock(self._parts.adapter.device)
        start, stop = state.next_chunk(self._parts.limits.chunk_tokens)
        hidden, kv = self._runner.prefill(state.inputs[start:stop], start, state.cache)
        self._keep_segments(state, start, stop, kv)
        if state.request.score_ids:
            self._score(state, start, hidden)
        elif not state.ranges and not state.request.prompt_only:
            state.first_choice = self._runner.next_choice(hidden[-1:], state.sampler)
        clock.stop()
        # A prompt's last chunk may be a single token, which says nothing of the pace.
        tokens = stop - start if state.first_choice is None else 0
        self._under_way.append(_Step(clock, partial(self._computed, state, tokens)))
        # A device goes straight on to the next chunk, but no further ahead.
        self.settle(most=1 if state.ranges else 0)

    def _computed(self, state: RequestState, tokens: int, seconds: float) -> None:
        state.prefill_seconds += seconds
        self._parts.gate.measured("computed", tokens, seconds)

    def _keep_segments(self, state: RequestState, start: int, stop: int, kv: LayerKV) -> None:
        """Share the prompt's segments that this chunk completed, and queue them for the tiers. What has
        no page goes there at once: the next chunk reads it from there."""
        segments = state.keys.segments
        complete = range(start // SEGMENT_TOKENS, min(stop // SEGMENT_TOKENS, len(segments)))
        paged = [index for index in complete if state.cache.table.pages[index] is not None]
        for index in complete:
            if index in paged:
                self._register(state, index)
                continue
            jobs = split_segments(kv, start, [(index, segments[index])], state.keys.sinks)
            keep = state.request.store and index not in state.forgotten
            records = self._writer.store_now(jobs, keep=keep)
            state.cache.host[index] = StoredSegment(index, records[-1], *records[:-1])
        self._claims.drop(state, complete)
        if state.request.store:
            done = state.known | state.forgotten
            wanted = [(index, segments[index]) for index in paged if index not in done]
            jobs = split_segments(kv, start, wanted, state.keys.sinks)
            state.writes_pending += len(jobs)
            self._writer.add(jobs, lambda: self._on_written(state))

    def _register(self, state: RequestState, index: int) -> None:
        if index in state.forgotten:
            return
        page = state.cache.table.pages[index]
        assert page is not None
        self._parts.pool.register(page, state.keys.segments[index])

    def _index_group(self, state: RequestState) -> None:
        """Make some segments of the document selectable."""
        index, pages = self._parts.index, state.room.index_pages
        if len(state.unindexed) == len(state.room.unindexed):  # the first group
            of_rows = state.room.unindexed, state.room.row_pages
            state.cells = cells_to_fill(self._parts, state.plan.selection, pages, *of_rows)
        group = [state.unindexed.popleft() for _ in range(min(GROUP_SEGMENTS, len(state.unindexed)))]
        build_index(index, pages, group, state.cache, self._reader, state.cells)
        for number in group:
            if number not in state.forgotten:
                index.register(pages[number], state.keys.segments[number])
        self._claims.drop(state, group)

    def _score(self, state: RequestState, start: int, hidden: Tensor) -> None:
        """Log probabilities of the scored tokens that this chunk predicts. hidden: [T, hidden] at start.."""
        last = len(state.request.token_ids) - 1  # the position that predicts the first scored token
        first = max(0, last - start)
        scored = start + first - last
        targets = state.request.score_ids[scored : scored + max(0, hidden.shape[0] - first)]
        for at in range(0, len(targets), _SCORE_ROWS):
            ids = torch.tensor(targets[at : at + _SCORE_ROWS], device=hidden.device)
            logits = self._runner.logits(hidden[first + at : first + at + len(ids)])
            logprobs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)
            state.score_logprobs += logprobs.tolist()
