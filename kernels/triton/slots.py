"""Which chosen tokens are on the device, and which slots the others get: those wanted least recently.

Three small kernels, each cut into chunks, because each waits for all of the one before: a slot may be given
away only when it is known that no chosen token is in it, and the oldest slots are known only when the ages of
all have been counted.

Bytes moved per set: 12 * K for K chosen tokens, 8 * N for N slots, and a histogram of 1 kB per chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import expect, expect_power_of_two
from aquifer.kernels.triton.lanes import (
    CHOSEN,
    FIELDS,
    LAST_USED,
    MISSING,
    PAGE,
    ROW_PAGES,
    SLOT_OF,
    SLOTS,
    STEP,
    TAIL,
    TARGETS,
    TOKEN_IN,
    TOKENS,
    WANTED,
    memory,
    number,
)
from aquifer.kernels.triton.select import take

PROGRAMS = 512
"""What the number of chunks aims at: what a device runs at once."""

MAX_CHUNKS = 16
"""The last kernel reads the histograms of all chunks at once."""

OLDEST = tl.constexpr(255)
"""Slots that were not wanted for so many steps, or never, are all as old as this."""


@triton.jit
def _own_set() -> tl.tensor:
    """Number of this program's set among those of all requests. The grid is (chunks, sets, requests)."""
    return tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def _own(lanes: tl.tensor, FIELD: tl.constexpr, stride: tl.tensor) -> tl.tensor:
    """Where int32 of this program's set are, of those that do not outlive a step."""
    return memory(lanes, tl.program_id(2), FIELD, tl.int32) + tl.program_id(1) * stride


