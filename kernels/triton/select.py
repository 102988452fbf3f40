"""Choosing the tokens of the largest ranks, for sets of many requests at once, in ascending order.

A rank is the largest share of attention that any query head of a set would give a token, as a logarithm. It
is rounded to a whole number of 1/512 (0.2 % of the share; a landmark errs by far more), so that two
histograms of 256 bins find the smallest rank that is chosen: no sort, no list that depends on what else is in
the batch. Of tokens with that very rank the first ones are taken.

Three kernels, each cut into chunks of tokens: ranks and their upper bytes; the lower bytes of those that
share the limit's upper byte; the tokens. Bytes moved per set: scores once, 4 * T per query head, and ranks
three times, 2 * T each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import expect, expect_power_of_two
from aquifer.kernels.triton.landmarks import MAX_PARTS
from aquifer.kernels.triton.lanes import CHOSEN, FIELDS, KEYS, SCORES, TOKENS, WANTED, memory, number

PROGRAMS = 1056
"""What the number of chunks aims at: eight per multiprocessor of an H200, as histograms are slow to begin."""

MAX_CHUNKS = 32
"""The last kernel reads the histograms of all chunks at once."""

UNIT = tl.constexpr(2048)
"""Chunks are cut at multiples of so many tokens, in all three kernels."""

RESOLUTION = tl.constexpr(512.0)
NEVER = tl.constexpr(65535)
"""Rank of what must not be chosen: sinks, which are attended to anyway."""


@triton.jit
def _chunk(tokens: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """First token of this program's chunk, and of the next."""
    length = tl.cdiv(tl.cdiv(tokens, UNIT), tl.num_programs(0)) * UNIT
    first = tl.program_id(0) * length
    return first, tl.minimum(tokens, first + length)


