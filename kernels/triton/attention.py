"""Attention of few new tokens over pages, split along the cache so that a single long request fills the
device; and the merge of attention over pieces.

One program attends some tokens' query heads of one KV head to one split of one request; a second, small
kernel joins the splits by the rule of `merge_attention`. The log-sum-exp comes out as well, so that the
result can be merged with attention over what lies elsewhere, such as segments that are streamed.

Bytes moved: K and V of every token once, 2 * H * T * D elements per request (from the L2 cache once for every
tile of query tokens), and for every split 4 * Hq * (D + 1) bytes per query token written and read again.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.attention import PAGE_TOKENS
from aquifer.kernels.triton.checks import FLOATS, expect, expect_pool, expect_power_of_two

PROGRAMS = 8192
"""What the default number of splits aims at: many times what a device runs at once, so that one long request
among short ones is spread over it, too. On an H200, 131,072 tokens beside 15 x 1,024 take 147 us with 64
splits and 421 with 8; where all are alike it makes no difference."""

TILE_PROGRAMS = 132
"""The same where a request has several query tokens: one for each multiprocessor, which a tile keeps busy."""

TILE_ROWS, TILE_ELEMENTS = 128, 1 << 14
"""Of queries that one program attends at once. More would spill registers; in float32 more than one token."""

BLOCK_BYTES = 1 << 14
"""Of keys that a program multiplies at once; twice as many for a full tile. More spills registers."""

MAX_SPLITS = 64
"""More would not fit into the registers of the program that merges them."""


LN_2 = tl.constexpr(0.6931471805599453)

_LEAST_TOKENS = tl.constexpr(128)
"""Of a split: in shorter ones, a program's start and the merge would cost more than the tokens."""


