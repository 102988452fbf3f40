"""How rows come to the device: those of chosen tokens when they are missing, or all of them ahead of time.

Rows lie in page-locked host memory, which the device reads in place; so only the rows that are missing
travel, and no list of them has to come back to the host first. A row is one token and head: 4-bit codes of
its key and of its value (compression/landmarks.py), one read of 128 bytes where heads are 128 wide. They stay
packed: attention decodes them (row_attention.py).

Bytes moved: D per missing row over the bus, and as many written. Of many rows the bus is the limit; of few,
that the device learns where they are, about 10 ns for every 64 kB that it did not touch lately. So requests
take turns instead of being read side by side: all programs fetch for one of them, and then for the next. Rows
in the order in which they lie there come at the rate of the bus.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import FLOATS, expect, expect_pool, expect_power_of_two
from aquifer.kernels.triton.lanes import (
    FIELDS,
    INDEX_PAGES,
    MISSING,
    PAGE,
    TARGETS,
    WANTED,
    memory,
    number,
    pool_cell,
)

CODE_BITS = 4
"""Per value of a key or value."""

FETCHING_PROGRAMS = 528
"""That fetch rows, for however many requests: often they find nothing to do, and starting them takes time."""

BUS_PROGRAMS, ALL_PROGRAMS = 8, 264
"""That load rows from host memory, beside other work, and from the device's own."""