@triton.jit
def _book(lanes: tl.tensor, FIELD: tl.constexpr, layer: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """Where int32 of this program's set are, of those that each layer keeps."""
    number_of_set = (layer * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    return memory(lanes, tl.program_id(2), FIELD, tl.int32) + number_of_set * stride


@triton.jit
def _chunk(count: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The first of this program's chunk, and of the next."""
    length = tl.cdiv(tl.cdiv(count, BLOCK), tl.num_programs(0)) * BLOCK
    first = tl.program_id(0) * length
    return first, tl.minimum(count, first + length)


@triton.jit
def _pooled(row_pages: tl.tensor, slot: tl.tensor, there: tl.tensor, SINKS: tl.constexpr) -> tl.tensor:
    """Slots of the pool for slots of a request."""
    row = SINKS + slot
    return tl.load(row_pages + row // PAGE, mask=there, other=0) * PAGE + row % PAGE


@triton.jit
def _absent(absent: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    """int32 [CHUNKS]: absent tokens in each chunk of this program's set."""
    chunk = tl.arange(0, CHUNKS)
    at = absent + _own_set() * tl.num_programs(0) + chunk
    return tl.load(at, mask=chunk < tl.num_programs(0), other=0)


@triton.jit
def _age(last_used: tl.tensor, slot: tl.tensor, inside: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Steps since slots were wanted; 0 for others, which are never the oldest."""
    return tl.minimum(step - tl.load(last_used + slot, mask=inside, other=step), OLDEST)


@triton.jit(do_not_specialize=["layer"])  # one program for all of them
def _look_up(
    lanes: tl.tensor,
    layer: tl.tensor,
    lists: tl.tensor,
    absent: tl.tensor,
    set_stride: tl.tensor,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """List the slots of the tokens that are there, stamp them, and count the others."""
    request = tl.program_id(2)
    count, step = number(lanes, request, WANTED), number(lanes, request, STEP)
    chosen = _own(lanes, CHOSEN, count)
    slot_of = _book(lanes, SLOT_OF, layer, number(lanes, request, TOKENS))
    last_used = _book(lanes, LAST_USED, layer, number(lanes, request, SLOTS))
    row_pages = memory(lanes, request, ROW_PAGES, tl.int32)
    listed = lists + _own_set() * set_stride + SINKS + number(lanes, request, TAIL)
    missed = 0
    start, stop = _chunk(count, BLOCK)
    for at in range(start, stop, BLOCK):
        place = at + tl.arange(0, BLOCK)
        token = tl.load(chosen + place, mask=place < stop, other=0)
        slot = tl.load(slot_of + token, mask=place < stop, other=0)
        there = (place < stop) & (slot >= 0)
        tl.store(last_used + slot, step, mask=there)
        tl.store(listed + place, _pooled(row_pages, slot, there, SINKS), mask=there)
        missed += tl.sum((slot < 0).to(tl.int32), 0)
    tl.store(absent + _own_set() * tl.num_programs(0) + tl.program_id(0), missed)


@triton.jit(do_not_specialize=["layer"])
def _count_ages(
    lanes: tl.tensor,
    layer: tl.tensor,
    absent: tl.tensor,
    ages: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Histograms of the slots' ages; and the missing tokens one behind the other, each with its place among
    the chosen ones in `targets`."""
    missed = _absent(absent, CHUNKS)
    if tl.sum(missed, 0) > 0:
        request, own_chunk = tl.program_id(2), tl.program_id(0)
        slots, step = number(lanes, request, SLOTS), number(lanes, request, STEP)
        last_used = _book(lanes, LAST_USED, layer, slots)
        counts = tl.zeros([256], dtype=tl.int32)
        start, stop = _chunk(slots, BLOCK)
        for at in range(start, stop, BLOCK):
            slot = at + tl.arange(0, BLOCK)
            counts += tl.histogram(_age(last_used, slot, slot < stop, step), 256)
        own_ages = ages + (_own_set() * tl.num_programs(0) + own_chunk) * 256
        tl.store(own_ages + tl.arange(0, 256), counts)

        count = number(lanes, request, WANTED)
        chosen, missing = _own(lanes, CHOSEN, count), _own(lanes, MISSING, count)
        targets = _own(lanes, TARGETS, count)
        slot_of = _book(lanes, SLOT_OF, layer, number(lanes, request, TOKENS))
        before = tl.sum(tl.where(tl.arange(0, CHUNKS) < own_chunk, missed, 0), 0)
        start, stop = _chunk(count, BLOCK)
        for at in range(start, stop, BLOCK):
            place = at + tl.arange(0, BLOCK)
            token = tl.load(chosen + place, mask=place < stop, other=0)
            gone = (tl.load(slot_of + token, mask=place < stop, other=0) < 0).to(tl.int32)
            nth = before + tl.cumsum(gone, 0) - 1
            tl.store(missing + nth, token, mask=gone == 1)
            tl.store(targets + nth, place, mask=gone == 1)
            before += tl.sum(gone, 0)


@triton.jit(do_not_specialize=["layer"])
def _give_slots(
    lanes: tl.tensor,
    layer: tl.tensor,
    lists: tl.tensor,
    absent: tl.tensor,
    ages: tl.tensor,
    num_missing: tl.tensor,
    counters: tl.tensor,
    set_stride: tl.tensor,
    SINKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The oldest slots, as many as tokens are missing: all above some age, and the first ones of that age."""
    request, own_chunk = tl.program_id(2), tl.program_id(0)
    count = number(lanes, request, WANTED)
    wanted = tl.sum(_absent(absent, CHUNKS), 0)
    if own_chunk == 0:
        tl.store(num_missing + _own_set(), wanted)
        if count > 0:
            tl.atomic_add(counters, tl.cast(count, tl.int64))
            tl.atomic_add(counters + 1, tl.cast(wanted, tl.int64))
    if wanted > 0:
        chunk, age_of_bin = tl.arange(0, CHUNKS), tl.arange(0, 256)
        all_of_set = ages + (_own_set() * tl.num_programs(0) + chunk)[:, None] * 256 + age_of_bin[None, :]
        each = tl.load(all_of_set, mask=chunk[:, None] < tl.num_programs(0), other=0)
        all_ages = tl.sum(each, 0)
        at_least = tl.sum(all_ages, 0) - tl.cumsum(all_ages, 0) + all_ages
        limit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        ties_wanted = wanted - tl.sum(tl.where(age_of_bin > limit, all_ages, 0), 0)
        earlier = tl.where(chunk[:, None] < own_chunk, each, 0)
        older_before = tl.sum(tl.sum(tl.where(age_of_bin[None, :] > limit, earlier, 0), 1), 0)
        ties_before = tl.sum(tl.sum(tl.where(age_of_bin[None, :] == limit, earlier, 0), 1), 0)

        slots, step = number(lanes, request, SLOTS), number(lanes, request, STEP)
        slot_of = _book(lanes, SLOT_OF, layer, number(lanes, request, TOKENS))
        token_in, last_used = _book(lanes, TOKEN_IN, layer, slots), _book(lanes, LAST_USED, layer, slots)
        missing, targets = _own(lanes, MISSING, count), _own(lanes, TARGETS, count)
        row_pages = memory(lanes, request, ROW_PAGES, tl.int32)
        listed = lists + _own_set() * set_stride + SINKS + number(lanes, request, TAIL)
        start, stop = _chunk(slots, BLOCK)
        for at in range(start, stop, BLOCK):
            slot = at + tl.arange(0, BLOCK)
            age = _age(last_used, slot, slot < stop, step)
            older, tie = (age > limit).to(tl.int32), ((age == limit) & (slot < stop)).to(tl.int32)
            given, nth = take(older, tie, older_before, ties_before, ties_wanted)
            token = tl.load(missing + nth, mask=given, other=0)
            place = tl.load(targets + nth, mask=given, other=0)
            old = tl.load(token_in + slot, mask=given, other=-1)
            tl.store(slot_of + old, -1, mask=given & (old >= 0))
            tl.store(slot_of + token, slot, mask=given)
            tl.store(token_in + slot, token, mask=given)
            tl.store(last_used + slot, step, mask=given)
            pooled = _pooled(row_pages, slot, given, SINKS)
            tl.store(targets + nth, pooled, mask=given)
            tl.store(listed + place, pooled, mask=given)
            ties_before += tl.sum(tie, 0)
            older_before += tl.sum(older, 0)


def find_rows(
    lanes: Tensor,
    layer: int,
    lists: Tensor,
    counters: Tensor,
    *,
    sinks: int,
    block: int = 512,
    chunks: int | None = None,
) -> Tensor:
    """Give every chosen token of one layer a slot: the one its row is in, or else that of the row that was
    wanted least recently, the first such slot first.

    lanes: int64 [B, fields]; reads chosen, keeps slot_of, token_in and last_used, and writes what is to be
        fetched: missing and targets
    lists: int32 [B, S, W]; slots of the pool are written behind sinks and tail, in the order of the tokens
    counters: int64 [2]; grows by the numbers of chosen and of missing tokens, summed over sets
    sinks: how many there are
    block: tokens or slots per turn of a program
    chunks: programs per request and set, at most 16; by default so many that the device is full
    Returns int32 [B, S]: how many are missing.
    """
    requests, sets, _ = lists.shape
    expect("lanes", lanes, (requests, FIELDS.value), torch.int64)
    expect("lists", lists, (None, None, None), torch.int32)
    expect("counters", counters, (2,), torch.int64)
    expect_power_of_two("block", block, 16, 8192)
    chunks = chunks or max(1, min(MAX_CHUNKS, PROGRAMS // (requests * sets)))
    grid = (chunks, sets, requests)
    num_missing = torch.empty(requests, sets, dtype=torch.int32, device=lanes.device)
    absent = torch.empty(requests, sets, chunks, dtype=torch.int32, device=lanes.device)
    ages = torch.empty(requests, sets, chunks, 256, dtype=torch.int32, device=lanes.device)
    stride = lists.stride(1)
    _look_up[grid](lanes, layer, lists, absent, stride, SINKS=sinks, BLOCK=block, num_warps=4)
    _count_ages[grid](lanes, layer, absent, ages, CHUNKS=MAX_CHUNKS, BLOCK=block, num_warps=4)
    _give_slots[grid](
        lanes,
        layer,
        lists,
        absent,
        ages,
        num_missing,
        counters,
        stride,
        SINKS=sinks,
        CHUNKS=MAX_CHUNKS,
        BLOCK=block,
        num_warps=4,
    )
    return num_missing
