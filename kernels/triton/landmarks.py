"""Scoring tokens straight from packed 2-bit landmarks: decoded landmarks never exist in memory.

A byte of a landmark is one point of the 4-d grid, so its share of a score is one of 256 numbers per query
head. A first, small kernel rotates the queries and tabulates these numbers in 8 bits, those of four query
heads side by side in one word. A second one looks every byte up in shared memory and adds: one look-up serves
four query heads, no product is computed, and nothing is rearranged.

Every program takes every so many-th block of tokens of one KV head of one request: how many programs there
are does not depend on how long requests are.

Bytes moved, per layer and request: codes and scales once, H * T * (D/4 + 2), and 4 * Hq * T for the scores.
The limit are the look-ups, H * T * D/4 per four query heads of a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import FLOATS, expect, expect_power_of_two
from aquifer.kernels.triton.lanes import FIELDS, INDEX_PAGES, PAGE, SCORES, TOKENS, memory, number

PROGRAMS = 264
"""What the number of programs aims at: twice the multiprocessors of an H200."""

MAX_PARTS = 64
"""Programs per request and query head: whoever needs their log-sum-exp reads them at once."""

MIDDLE = tl.constexpr(128)
"""What 0 is in a table."""


@triton.jit
def _rotated(
    queries: tl.tensor,
    signs: tl.tensor,
    in_group: tl.tensor,
    axis: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EXACT: tl.constexpr,
) -> tl.tensor:
    """Coordinates axis, axis+4, ... of rotated queries, float32 [16, D/4]. queries: pointers [16, 1]."""
    channel = tl.arange(0, HEAD_DIM)
    place = 4 * tl.arange(0, HEAD_DIM // 4) + axis
    x = tl.load(queries + channel[None, :], mask=in_group, other=0.0).to(tl.float32)
    x = x * tl.load(signs + channel)[None, :]
    # These columns of the Hadamard matrix: see aquifer.kernels.triton.hadamard.sylvester.
    common = channel[:, None] & place[None, :]
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    columns = (1 - 2 * (common & 1)).to(tl.float32)
    if EXACT:
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        turned = tl.dot(x - high, columns, input_precision="tf32")
        return tl.dot(high, columns, turned, input_precision="tf32")
    return tl.dot(x, columns, input_precision="tf32")


@triton.jit
def _products(
    q0: tl.tensor, q1: tl.tensor, q2: tl.tensor, q3: tl.tensor, grid: tl.tensor, ROW: tl.constexpr
) -> tl.tensor:
    """float32 [D/4, 256]: every four coordinates of one query times every point."""
    own = (tl.arange(0, 16) == ROW)[:, None]
    point = grid + 4 * tl.arange(0, 256)[None, :]
    product = tl.sum(tl.where(own, q0, 0.0), 0)[:, None] * tl.load(point)
    product += tl.sum(tl.where(own, q1, 0.0), 0)[:, None] * tl.load(point + 1)
    product += tl.sum(tl.where(own, q2, 0.0), 0)[:, None] * tl.load(point + 2)
    return product + tl.sum(tl.where(own, q3, 0.0), 0)[:, None] * tl.load(point + 3)


@triton.jit
def _tabulate(
    queries: tl.tensor,
    signs: tl.tensor,
    grid: tl.tensor,
    lanes: tl.tensor,
    tables: tl.tensor,
    steps: tl.tensor,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """Four query heads of one KV head of one request. A step is the value of one in a table."""
    fourth, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if number(lanes, request, TOKENS) > 0:
        row = 4 * fourth + tl.arange(0, 16)  # tensor cores take 16 rows; only the first four are used
        query_heads = (request * tl.num_programs(1) + head) * GROUP
        query = queries + (query_heads + row)[:, None] * HEAD_DIM
        in_group = row[:, None] < GROUP
        q0 = _rotated(query, signs, in_group, 0, HEAD_DIM, EXACT)
        q1 = _rotated(query, signs, in_group, 1, HEAD_DIM, EXACT)
        q2 = _rotated(query, signs, in_group, 2, HEAD_DIM, EXACT)
        q3 = _rotated(query, signs, in_group, 3, HEAD_DIM, EXACT)
        place = tl.arange(0, HEAD_DIM // 4)[:, None] * 256 + tl.arange(0, 256)[None, :]
        word = tl.zeros([HEAD_DIM // 4, 256], dtype=tl.int32)
        for own in tl.static_range(4):
            product = _products(q0, q1, q2, q3, grid, own)
            step = tl.maximum(tl.max(tl.max(tl.abs(product), 1), 0), 1e-20) / (MIDDLE - 1)
            word |= (product / step + (MIDDLE + 0.5)).to(tl.int32) << (8 * own)
            if 4 * fourth + own < GROUP:
                tl.store(steps + query_heads + 4 * fourth + own, step * SCALE)
        table = (request * tl.num_programs(1) + head) * tl.num_programs(0) + fourth
        tl.store(tables + table * (HEAD_DIM * 64) + place, word)


@triton.jit
def _put(
    sums: tl.tensor,
    steps: tl.tensor,
    scale: tl.tensor,
    scores: tl.tensor,
    token: tl.tensor,
    valid: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Store the scores of one query head; returns its running maximum and sum of exponentials."""
    score = (sums - MIDDLE * (HEAD_DIM // 4)).to(tl.float32) * tl.load(steps) * scale
    score = tl.where(valid, score, float("-inf"))
    tl.store(scores + token, score, mask=valid)
    new_top = tl.maximum(top, tl.max(score, 0))
    return new_top, total * tl.exp(top - new_top) + tl.sum(tl.exp(score - new_top), 0)


@triton.jit
def _put_lse(partial_lse: tl.tensor, top: tl.tensor, total: tl.tensor) -> None:
    tl.store(partial_lse, tl.where(total == 0.0, float("-inf"), top + tl.log(tl.maximum(total, 1e-30))))


@triton.jit
def _score(
    tables: tl.tensor,
    steps: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    lanes: tl.tensor,
    partial_lse: tl.tensor,
    first: tl.tensor,
    code_stride: tl.tensor,
    scale_stride: tl.tensor,
    GROUP: tl.constexpr,
    FOURTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Four query heads of one KV head of one request."""
    part, request = tl.program_id(0), tl.program_id(2)
    head, fourth = tl.program_id(1) // FOURTHS, tl.program_id(1) % FOURTHS
    tokens = number(lanes, request, TOKENS)
    if tokens > 0:
        table = tl.load(
            tables
            + (request * tl.num_programs(1) + tl.program_id(1)) * (HEAD_DIM * 64)
            + tl.arange(0, HEAD_DIM * 64)
        )
        query_head = head * GROUP + 4 * fourth
        steps += request * (tl.num_programs(1) // FOURTHS) * GROUP + query_head
        pages = memory(lanes, request, INDEX_PAGES, tl.int32)
        scores = memory(lanes, request, SCORES, tl.float32) + query_head.to(tl.int64) * tokens
        byte = tl.arange(0, HEAD_DIM // 4)
        # The maxima are finite, so that they can be subtracted from themselves.
        top0, top1, top2, top3 = -1e30, -1e30, -1e30, -1e30
        total0, total1, total2, total3 = 0.0, 0.0, 0.0, 0.0
        for block in range(part, tl.cdiv(tokens, BLOCK), tl.num_programs(0)):
            token = block * BLOCK + tl.arange(0, BLOCK)
            valid = token < tokens
            slot = tl.load(pages + token // PAGE, mask=valid, other=0).to(tl.int64) * PAGE + token % PAGE
            code = codes + slot[:, None] * code_stride + head * (HEAD_DIM // 4) + byte[None, :]
            entry = tl.load(code).to(tl.int32) + 256 * byte[None, :]
            word = tl.gather(table, tl.reshape(entry, [BLOCK * (HEAD_DIM // 4)]), 0)
            word = tl.reshape(word, [BLOCK, HEAD_DIM // 4])
            # Two sums of 16 bits in each: at most 64 numbers of 8 bits.
            even, odd = tl.sum(word & 0x00FF00FF, 1), tl.sum((word >> 8) & 0x00FF00FF, 1)
            scale = tl.load(scales + slot * scale_stride + head).to(tl.float32)
            valid = valid & (token >= first)
            top0, total0 = _put(even & 0xFFFF, steps, scale, scores, token, valid, top0, total0, HEAD_DIM)
            if 4 * fourth + 1 < GROUP:
                top1, total1 = _put(
                    odd & 0xFFFF, steps + 1, scale, scores + tokens, token, valid, top1, total1, HEAD_DIM
                )
            if 4 * fourth + 2 < GROUP:
                top2, total2 = _put(
                    even >> 16, steps + 2, scale, scores + 2 * tokens, token, valid, top2, total2, HEAD_DIM
                )
            if 4 * fourth + 3 < GROUP:
                top3, total3 = _put(
                    odd >> 16, steps + 3, scale, scores + 3 * tokens, token, valid, top3, total3, HEAD_DIM
                )
        parts = tl.num_programs(0)
        lse = partial_lse + (request * (tl.num_programs(1) // FOURTHS) * GROUP + query_head) * parts + part
        _put_lse(lse, top0, total0)
        if 4 * fourth + 1 < GROUP:
            _put_lse(lse + parts, top1, total1)
        if 4 * fourth + 2 < GROUP:
            _put_lse(lse + 2 * parts, top2, total2)
        if 4 * fourth + 3 < GROUP:
            _put_lse(lse + 3 * parts, top3, total3)


def score_landmarks(
    queries: Tensor,
    signs: Tensor,
    codes: Tensor,
    scales: Tensor,
    grid: Tensor,
    lanes: Tensor,
    *,
    first: int = 0,
    block_tokens: int = 256,
    parts: int | None = None,
) -> Tensor:
    """Estimate the attention scores of one query token for each of many requests, in one layer.

    queries: float [B, Hq, D], not rotated; D is 64, 128 or 256
    signs: float32 [D], those of the landmarks' rotation
    codes: uint8 [slots, H*D/4]; scales: float16 [slots, H], one per token and head; rows may be strided
    grid: float32 [256, 4], of the landmarks
    lanes: int64 [B, fields]; what it says of scores is written: scaled by 1/sqrt(D), short of a constant per
        query head; the first tokens have none
    first: tokens at the start of every request that have no landmark (sinks)
    block_tokens: per turn of a program. The default is to be measured.
    parts: programs per request and KV head, at most 64; by default so many that the device is full
    Returns float32 [B, Hq, parts]: log-sum-exp of the scores, part by part; undefined where there is no
    request.
    Twin: aquifer.kernels.landmarks.score_landmarks; every four coordinates of a key contribute a number of
    8 bits here.
    """
    requests, num_q_heads, head_dim = queries.shape
    num_heads = scales.shape[1]
    expect("queries", queries, (None, None, None), FLOATS)
    expect("signs", signs, (head_dim,), torch.float32)
    expect("codes", codes, (len(scales), num_heads * head_dim // 4), torch.uint8)
    expect("scales", scales, (None, None), torch.float16)
    expect("grid", grid, (256, 4), torch.float32)
    expect("lanes", lanes, (requests, FIELDS.value), torch.int64)
    expect_power_of_two("head_dim", head_dim, 64, 256)
    expect_power_of_two("block_tokens", block_tokens, 32, 1024)
    if num_q_heads % num_heads:
        raise ValueError(f"{num_q_heads} query heads do not divide into groups of {num_heads} KV heads")
    group = num_q_heads // num_heads
    fourths = triton.cdiv(group, 4)
    parts = parts or max(1, min(MAX_PARTS, PROGRAMS // (requests * num_heads * fourths)))
    device = queries.device
    tables = torch.empty(requests, num_heads, fourths, head_dim * 64, dtype=torch.int32, device=device)
    steps = torch.empty(requests, num_q_heads, device=device)
    partial_lse = torch.empty(requests, num_q_heads, parts, device=device)
    _tabulate[(fourths, num_heads, requests)](
        queries.contiguous(),
        signs,
        grid,
        lanes,
        tables,
        steps,
        SCALE=1 / head_dim,  # of the scores and of the Hadamard matrix, sqrt(D) each
        GROUP=group,
        HEAD_DIM=head_dim,
        EXACT=queries.dtype == torch.float32,
        num_warps=8,
    )
    _score[(parts, num_heads * fourths, requests)](
        tables,
        steps,
        codes,
        scales,
        lanes,
        partial_lse,
        first,
        codes.stride(0),
        scales.stride(0),
        GROUP=group,
        FOURTHS=fourths,
        HEAD_DIM=head_dim,
        BLOCK=block_tokens,
        num_warps=8,
    )
    return partial_lse