@triton.jit
def _fetch_rows(
    lanes: tl.tensor,
    num_missing: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    all_sets: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    SETS: tl.constexpr,
    MOST_SETS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Every program takes every so many-th block of rows, of all requests' sets one after the other. All
    memory in words of 32 bits, WORDS of them per cell."""
    ROWS_EACH: tl.constexpr = HEADS // SETS
    every_set = tl.arange(0, MOST_SETS)
    entries = tl.load(num_missing + every_set, mask=every_set < all_sets, other=0) * ROWS_EACH
    ends = tl.cumsum(tl.cdiv(entries, BLOCK), 0)
    blocks = tl.max(ends, 0)
    word = tl.arange(0, 2 * WORDS)[None, :]
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        nth = tl.sum((ends <= block).to(tl.int32), 0)
        request, own_set = nth // SETS, nth % SETS
        first = tl.max(tl.where(every_set < nth, ends, 0), 0)
        entry = (block - first) * BLOCK + tl.arange(0, BLOCK)
        there = entry < tl.load(num_missing + nth) * ROWS_EACH
        count = number(lanes, request, WANTED)
        missing = memory(lanes, request, MISSING, tl.int32)
        targets = memory(lanes, request, TARGETS, tl.int32)
        pages = memory(lanes, request, INDEX_PAGES, tl.int32)
        # Where heads share a set, those of a token lie side by side, and so do the reads.
        head, place = own_set + entry % ROWS_EACH, entry // ROWS_EACH
        token = tl.load(missing + own_set * count + place, mask=there, other=0)
        cell = tl.load(targets + own_set * count + place, mask=there, other=0).to(tl.int64)
        row = (tl.load(pages + token // PAGE).to(tl.int64) * PAGE + token % PAGE) * HEADS + head
        codes = tl.load(rows + row[:, None] * (2 * WORDS) + word, mask=there[:, None], other=0)
        target = (head.to(tl.int64) * head_stride + cell * WORDS)[:, None] + word
        tl.store(keys + target, codes, mask=there[:, None] & (word < WORDS))
        tl.store(values + (target - WORDS), codes, mask=there[:, None] & (word >= WORDS))


@triton.jit
def _load_rows(
    segments: tl.tensor,
    starts: tl.tensor,
    row_pages: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    blocks: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    MOST_HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    SINKS: tl.constexpr,
    PER_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Every program takes every so many-th block of tokens. All memory in words, as above."""
    word = tl.arange(0, MOST_HEADS * 2 * WORDS)
    head, half, own_word = word // (2 * WORDS), word // WORDS % 2, word % WORDS
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        first = block * BLOCK
        piece, place = first // PAGE, first % PAGE + tl.arange(0, BLOCK)
        token = tl.load(segments + piece) * PAGE + place
        known = (token >= SINKS)[:, None] & (head < HEADS)[None, :]
        row = (tl.load(starts + piece) + place)[:, None] * (HEADS * 2 * WORDS)
        codes = tl.load(rows + row + word[None, :], mask=known)
        cell = pool_cell(row_pages, token - SINKS, token >= SINKS, SINKS, PER_SLOT).to(tl.int64)
        target = (head.to(tl.int64) * head_stride + own_word)[None, :] + cell[:, None] * WORDS
        tl.store(keys + target, codes, mask=known & (half == 0)[None, :])
        tl.store(values + target, codes, mask=known & (half == 1)[None, :])


def fetch_rows(
    lanes: Tensor,
    num_missing: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    programs: int = FETCHING_PROGRAMS,
    block_rows: int = 16,
) -> None:
    """Bring the missing rows of one layer from host memory into cells of the pool.

    lanes: int64 [B, fields]; num_missing: int32 [B, S], as `find_rows` left them; S is 1 (one set for all
        heads) or H (one per head)
    rows: uint8 [index slots, H * D] in page-locked host memory: head by head, key codes and value codes; D is
        64 or 128
    keys, values: [H, slots, D], the pool of one layer, any float dtype, the slots of a head side by side
    programs: how many blocks of rows are in work at a time. More than the default are no faster: the bus is
        full. Where nothing is missing, they take the time of their starts.
    Twin: aquifer.server.engine.selective.RowCache, which copies the same bytes.
    """
    heads, _, head_dim = keys.shape
    requests, sets = num_missing.shape
    expect("lanes", lanes, (requests, FIELDS.value), torch.int64)
    expect("num_missing", num_missing, (None, None), torch.int32)
    _expect_rows(rows, keys, values)
    expect_power_of_two("block_rows", block_rows, 16, 128)
    if sets not in (1, heads):
        raise ValueError(f"{sets} sets of tokens for {heads} heads; needed: 1 or {heads}")
    key_words, value_words = keys.view(torch.int32), values.view(torch.int32)
    _fetch_rows[(programs,)](
        lanes,
        num_missing,
        rows.view(torch.int32),
        key_words,
        value_words,
        num_missing.numel(),
        key_words.stride(0),
        HEADS=heads,
        SETS=sets,
        MOST_SETS=triton.next_power_of_2(num_missing.numel()),
        WORDS=head_dim * CODE_BITS // 32,
        BLOCK=block_rows,
        num_warps=4,
    )


def load_rows(
    segments: Tensor,
    starts: Tensor,
    row_pages: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    sinks: int,
    programs: int | None = None,
    block_tokens: int = 16,
) -> None:
    """Bring the rows of whole segments of one layer into cells of the pool, every token's into its own.

    segments: int32 [N], of the request; starts: int64 [N], where their rows begin in `rows`. Those of sinks
        are not read.
    row_pages: int32, see LaneRow; every token behind the sinks has a cell in them
    rows: uint8 [slots, H * D], see `fetch_rows`, in page-locked host memory or on the device
    keys, values: see `fetch_rows`
    programs, block_tokens: how many share the work, and in which portions. By default, from host memory, so
        few that they fill the bus, but slow down by 6 % what runs beside them.
    Twin: `fetch_rows` of all tokens, in the order of their cells.
    """
    heads, _, head_dim = keys.shape
    expect("segments", segments, (None,), torch.int32)
    expect("starts", starts, (len(segments),), torch.int64)
    expect("row_pages", row_pages, (None,), torch.int32)
    _expect_rows(rows, keys, values)
    expect_power_of_two("block_tokens", block_tokens, 1, PAGE.value)
    blocks = len(segments) * PAGE.value // block_tokens
    key_words, value_words = keys.view(torch.int32), values.view(torch.int32)
    _load_rows[(min(programs or (ALL_PROGRAMS if rows.is_cuda else BUS_PROGRAMS), blocks),)](
        segments,
        starts,
        row_pages,
        rows.view(torch.int32),
        key_words,
        value_words,
        blocks,
        key_words.stride(0),
        HEADS=heads,
        MOST_HEADS=triton.next_power_of_2(heads),
        WORDS=head_dim * CODE_BITS // 32,
        SINKS=sinks,
        PER_SLOT=keys.element_size() * 8 // CODE_BITS,
        BLOCK=block_tokens,
        num_warps=16,
    )


def _expect_rows(rows: Tensor, keys: Tensor, values: Tensor) -> None:
    heads, _, head_dim = keys.shape
    expect("rows", rows, (None, heads * head_dim), torch.uint8)
    expect_pool(keys, values, heads, head_dim, FLOATS)
    expect_power_of_two("head_dim", head_dim, 64, 128)
    if not rows.is_contiguous():
        raise ValueError("rows are not contiguous")
    if keys.is_cuda and not (rows.is_cuda or rows.is_pinned()):
        raise ValueError("rows are in pageable memory, which the device cannot read; pin them")