@triton.jit
def _blocks_per_split(blocks: tl.tensor, num_splits: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Splits that this leaves without blocks write nothing and are not merged."""
    return tl.maximum(tl.cdiv(blocks, num_splits), _LEAST_TOKENS // BLOCK)


@triton.jit
def _attend_split(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_tables: tl.tensor,
    lengths: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    count: tl.tensor,
    table_stride: tl.tensor,
    head_stride: tl.tensor,
    SCORE_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One split for one KV head and a tile of a request's `count` query tokens. Scores are in powers of two,
    which exp2 wants."""
    split, head = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(count, TOKENS)
    request, first_query = tl.program_id(2) // tiles, tl.program_id(2) % tiles * TOKENS
    row, channel = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    query = first_query + row // GROUP
    exists = (row < TOKENS * GROUP) & (query < count)
    length = tl.load(lengths + request * count + query, mask=exists, other=0)
    longest = tl.max(length, axis=0)
    blocks = tl.cdiv(longest, BLOCK)
    per_split = _blocks_per_split(blocks, tl.num_programs(0), BLOCK)
    first, last = split * per_split, tl.minimum(blocks, (split + 1) * per_split)
    if first >= last:
        return

    query_head = ((request * count + query) * tl.num_programs(1) + head) * GROUP + row % GROUP
    q = tl.load(queries + query_head[:, None] * HEAD_DIM + channel[None, :], mask=exists[:, None], other=0.0)
    keys += head.to(tl.int64) * head_stride
    values += head.to(tl.int64) * head_stride
    block_tables += request * table_stride

    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    out = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    for block in range(first, last):
        start = block * BLOCK
        token = start + tl.arange(0, BLOCK)
        valid = token < longest
        page = tl.load(block_tables + start // PAGE).to(tl.int64)  # a block lies in one page
        place = (page * PAGE + token % PAGE)[:, None] * HEAD_DIM + channel[None, :]
        k = tl.load(keys + place, mask=valid[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * SCORE_SCALE
        score = tl.where(token[None, :] < length[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        # A row whose query sees nothing yet weighs nothing, and stays free of infinity minus infinity.
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(score - finite_top[:, None])
        kept = tl.exp2(top - finite_top)
        total = total * kept + tl.sum(weight, axis=1)
        v = tl.load(values + place, mask=valid[:, None], other=0.0)
        out = out * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        top = new_top

    keep_split(partial_out, partial_lse, query_head, exists, out, top, total, HEAD_DIM)


@triton.jit
def weigh(
    score: tl.tensor, top: tl.tensor, total: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The next block of a softmax. score: [ROWS, BLOCK], in powers of two; a row that is all -inf needs a
    finite maximum from before. Returns the weights, what is kept of the sums so far, the new maxima and the
    new sums of weights."""
    new_top = tl.maximum(top, tl.max(score, axis=1))
    weight = tl.exp2(score - new_top[:, None])
    kept = tl.exp2(top - new_top)
    return weight, kept, new_top, total * kept + tl.sum(weight, axis=1)


@triton.jit
def keep_split(
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    query_head: tl.tensor,
    exists: tl.tensor,
    out: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    HEAD_DIM: tl.constexpr,
) -> None:
    """Store what one split, the first number of a program, found for some query heads, as `join_splits` reads
    it. out: [ROWS, D], sums of values; top, total: [ROWS], maxima of the scores in powers of two, and sums of
    the weights beside these."""
    partial = query_head.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    total = tl.where(top == float("-inf"), 1.0, total)
    tl.store(partial_lse + partial, top + tl.log2(total), mask=exists)
    place = partial[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(partial_out + place, out / total[:, None], mask=exists[:, None])


@triton.jit
def join_splits(
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    query_head: tl.tensor,
    num_splits: tl.tensor,
    there: tl.tensor,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Attention of one query head from that of its splits: out [D] and log-sum-exp, to the base of two as
    those of the splits are; 0 and -inf without any. there: bool [splits, or more]."""
    split, channel = tl.arange(0, there.shape[0]), tl.arange(0, HEAD_DIM)
    partial = query_head.to(tl.int64) * num_splits + split
    each_lse = tl.load(partial_lse + partial, mask=there, other=float("-inf"))
    top = tl.max(each_lse, axis=0)
    weight = tl.exp2(each_lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, axis=0)
    total = tl.where(total == 0.0, 1.0, total)
    each_out = tl.load(
        partial_out + partial[:, None] * HEAD_DIM + channel[None, :], mask=there[:, None], other=0.0
    )
    return tl.sum(each_out * weight[:, None], axis=0) / total, top + tl.log2(total)


@triton.jit
def _merge_splits(
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    num_splits: tl.tensor,
    query_heads: tl.tensor,
    count: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """All splits of one head of one query token, whose tile was split by its longest."""
    query_head = tl.program_id(0)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    request, query = query_head // query_heads // count, query_head // query_heads % count
    tile = query // TOKENS * TOKENS + tl.arange(0, TOKENS)
    longest = tl.max(tl.load(lengths + request * count + tile, mask=tile < count, other=0), axis=0)
    blocks = tl.cdiv(longest, BLOCK)
    there = split < tl.cdiv(blocks, _blocks_per_split(blocks, num_splits, BLOCK))
    merged, merged_lse = join_splits(partial_out, partial_lse, query_head, num_splits, there, HEAD_DIM)
    tl.store(out + query_head * HEAD_DIM + channel, merged)
    tl.store(lse + query_head, merged_lse * LN_2)


def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    splits: int | None = None,
    block_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one or some query tokens of each of many requests to its cache, in one layer.

    q: [B * R, Hq, D], R query tokens of each request side by side; D is a power of two from 16 to 256
    keys, values: [H, slots, D], the pool of one layer, in q's dtype, the slots of a head side by side
    block_tables: int32 [B, pages], the pages of each request in order
    lengths: int32 [B * R], the first tokens of its request that a query token attends to; may be 0
    splits: programs per tile of query tokens and KV head; at most 64; by default as many as fill the device
    block_tokens: tokens per product of matrices; by default as many as the registers hold, at most 128
    Returns (out [B * R, Hq, D] in q's dtype, lse float32 [B * R, Hq]); 0 and -inf for a query without tokens.
    Scores are scaled by 1/sqrt(D).
    Twin: aquifer.kernels.attention.attend_pages.
    """
    queries, num_q_heads, head_dim = q.shape
    requests, num_heads = len(block_tables), len(keys)
    expect("q", q, (None, None, None), FLOATS)
    expect_pool(keys, values, None, head_dim, q.dtype)
    expect("block_tables", block_tables, (requests, None), torch.int32)
    expect("lengths", lengths, (queries,), torch.int32)
    expect_power_of_two("head_dim", head_dim, 16, 256)
    if queries % requests:
        raise ValueError(f"{queries} query tokens do not divide into {requests} requests")
    if num_q_heads % num_heads:
        raise ValueError(f"{num_q_heads} query heads do not divide into groups of {num_heads} KV heads")
    count, group = queries // requests, num_q_heads // num_heads
    most = max(1, min(TILE_ROWS, TILE_ELEMENTS // head_dim) // group) if q.element_size() == 2 else 1
    tile = min(triton.next_power_of_2(count), 1 << most.bit_length() - 1)
    tiles = requests * triton.cdiv(count, tile)
    rows = max(16, triton.next_power_of_2(tile * group))  # tensor cores take 16
    if block_tokens is None:
        block_tokens = max(16, min(64, BLOCK_BYTES // (head_dim * q.element_size())))
        block_tokens *= 2 if rows >= TILE_ROWS and tile > 1 else 1
    expect_power_of_two("block_tokens", block_tokens, 16, PAGE_TOKENS)
    blocks = block_tables.shape[1] * PAGE_TOKENS // block_tokens
    if splits is None:
        splits = (PROGRAMS if tile == 1 else TILE_PROGRAMS) // (tiles * num_heads)
    splits = max(1, min(splits, blocks, MAX_SPLITS))
    partial_out = torch.empty(queries, num_q_heads, splits, head_dim, device=q.device)
    partial_lse = torch.empty(queries, num_q_heads, splits, device=q.device)
    _attend_split[(splits, num_heads, tiles)](
        q.contiguous(),
        keys,
        values,
        block_tables,
        lengths,
        partial_out,
        partial_lse,
        count,
        block_tables.stride(0),
        keys.stride(0),
        SCORE_SCALE=head_dim**-0.5 / LN_2.value,
        GROUP=group,
        TOKENS=tile,
        ROWS=rows,
        HEAD_DIM=head_dim,
        PAGE=PAGE_TOKENS,
        BLOCK=block_tokens,
        # More rows, or float32 in heads of 64 and more, spill registers with four.
        num_warps=4 if rows <= 64 and (q.element_size() == 2 or head_dim < 64) else 8,
        num_stages=3,
    )
    out = torch.empty(queries, num_q_heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(queries, num_q_heads, device=q.device)
    _merge_splits[(queries * num_q_heads,)](
        partial_out,
        partial_lse,
        lengths,
        out,
        lse,
        splits,
        num_q_heads,
        count,
        HEAD_DIM=head_dim,
        BLOCK=block_tokens,
        SPLITS=triton.next_power_of_2(splits),
        TOKENS=tile,
        num_warps=2 if head_dim <= 128 else 4,
    )
    return out, lse


MAX_PARTS = 8
"""That one program of `merge_parts` reads; more are merged in rounds."""


@triton.jit
def _merge_parts(
    outs: tl.tuple,
    lses: tl.tuple,
    merged: tl.tensor,
    merged_lse: tl.tensor,
    rows: tl.tensor,
    lse_strides: tl.tuple,
    strides: tl.tuple,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Some rows of one head."""
    head = tl.program_id(1).to(tl.int64)
    row, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    exists = row < rows
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        lse = tl.load(lses[part] + head * lse_strides[part] + row, mask=exists, other=float("-inf"))
        top = tl.maximum(top, lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    out = tl.zeros([BLOCK, HEAD_DIM], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        lse = tl.load(lses[part] + head * lse_strides[part] + row, mask=exists, other=float("-inf"))
        weight = tl.exp(lse - top)
        total += weight
        place = (
            head * strides[2 * part] + row[:, None].to(tl.int64) * strides[2 * part + 1] + channel[None, :]
        )
        out += tl.load(outs[part] + place, mask=exists[:, None], other=0.0).to(tl.float32) * weight[:, None]
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    place = (row[:, None].to(tl.int64) * tl.num_programs(1) + head) * HEAD_DIM + channel[None, :]
    tl.store(merged + place, out / total[:, None], mask=exists[:, None])
    lse = tl.where(empty, float("-inf"), top + tl.log(total))
    tl.store(merged_lse + head * rows + row, lse, mask=exists)


def merge_parts(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join the attention of disjoint pieces of one cache.

    parts: (out [Hq, R, D], lse [Hq, R] float32) of each, the last dimension contiguous, any other strides of
        out; D is a power of two
    Returns (out [Hq, R, D], with the heads of a row side by side, lse [Hq, R]).
    Twin: aquifer.kernels.attention.merge_attention.
    """
    while len(parts) > MAX_PARTS:
        parts = [merge_parts(parts[:MAX_PARTS]), *parts[MAX_PARTS:]]
    heads, rows, head_dim = parts[0][0].shape
    dtype, device = parts[0][0].dtype, parts[0][0].device
    expect_power_of_two("head_dim", head_dim, 16, 256)
    for out, lse in parts:
        expect("out", out, (heads, rows, head_dim), dtype)
        expect("lse", lse, (heads, rows), torch.float32)
    merged = torch.empty(rows, heads, head_dim, dtype=dtype, device=device)
    merged_lse = torch.empty(heads, rows, device=device)
    block = 16
    _merge_parts[(triton.cdiv(rows, block), heads)](
        tuple(out for out, _ in parts),
        tuple(lse for _, lse in parts),
        merged,
        merged_lse,
        rows,
        tuple(lse.stride(0) for _, lse in parts),
        tuple(stride for out, _ in parts for stride in out.stride()[:2]),
        PARTS=len(parts),
        HEAD_DIM=head_dim,
        BLOCK=block,
        num_warps=4,
    )
    return merged.transpose(0, 1), merged_lse
