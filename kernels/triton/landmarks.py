"""Scoring tokens straight from packed 2-bit landmarks: decoded landmarks never exist in memory.

A first, small kernel rotates the queries and rounds them to two bytes per channel, and the points of the grid
to one. A second one multiplies them as whole numbers: on a device `score_pages` (landmark_scores.py), under
Triton's interpreter, which runs neither Gluon nor assembly, a plain twin of it.

Every program takes every so many-th page of one KV head of one request: how many programs there are does not
depend on how long requests are.

Bytes moved, per layer and request: see landmark_scores.py; the first kernel moves 6 * Hq * D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import FLOATS, expect, expect_power_of_two
from aquifer.kernels.triton.landmark_scores import FINE, NOTHING, WARPS, score_pages
from aquifer.kernels.triton.lanes import FIELDS, INDEX_PAGES, PAGE, SCORES, TOKENS, memory, number

PROGRAMS = 2112
"""What the number of programs aims at: four at a time on each multiprocessor of an H200, four times over."""

MAX_PARTS = 32
"""Programs per request and query head: whoever needs their log-sum-exp reads them at once."""


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
def _prepare(
    queries: tl.tensor,
    signs: tl.tensor,
    grid: tl.tensor,
    lanes: tl.tensor,
    coarse_fine: tl.tensor,
    steps: tl.tensor,
    words: tl.tensor,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    FOURTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Rotate and round four query heads of one KV head; one program rounds the grid, too. There are
    (H * FOURTHS, requests) programs.

    coarse_fine: int8 [B, H * FOURTHS, 8, D], rows 2i and 2i+1 of query head i; zeros where there is none
    steps: float32 [B, Hq], what one of all that is multiplied and added is worth in a score
    words: int32 [256], points in four int8
    """
    own, request = tl.program_id(0), tl.program_id(1)
    head, fourth = own // FOURTHS, own % FOURTHS
    points = tl.load(grid + tl.arange(0, 256)[:, None] * 4 + tl.arange(0, 4)[None, :])
    unit = tl.max(tl.max(tl.abs(points), 1), 0) / 127
    if (own == 0) & (request == 0):
        byte = (tl.floor(points / unit + 0.5).to(tl.int32) & 255) << (8 * tl.arange(0, 4)[None, :])
        tl.store(words + tl.arange(0, 256), tl.sum(byte, 1))
    if number(lanes, request, TOKENS) > 0:
        member, channel = tl.arange(0, 4), tl.arange(0, HEAD_DIM)
        there = 4 * fourth + member < GROUP
        query_head = (request * (tl.num_programs(0) // FOURTHS) + head) * GROUP + 4 * fourth + member
        place = query_head[:, None] * HEAD_DIM + channel[None, :]
        x = tl.load(queries + place, mask=there[:, None], other=0.0).to(tl.float32)
        x = _turned(x * tl.load(signs + channel)[None, :], STAGES)
        step = tl.maximum(tl.max(tl.abs(x), 1), 1e-20) / 127
        x = x / step[:, None]
        coarse = tl.floor(x + 0.5)
        fine = tl.floor((x - coarse) * FINE + 0.5)
        row = (request * tl.num_programs(0) + own) * 8 + 2 * member
        at = row[:, None] * HEAD_DIM + channel[None, :]
        tl.store(coarse_fine + at, coarse.to(tl.int8))
        tl.store(coarse_fine + at + HEAD_DIM, fine.to(tl.int8))
        tl.store(steps + query_head, step * (unit * SCALE / FINE), mask=there)


@triton.jit
def _score(
    coarse_fine: tl.tensor,
    steps: tl.tensor,
    words: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    lanes: tl.tensor,
    partial_lse: tl.tensor,
    first: tl.tensor,
    CODE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    FOURTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> None:
    """Twin of `score_pages`, up to the rounding of sums."""
    own, part, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    owns, parts = tl.num_programs(0), tl.num_programs(1)
    head, fourth = own // FOURTHS, own % FOURTHS
    tokens = number(lanes, request, TOKENS)
    if tokens > 0:
        pages = memory(lanes, request, INDEX_PAGES, tl.int32)
        scores = memory(lanes, request, SCORES, tl.float32)
        row, channel = tl.arange(0, PAGE), tl.arange(0, HEAD_DIM)
        member = tl.arange(0, 4)
        there = 4 * fourth + member < GROUP
        own_head = head * GROUP + 4 * fourth + member
        query_head = request * (owns // FOURTHS) * GROUP + own_head
        step = tl.load(steps + query_head, mask=there, other=0.0)
        coarse_at = ((request * owns + own) * 8 + 2 * member)[None, :] * HEAD_DIM + channel[:, None]
        query = tl.load(coarse_fine + coarse_at).to(tl.float32) * FINE
        query += tl.load(coarse_fine + coarse_at + HEAD_DIM).to(tl.float32)
        top = tl.full([4], NOTHING, dtype=tl.float32)
        total = tl.zeros([4], dtype=tl.float32)
        for page in range(part, tokens // PAGE, parts):
            slot = tl.load(pages + page).to(tl.int64) * PAGE + row
            word = head * (HEAD_DIM // 16) + channel // 16
            code = tl.load(codes + slot[:, None] * CODE_STRIDE + word[None, :])
            code = (code >> (channel // 4 % 4 * 8)[None, :]) & 255
            point = tl.load(words + code) << (24 - channel % 4 * 8)[None, :] >> 24
            scale = tl.load(scales + slot * SCALE_STRIDE + head).to(tl.float32)
            sums = tl.dot(point.to(tl.float32), query)
            score = sums * (scale[:, None] * step[None, :])
            token = page * PAGE + row
            tl.store(
                scores + own_head.to(tl.int64)[None, :] * tokens + token[:, None], score, mask=there[None, :]
            )
            score = tl.where(token[:, None] >= first, score, NOTHING)
            above = tl.maximum(top, tl.max(score, 0))
            total = total * tl.exp(top - above) + tl.sum(tl.exp(score - above[None, :]), 0)
            top = above
        tl.store(partial_lse + query_head * parts + part, top + tl.log(total), mask=there)


SCORE = _score if triton.knobs.runtime.interpret else score_pages


def score_landmarks(
    queries: Tensor,
    signs: Tensor,
    codes: Tensor,
    scales: Tensor,
    grid: Tensor,
    lanes: Tensor,
    *,
    first: int = 0,
    parts: int | None = None,
) -> Tensor:
    """Estimate the attention scores of one query token for each of many requests, in one layer.

    queries: float [B, Hq, D], not rotated; D is 64, 128 or 256
    signs: float32 [D], those of the landmarks' rotation
    codes: uint8 [slots, H*D/4]; scales: float16 [slots, H], one per token and head; rows may be strided,
        those of codes by multiples of 4
    grid: float32 [256, 4], of the landmarks
    lanes: int64 [B, fields]; what it says of scores is written: scaled by 1/sqrt(D), short of a constant per
        query head; what it says of the first tokens means nothing
    first: tokens at the start of every request that have no landmark (sinks)
    parts: programs per request and KV head, at most 32; by default so many that the device is full
    Returns float32 [B, Hq, parts]: log-sum-exp of the scores, part by part, -inf where a part has no page;
    undefined where there is no request.
    Twin: aquifer.kernels.landmarks.score_landmarks; here points of the grid are rounded to 8 bits, and
    rotated queries to 16.
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
    if num_q_heads % num_heads:
        raise ValueError(f"{num_q_heads} query heads do not divide into groups of {num_heads} KV heads")
    group = num_q_heads // num_heads
    fourths = triton.cdiv(group, 4)
    parts = parts or max(1, min(MAX_PARTS, PROGRAMS // (requests * num_heads * fourths)))
    device = queries.device
    coarse_fine = torch.empty(requests, num_heads * fourths, 8, head_dim, dtype=torch.int8, device=device)
    steps = torch.empty(requests, num_q_heads, device=device)
    words = torch.empty(256, dtype=torch.int32, device=device)
    partial_lse = torch.empty(requests, num_q_heads, parts, device=device)
    _prepare[(num_heads * fourths, requests)](
        queries.contiguous(),
        signs,
        grid,
        lanes,
        coarse_fine,
        steps,
        words,
        SCALE=1 / head_dim,  # of the scores and of the Hadamard matrix, sqrt(D) each
        GROUP=group,
        FOURTHS=fourths,
        HEAD_DIM=head_dim,
        STAGES=head_dim.bit_length() - 1,
        num_warps=4,
    )
    SCORE[(num_heads * fourths, parts, requests)](
        coarse_fine,
        steps,
        words,
        codes.view(torch.int32),
        scales,
        lanes,
        partial_lse,
        first,
        CODE_STRIDE=codes.stride(0) // 4,
        SCALE_STRIDE=scales.stride(0),
        GROUP=group,
        FOURTHS=fourths,
        HEAD_DIM=head_dim,
        num_warps=WARPS.value,
    )
    return partial_lse