@triton.jit
def _own_ranks(lanes: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """Where the ranks of this program's set are. The grid is (chunks, sets, requests) in all kernels."""
    return memory(lanes, tl.program_id(2), KEYS, tl.int16) + tl.program_id(1).to(tl.int64) * tokens


@triton.jit
def _own_counts(counts: tl.tensor, chunk: tl.tensor) -> tl.tensor:
    """Where int32 [256] of a chunk of this program's set are."""
    own_set = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    return counts + (own_set * tl.num_programs(0) + chunk) * 256


@triton.jit
def _limit(counts: tl.tensor, wanted: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The bin in which the wanted-th token lies, and how many of that bin are wanted.

    counts: int32 [256], tokens per bin, of which the first are wanted."""
    bins = tl.arange(0, 256)
    before = tl.cumsum(counts, 0) - counts
    limit = tl.sum((before + counts < wanted).to(tl.int32), 0)
    return limit, wanted - tl.sum(tl.where(bins == limit, before, 0), 0)


@triton.jit(do_not_specialize=["parts"])
def _rank(
    lanes: tl.tensor,
    partial_lse: tl.tensor,
    upper: tl.tensor,
    first: tl.tensor,
    parts: tl.tensor,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Ranks of one chunk for one set: HEADS query heads compete for it."""
    own_set, request = tl.program_id(1), tl.program_id(2)
    tokens = number(lanes, request, TOKENS)
    if tokens > 0:
        row, part, bins = tl.arange(0, ROWS), tl.arange(0, PARTS), tl.arange(0, 256)
        query_head = own_set * HEADS + row
        place = (request * tl.num_programs(1) * HEADS + query_head)[:, None] * parts + part[None, :]
        there = (row[:, None] < HEADS) & (part[None, :] < parts)
        each = tl.load(partial_lse + place, mask=there, other=float("-inf"))
        top = tl.max(each, axis=1)
        shift = tl.where(row < HEADS, top, 0.0)
        lse = shift + tl.log(tl.maximum(tl.sum(tl.exp(each - shift[:, None]), axis=1), 1e-30))

        scores = memory(lanes, request, SCORES, tl.float32)
        keys = _own_ranks(lanes, tokens)
        row_at = query_head.to(tl.int64)[:, None] * tokens
        counts = tl.zeros([256], dtype=tl.int32)
        start, stop = _chunk(tokens)
        for at in range(start, stop, BLOCK):
            token = at + tl.arange(0, BLOCK)
            inside = token < stop
            wanted = (row[:, None] < HEADS) & (inside & (token >= first))[None, :]
            score = tl.load(scores + row_at + token[None, :], mask=wanted, other=float("-inf"))
            distance = -tl.max(score - lse[:, None], axis=0) * RESOLUTION
            key = tl.minimum(tl.maximum(distance, 0.0), NEVER - 1.0).to(tl.int32)
            key = tl.where(token >= first, key, NEVER)
            counts += tl.histogram(key >> 8, 256, mask=inside)
            tl.store(keys + token, key.to(tl.int16), mask=inside)
        tl.store(_own_counts(upper, tl.program_id(0)) + bins, counts)


@triton.jit
def _histograms(counts: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    """int32 [CHUNKS, 256]: of all chunks of this program's set."""
    chunk, bins = tl.arange(0, CHUNKS), tl.arange(0, 256)
    place = _own_counts(counts, chunk)[:, None] + bins[None, :]
    return tl.load(place, mask=chunk[:, None] < tl.num_programs(0), other=0)


@triton.jit
def _refine(
    lanes: tl.tensor,
    upper: tl.tensor,
    lower: tl.tensor,
    limits: tl.tensor,
    better: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The lower bytes of those ranks of one chunk whose upper byte is the limit's, and how many ranks have a
    better one."""
    request, own_chunk = tl.program_id(2), tl.program_id(0)
    tokens = number(lanes, request, TOKENS)
    if tokens > 0:
        each = _histograms(upper, CHUNKS)
        limit, wanted = _limit(tl.sum(each, 0), number(lanes, request, WANTED))
        own_set = request * tl.num_programs(1) + tl.program_id(1)
        if own_chunk == 0:
            tl.store(limits + own_set * 2, limit)
            tl.store(limits + own_set * 2 + 1, wanted)
        chunk, bins = tl.arange(0, CHUNKS)[:, None], tl.arange(0, 256)[None, :]
        counted = tl.where((chunk == own_chunk) & (bins < limit), each, 0)
        tl.store(better + own_set * tl.num_programs(0) + own_chunk, tl.sum(tl.sum(counted, 1), 0))

        keys = _own_ranks(lanes, tokens)
        counts = tl.zeros([256], dtype=tl.int32)
        start, stop = _chunk(tokens)
        for at in range(start, stop, BLOCK):
            token = at + tl.arange(0, BLOCK)
            key = tl.load(keys + token, mask=token < stop, other=0).to(tl.int32) & NEVER
            counts += tl.histogram(key & 255, 256, mask=(token < stop) & (key >> 8 == limit))
        tl.store(_own_counts(lower, own_chunk) + tl.arange(0, 256), counts)


@triton.jit
def take(
    sure: tl.tensor, tie: tl.tensor, sure_before: tl.tensor, ties_before: tl.tensor, ties_wanted: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Which of one turn are taken, all sure ones and the first ties, and their places among all taken. sure,
    tie: int32 of 0 and 1. ..._before: how many there were in earlier turns."""
    # One running sum counts both: no turn has 65,536 of them. As many ties are taken as are left, so places
    # follow from the two counts.
    counts = tl.cumsum(sure + (tie << 16), 0)
    ties = ties_before + (counts >> 16)
    taken = (sure == 1) | ((tie == 1) & (ties <= ties_wanted))
    return taken, sure_before + (counts & 0xFFFF) + tl.minimum(ties, ties_wanted) - 1


@triton.jit
def _choose(
    lanes: tl.tensor,
    lower: tl.tensor,
    limits: tl.tensor,
    better: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The chosen tokens of one chunk, behind those of the chunks before it."""
    request, own_chunk = tl.program_id(2), tl.program_id(0)
    tokens, count = number(lanes, request, TOKENS), number(lanes, request, WANTED)
    if tokens > 0:
        own_set = request * tl.num_programs(1) + tl.program_id(1)
        upper_limit, wanted = tl.load(limits + own_set * 2), tl.load(limits + own_set * 2 + 1)
        chunk, bins = tl.arange(0, CHUNKS), tl.arange(0, 256)[None, :]
        each_better = tl.load(better + own_set * tl.num_programs(0) + chunk, mask=chunk < own_chunk, other=0)
        each = _histograms(lower, CHUNKS)
        lower_limit, ties_wanted = _limit(tl.sum(each, 0), wanted)
        limit = upper_limit * 256 + lower_limit
        earlier = tl.where(chunk[:, None] < own_chunk, each, 0)
        ties_before = tl.sum(tl.sum(tl.where(bins == lower_limit, earlier, 0), 1), 0)
        sure_before = tl.sum(tl.sum(tl.where(bins < lower_limit, earlier, 0), 1), 0) + tl.sum(each_better, 0)

        keys = _own_ranks(lanes, tokens)
        chosen = memory(lanes, request, CHOSEN, tl.int32) + tl.program_id(1) * count
        start, stop = _chunk(tokens)
        for at in range(start, stop, BLOCK):
            token = at + tl.arange(0, BLOCK)
            key = tl.load(keys + token, mask=token < stop, other=-1).to(tl.int32) & NEVER
            sure = (key < limit).to(tl.int32)
            tie = ((key == limit) & (token < stop)).to(tl.int32)
            taken, place = take(sure, tie, sure_before, ties_before, ties_wanted)
            tl.store(chosen + place, token, mask=taken)
            ties_before += tl.sum(tie, 0)
            sure_before += tl.sum(sure, 0)


def select_tokens(
    lanes: Tensor,
    partial_lse: Tensor,
    sets: int,
    *,
    first: int = 0,
    block_tokens: int = UNIT.value,
    chunks: int | None = None,
) -> None:
    """Choose the tokens that matter most to any query head of a set.

    lanes: int64 [B, fields]; reads scores, writes keys (scratch) and chosen
    partial_lse: float32 [B, Hq, parts], as `score_landmarks` returns it
    sets: S, a divisor of Hq
    first: tokens at the start of every request that are not to be chosen (sinks)
    block_tokens: per turn of a program, a divisor of 2048
    chunks: programs per request and set, at most 32; by default so many that the device is full
    Twin: aquifer.kernels.landmarks.select_tokens, up to the rounding of ranks.
    """
    requests, num_q_heads, parts = partial_lse.shape
    expect("lanes", lanes, (requests, FIELDS.value), torch.int64)
    expect("partial_lse", partial_lse, (None, None, None), torch.float32)
    expect_power_of_two("block_tokens", block_tokens, 128, UNIT.value)
    if parts > MAX_PARTS:
        raise ValueError(f"{parts} parts of a log-sum-exp; at most {MAX_PARTS} can be read")
    if num_q_heads % sets:
        raise ValueError(f"{num_q_heads} query heads do not divide into {sets} sets")
    heads = num_q_heads // sets
    rows = triton.next_power_of_2(heads)
    chunks = chunks or max(1, min(MAX_CHUNKS, PROGRAMS // (requests * sets)))
    upper, lower = torch.empty(2, requests, sets, chunks, 256, dtype=torch.int32, device=lanes.device)
    limits = torch.empty(requests, sets, 2, dtype=torch.int32, device=lanes.device)
    better = torch.empty(requests, sets, chunks, dtype=torch.int32, device=lanes.device)
    grid = (chunks, sets, requests)
    _rank[grid](
        lanes,
        partial_lse.contiguous(),
        upper,
        first,
        parts,
        HEADS=heads,
        ROWS=rows,
        PARTS=MAX_PARTS,
        BLOCK=max(128, block_tokens * 4 // max(4, rows)),  # as many scores for any set
        num_warps=8,
    )
    _refine[grid](lanes, upper, lower, limits, better, CHUNKS=MAX_CHUNKS, BLOCK=block_tokens, num_warps=4)
    _choose[grid](lanes, lower, limits, better, CHUNKS=MAX_CHUNKS, BLOCK=2 * block_tokens, num_warps=8)
