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

PROGRAMS = 1056
"""What the number of programs aims at: two at a time on each multiprocessor of an H200, four times over."""

MAX_PARTS = 32
"""Programs per request and query head: whoever needs their log-sum-exp reads them at once."""

MIDDLE = tl.constexpr(128)
"""What 0 is in a table."""

NOTHING = tl.constexpr(-1e30)
"""Score of a token that does not exist: finite, so that it can be subtracted from itself."""


SLICES = tl.constexpr(4)
"""Programs that write one table."""


@triton.jit
def _turned(x: tl.tensor, STAGES: tl.constexpr) -> tl.tensor:
    """x @ sylvester(2^STAGES), x: float32 [rows, 2^STAGES].

    Every stage adds and subtracts neighbours, and puts sums before differences."""
    rows: tl.constexpr = x.shape[0]
    size: tl.constexpr = x.shape[1]
    for _ in tl.static_range(STAGES):
        a, b = tl.split(tl.reshape(x, [rows, size // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [rows, size])
    return x


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
    FOURTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One slice of the table of four query heads of one KV head. A step is the value of one in a table."""
    part, request = tl.program_id(0), tl.program_id(2)
    head, fourth = tl.program_id(1) // FOURTHS, tl.program_id(1) % FOURTHS
    if number(lanes, request, TOKENS) > 0:
        member, channel = tl.arange(0, 4), tl.arange(0, HEAD_DIM)
        there = 4 * fourth + member < GROUP
        query_head = (request * (tl.num_programs(1) // FOURTHS) + head) * GROUP + 4 * fourth + member
        place = query_head[:, None] * HEAD_DIM + channel[None, :]
        x = tl.load(queries + place, mask=there[:, None], other=0.0).to(tl.float32)
        x = _turned(x * tl.load(signs + channel)[None, :], STAGES)
        even, odd = tl.split(tl.reshape(x, [4, HEAD_DIM // 4, 2, 2]))
        first, third = tl.split(even)
        second, last = tl.split(odd)
        points = grid + 4 * tl.arange(0, 256)[None, :]
        words = tl.zeros([HEAD_DIM // 4, 256], dtype=tl.int32)
        for own in range(4):
            product = _coordinates(first, own) * tl.load(points)
            product += _coordinates(second, own) * tl.load(points + 1)
            product += _coordinates(third, own) * tl.load(points + 2)
            product += _coordinates(last, own) * tl.load(points + 3)
            step = tl.maximum(tl.max(tl.max(tl.abs(product), 1), 0), 1e-20) / (MIDDLE - 1)
            tl.store(steps + query_head, tl.zeros_like(member) + step * SCALE, mask=there & (member == own))
            words |= (product / step + (MIDDLE + 0.5)).to(tl.int32) << (8 * own)
        byte = tl.arange(0, HEAD_DIM // 4)[:, None] + tl.zeros_like(words)
        at = (request * tl.num_programs(1) + tl.program_id(1)) * (HEAD_DIM * 64)
        entry = at + byte * 256 + tl.arange(0, 256)[None, :]
        tl.store(tables + entry, words, mask=byte // (HEAD_DIM // 4 // SLICES) == part)


@triton.jit
def _coordinates(x: tl.tensor, own: tl.tensor) -> tl.tensor:
    """float32 [D/4, 1]: one row of x [4, D/4]."""
    return tl.sum(tl.where(tl.arange(0, 4)[:, None] == own, x, 0.0), 0)[:, None]


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
        tables += (request * tl.num_programs(1) + tl.program_id(1)) * (HEAD_DIM * 64)
        table = tl.load(tables + tl.arange(0, HEAD_DIM * 64))
        # In the order in which the four sums come out of two words.
        row = tl.arange(0, 4)
        in_group = 4 * fourth + 2 * (row % 2) + row // 2
        there = in_group < GROUP
        query_head = (request * (tl.num_programs(1) // FOURTHS) + head) * GROUP + in_group
        step = tl.load(steps + query_head, mask=there, other=0.0)
        pages = memory(lanes, request, INDEX_PAGES, tl.int32)
        scores = memory(lanes, request, SCORES, tl.float32)
        row_at = (head * GROUP + in_group).to(tl.int64) * tokens
        byte = tl.arange(0, HEAD_DIM // 4)
        # Maxima and sums of exponentials token by token: they are joined once, at the end.
        top = tl.full([BLOCK, 4], NOTHING, dtype=tl.float32)
        total = tl.zeros([BLOCK, 4], dtype=tl.float32)
        for block in range(part, tokens // BLOCK, tl.num_programs(0)):
            token = block * BLOCK + tl.arange(0, BLOCK)
            slot = tl.load(pages + block * BLOCK // PAGE).to(tl.int64) * PAGE + token % PAGE
            code = codes + slot[:, None] * code_stride + head * (HEAD_DIM // 4) + byte[None, :]
            place = tl.load(code).to(tl.int32) + 256 * byte[None, :]
            word = tl.gather(table, tl.reshape(place, [BLOCK * (HEAD_DIM // 4)]), 0)
            word = tl.reshape(word, [BLOCK, HEAD_DIM // 4])
            # Two sums of 16 bits in each: at most 64 numbers of 8 bits.
            even, odd = tl.sum(word & 0x00FF00FF, 1), tl.sum((word >> 8) & 0x00FF00FF, 1)
            sums = tl.join(tl.join(even & 0xFFFF, odd & 0xFFFF), tl.join(even >> 16, odd >> 16))
            sums = tl.reshape(sums, [BLOCK, 4]) - MIDDLE * (HEAD_DIM // 4)
            scale = tl.load(scales + slot * scale_stride + head).to(tl.float32)
            score = sums.to(tl.float32) * scale[:, None] * step[None, :]
            tl.store(scores + row_at[None, :] + token[:, None], score, mask=there[None, :])
            score = tl.where(token[:, None] >= first, score, NOTHING)
            # Of score and top one is the new maximum, so one exponential is enough.
            above = score > top
            share = tl.exp(-tl.abs(score - top))
            total = tl.where(above, total * share + 1.0, total + share)
            top = tl.where(above, score, top)
        whole = tl.max(top, 0)
        lse = whole + tl.log(tl.sum(total * tl.exp(top - whole[None, :]), 0))
        tl.store(partial_lse + query_head * tl.num_programs(0) + part, lse, mask=there)


def score_landmarks(
    queries: Tensor,
    signs: Tensor,
    codes: Tensor,
    scales: Tensor,
    grid: Tensor,
    lanes: Tensor,
    *,
    first: int = 0,
    block_tokens: int = PAGE.value,
    parts: int | None = None,
) -> Tensor:
    """Estimate the attention scores of one query token for each of many requests, in one layer.

    queries: float [B, Hq, D], not rotated; D is 64, 128 or 256
    signs: float32 [D], those of the landmarks' rotation
    codes: uint8 [slots, H*D/4]; scales: float16 [slots, H], one per token and head; rows may be strided
    grid: float32 [256, 4], of the landmarks
    lanes: int64 [B, fields]; what it says of scores is written: scaled by 1/sqrt(D), short of a constant per
        query head; what it says of the first tokens means nothing
    first: tokens at the start of every request that have no landmark (sinks)
    block_tokens: per turn of a program, a divisor of 256
    parts: programs per request and KV head, at most 32; by default so many that the device is full
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
    expect_power_of_two("block_tokens", block_tokens, 32, PAGE.value)
    if num_q_heads % num_heads:
        raise ValueError(f"{num_q_heads} query heads do not divide into groups of {num_heads} KV heads")
    group = num_q_heads // num_heads
    fourths = triton.cdiv(group, 4)
    parts = parts or max(1, min(MAX_PARTS, PROGRAMS // (requests * num_heads * fourths)))
    device = queries.device
    tables = torch.empty(requests, num_heads, fourths, head_dim * 64, dtype=torch.int32, device=device)
    steps = torch.empty(requests, num_q_heads, device=device)
    partial_lse = torch.empty(requests, num_q_heads, parts, device=device)
    _tabulate[(SLICES.value, num_heads * fourths, requests)](
        queries.contiguous(),
        signs,
        grid,
        lanes,
        tables,
        steps,
        SCALE=1 / head_dim,  # of the scores and of the Hadamard matrix, sqrt(D) each
        GROUP=group,
        FOURTHS=fourths,
        HEAD_DIM=head_dim,
        STAGES=head_dim.bit_length() - 1,
        num_warps=4,
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
