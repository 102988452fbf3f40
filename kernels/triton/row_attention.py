"""Attention of selective decoding: one new token of each request, over sinks, chosen tokens and the tail.

Rows of the chosen tokens are read as they were packed, 4 bits per value, and decoded in registers. Keys and
values are turned by the same orthonormal matrix (see hadamard.py), so the query is turned to meet the keys,
and the sum of values is turned back: once per program, not once per row. Sinks and tail lie in the pool as
they are. Blocks of both kinds are dealt out to the programs of a head in turn; a second kernel joins their
parts.

Bytes moved per request: 132 bytes per chosen token and KV head of 128 channels, the KV of sinks and tail, and
for every split 4 * Hq * (D + 1) bytes written and read again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.attention import LN_2, MAX_SPLITS, join_splits, keep_split, weigh
from aquifer.kernels.triton.checks import FLOATS, expect, expect_pool, expect_power_of_two
from aquifer.kernels.triton.hadamard import LEAST, turn_group
from aquifer.kernels.triton.lanes import (
    CELLS,
    CHOSEN,
    FIELDS,
    INDEX_PAGES,
    PAGE,
    ROW_CELLS,
    ROW_PAGES,
    TAIL,
    TAIL_PAGES,
    WANTED,
    memory,
    number,
    pool_cell,
)

PROGRAMS = 1056
"""What the number of splits aims at: eight per multiprocessor of an H200."""

SCALES_BYTES = 4
"""Of a row: two float16, of a key and of its value, in one word."""

CODES = tl.constexpr(256)
"""Points of the grid of two values."""


@triton.jit
def _table(grid: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """The points of the grid, both coordinates in one word: what is looked up costs by the look-up."""
    bits: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    word: tl.constexpr = tl.int32 if dtype.primitive_bitwidth == 16 else tl.int64
    code = tl.arange(0, CODES)
    first = tl.load(grid + 2 * code).to(dtype).to(bits, bitcast=True).to(word)
    second = tl.load(grid + 2 * code + 1).to(dtype).to(bits, bitcast=True).to(word)
    return second << dtype.primitive_bitwidth | first & (1 << dtype.primitive_bitwidth) - 1


@triton.jit
def _points(table: tl.tensor, codes: tl.tensor, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """First and second coordinates of the points that codes [BLOCK, N] stand for."""
    bits: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    flat: tl.constexpr = codes.shape[0] * codes.shape[1]
    both = tl.reshape(tl.gather(table, tl.reshape(codes, [flat]), 0), codes.shape)
    first = both.to(bits).to(dtype, bitcast=True)
    return first, (both >> dtype.primitive_bitwidth).to(bits).to(dtype, bitcast=True)


@triton.jit
def _attend_rows(
    queries: tl.tensor,
    signs: tl.tensor,
    means: tl.tensor,
    grid: tl.tensor,
    lanes: tl.tensor,
    scales: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    head_stride: tl.tensor,
    SCORE_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LEFT: tl.constexpr,
    SHARED: tl.constexpr,
    SINKS: tl.constexpr,
    PER_SLOT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Some blocks of one KV head of one request. Scores are in powers of two, which exp2 wants."""
    split, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, heads = tl.num_programs(0), tl.num_programs(1)
    row, channel, half = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM), tl.arange(0, HEAD_DIM // 2)
    exists = row < GROUP
    query_head = (request * heads + head) * GROUP + row
    q = tl.load(queries + query_head[:, None] * HEAD_DIM + channel[None, :], mask=exists[:, None], other=0.0)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)

    # Sinks and tail, as they are.
    tail = number(lanes, request, TAIL)
    near = tl.where(tail > 0, SINKS + tail, 0)
    near_blocks = tl.cdiv(near, BLOCK)
    out = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    keys += head.to(tl.int64) * head_stride
    values += head.to(tl.int64) * head_stride
    row_pages = memory(lanes, request, ROW_PAGES, tl.int32)
    tail_pages = memory(lanes, request, TAIL_PAGES, tl.int32)
    for block in range(split, near_blocks, splits):
        place = block * BLOCK + tl.arange(0, BLOCK)
        valid, token = place < near, place - SINKS
        page = tl.load(tl.where(token < 0, row_pages, tail_pages + token // PAGE), mask=valid, other=0)
        slot = page.to(tl.int64) * PAGE + tl.where(token < 0, place, token % PAGE)
        at = slot[:, None] * HEAD_DIM + channel[None, :]
        k = tl.load(keys + at, mask=valid[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * SCORE_SCALE
        score = tl.where(valid[None, :], score, float("-inf"))
        weight, kept, top, total = weigh(score, top, total)
        v = tl.load(values + at, mask=valid[:, None], other=0.0)
        out = out * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")

    # Chosen tokens, as they were packed: first and second coordinates of the grid's points apart.
    count = number(lanes, request, WANTED)
    row_blocks = tl.cdiv(count, BLOCK)
    turned_first = tl.zeros([ROWS, HEAD_DIM // 2], dtype=tl.float32)
    turned_second = tl.zeros([ROWS, HEAD_DIM // 2], dtype=tl.float32)
    first = split + tl.cdiv(tl.maximum(near_blocks - split, 0), splits) * splits
    if first < near_blocks + row_blocks:
        table = _table(grid, q.dtype)
        sign = tl.load(signs + channel)[None, :] * HEAD_DIM**-0.5
        turned = turn_group(q.to(tl.float32) * sign, LEFT, HEAD_DIM // LEFT, EXACT).to(q.dtype)
        q_first, q_second = tl.split(tl.reshape(turned, [ROWS, HEAD_DIM // 2, 2]))
        # What the mean, which was taken out of every key, adds to every score.
        shift = tl.sum(q.to(tl.float32) * tl.load(means + head * HEAD_DIM + channel)[None, :], axis=1)
        own_set = 0 if SHARED else head
        chosen = memory(lanes, request, CHOSEN, tl.int32) + own_set * count
        cells = memory(lanes, request, ROW_CELLS, tl.int32) + own_set * count
        turns = number(lanes, request, CELLS) > 0
        index_pages = memory(lanes, request, INDEX_PAGES, tl.int32)
        key_codes, value_codes = keys.to(tl.pointer_type(tl.uint8)), values.to(tl.pointer_type(tl.uint8))
        for block in range(first - near_blocks, row_blocks, splits):
            place = block * BLOCK + tl.arange(0, BLOCK)
            valid = place < count
            token = tl.load(chosen + place, mask=valid, other=0)
            listed = tl.load(cells + place, mask=valid & turns, other=0)
            own = pool_cell(row_pages, token - SINKS, valid & (turns == 0), SINKS, PER_SLOT)
            cell = tl.where(turns, listed, own).to(tl.int64)
            index_slot = tl.load(index_pages + token // PAGE).to(tl.int64) * PAGE + token % PAGE
            both = tl.load(scales + index_slot * heads + head, mask=valid, other=0)
            key_scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            value_scale = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            at = cell[:, None] * (HEAD_DIM // 2) + half[None, :]
            codes = tl.load(key_codes + at, mask=valid[:, None], other=0).to(tl.int32)
            k_first, k_second = _points(table, codes, q.dtype)
            score = tl.dot(q_first, tl.trans(k_first), input_precision="ieee")
            score = tl.dot(q_second, tl.trans(k_second), score, input_precision="ieee")
            score = (score * key_scale[None, :] + shift[:, None]) * SCORE_SCALE
            score = tl.where(valid[None, :], score, float("-inf"))
            weight, kept, top, total = weigh(score, top, total)
            weight = (weight * value_scale[None, :]).to(q.dtype)
            codes = tl.load(value_codes + at, mask=valid[:, None], other=0).to(tl.int32)
            v_first, v_second = _points(table, codes, q.dtype)
            out *= kept[:, None]
            turned_first = tl.dot(weight, v_first, turned_first * kept[:, None], input_precision="ieee")
            turned_second = tl.dot(weight, v_second, turned_second * kept[:, None], input_precision="ieee")
        turned = tl.reshape(tl.join(turned_first, turned_second), [ROWS, HEAD_DIM])
        out += turn_group(turned, LEFT, HEAD_DIM // LEFT, EXACT) * sign

    keep_split(partial_out, partial_lse, query_head, exists, out, top, total, HEAD_DIM)


@triton.jit
def _join_rows(
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    out: tl.tensor,
    splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """All splits of one query head."""
    query_head, there = tl.program_id(0), tl.arange(0, SPLITS) < splits
    joined, _ = join_splits(partial_out, partial_lse, query_head, splits, there, HEAD_DIM)
    tl.store(out + query_head * HEAD_DIM + tl.arange(0, HEAD_DIM), joined)


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: Tensor,
    grid: Tensor,
    signs: Tensor,
    means: Tensor,
    lanes: Tensor,
    *,
    sets: int,
    sinks: int,
    block_tokens: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of one query token of each of many requests to its sinks, chosen tokens and tail; one layer.

    q: [B, Hq, D], not rotated; D is 64 or 128
    keys, values: [H, slots, D], the pool of one layer, in q's dtype, the slots of a head side by side. Packed
        rows lie in it as `fetch_rows` left them.
    scales: uint8 [index slots, H * 4] on the device: head by head, two float16 (see IndexPool)
    grid: float32 [256, 2], of the rows; signs: float32 [D]; means: float32 [H, D], of the keys of this layer
    lanes: int64 [B, fields]; reads chosen and row_cells
    sets: S, 1 (one set of chosen tokens for all heads) or H (one per head)
    sinks: how many there are, at the start of the first row page
    block_tokens: tokens per turn of a program; by default as many as the registers hold
    splits: programs per request and KV head, at most 64; by default so many that the device is full
    Returns [B, Hq, D] in q's dtype; 0 where there is no request. Scores are scaled by 1/sqrt(D).
    Twin: aquifer.server.engine.selective.SelectiveCache, by `decode_rows` and `attend`.
    """
    requests, num_q_heads, head_dim = q.shape
    heads = len(keys)
    expect("q", q, (None, None, None), FLOATS)
    expect_pool(keys, values, None, head_dim, q.dtype)
    expect("scales", scales, (None, heads * SCALES_BYTES), torch.uint8)
    expect("grid", grid, (CODES.value, 2), torch.float32)
    expect("signs", signs, (head_dim,), torch.float32)
    expect("means", means, (heads, head_dim), torch.float32)
    expect("lanes", lanes, (requests, FIELDS.value), torch.int64)
    expect_power_of_two("head_dim", head_dim, 64, 128)
    if num_q_heads % heads:
        raise ValueError(f"{num_q_heads} query heads do not divide into groups of {heads} KV heads")
    if sets not in (1, heads):
        raise ValueError(f"{sets} sets of tokens for {heads} heads; needed: 1 or {heads}")
    if not scales.is_contiguous():
        raise ValueError("scales are not contiguous")
    exact = q.dtype == torch.float32
    block_tokens = block_tokens or (16 if exact else 128)
    expect_power_of_two("block_tokens", block_tokens, 16, 128)
    group = num_q_heads // heads
    splits = splits or max(1, min(MAX_SPLITS, PROGRAMS // (requests * heads)))
    partial_out = torch.empty(requests, num_q_heads, splits, head_dim, device=q.device)
    partial_lse = torch.empty(requests, num_q_heads, splits, device=q.device)
    _attend_rows[(splits, heads, requests)](
        q.contiguous(),
        signs,
        means,
        grid,
        lanes,
        scales.view(torch.int32),
        keys,
        values,
        partial_out,
        partial_lse,
        keys.stride(0),
        SCORE_SCALE=head_dim**-0.5 / LN_2.value,
        GROUP=group,
        ROWS=max(LEAST, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        LEFT=head_dim // LEAST,
        SHARED=sets == 1,
        SINKS=sinks,
        PER_SLOT=2 * q.element_size(),  # codes have 4 bits
        EXACT=exact,
        BLOCK=block_tokens,
        num_warps=8 if exact else 4,
    )
    out = torch.empty_like(q)
    _join_rows[(requests * num_q_heads,)](
        partial_out,
        partial_lse,
        out,
        splits,
        HEAD_DIM=head_dim,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=4,
    )
    return out
