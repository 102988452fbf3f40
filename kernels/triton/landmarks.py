"""Ranking tokens straight from packed 2-bit landmarks: decoded landmarks never exist in memory.

A byte is one point of the 4-d grid. The table of 256 points in half precision is 2 KB; a point is looked up
as one word of 64 bits and taken apart by shifts. Coordinate i of all points of a token meets coordinates i,
i+4, ... of the query, so a score is four products of matrices of D/4 columns, and nothing is rearranged.

Bytes moved, per layer and request: codes and scales once, H * T * (D/4 + 2), and 4 * Hq * T for the scores;
ranking reads the scores once and writes 4 * T per set of tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import FLOATS, expect, expect_power_of_two

PAGE_TOKENS = 256


@triton.jit
def _score_block(
    queries: tl.tensor,
    points: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    block_tables: tl.tensor,
    lengths: tl.tensor,
    scores: tl.tensor,
    partial_lse: tl.tensor,
    first: tl.tensor,
    table_stride: tl.tensor,
    code_stride: tl.tensor,
    scale_stride: tl.tensor,
    SOFTMAX_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of tokens, for one KV head of one request: the query heads of its group are the rows."""
    block, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    valid = (tokens >= first) & (tokens < tl.load(lengths + request))
    page = tl.load(block_tables + request * table_stride + block * BLOCK // PAGE)
    slots = page.to(tl.int64) * PAGE + tokens % PAGE

    bytes_of_head = tl.arange(0, HEAD_DIM // 4)
    code = tl.load(
        codes + slots[:, None] * code_stride + head * (HEAD_DIM // 4) + bytes_of_head[None, :],
        mask=valid[:, None],
        other=0,
    )
    # Looked up in shared memory, where 32 threads wait for the fullest of 16 pairs of banks; a load through
    # the L1 cache would wait for each of the table's 16 lines.
    flat = tl.reshape(code.to(tl.int32), [BLOCK * (HEAD_DIM // 4)])
    table = tl.load(points + tl.arange(0, 256))
    point = tl.reshape(tl.gather(table, flat, 0), [BLOCK, HEAD_DIM // 4])

    row = tl.arange(0, ROWS)
    query_head = (request * tl.num_programs(1) + head) * GROUP + row
    query = queries + query_head[:, None] * HEAD_DIM + 4 * bytes_of_head[None, :]
    product = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for axis in tl.static_range(4):
        coordinate = (point >> (16 * axis)).to(tl.int16).to(tl.float16, bitcast=True)
        # Scaled before it is rounded: queries of some models are large.
        q = tl.load(query + axis, mask=row[:, None] < GROUP, other=0.0).to(tl.float32) * SOFTMAX_SCALE
        product = tl.dot(q.to(tl.float16), tl.trans(coordinate), product)

    scale = tl.load(scales + slots * scale_stride + head, mask=valid, other=0.0).to(tl.float32)
    score = tl.where(valid[None, :], product * scale[None, :], float("-inf"))
    place = query_head.to(tl.int64) * (tl.num_programs(0) * BLOCK)
    tl.store(scores + place[:, None] + tokens[None, :], score, mask=row[:, None] < GROUP)

    # A block without a single landmark has the maximum -inf, which must not be subtracted from itself.
    top = tl.max(score, axis=1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    lse = shift + tl.log(tl.sum(tl.exp(score - shift[:, None]), axis=1))
    tl.store(partial_lse + query_head * tl.num_programs(0) + block, lse, mask=row < GROUP)


@triton.jit
def _rank_block(
    scores: tl.tensor,
    lse: tl.tensor,
    ranks: tl.tensor,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of tokens for one set: HEADS query heads compete for it."""
    block, chosen_set = tl.program_id(0), tl.program_id(1)
    tokens, row = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROWS)
    num_tokens = tl.num_programs(0).to(tl.int64) * BLOCK
    query_head = chosen_set * HEADS + row
    place = query_head[:, None] * num_tokens + tokens[None, :]
    score = tl.load(scores + place, mask=row[:, None] < HEADS, other=float("-inf"))
    # Heads without any landmark have -inf, too; they rank nothing rather than give a NaN.
    whole = tl.load(lse + query_head, mask=row < HEADS, other=0.0)
    whole = tl.where(whole == float("-inf"), 0.0, whole)
    tl.store(ranks + chosen_set * num_tokens + tokens, tl.max(score - whole[:, None], axis=0))


def pack_points(grid: Tensor) -> Tensor:
    """The table that `score_landmarks` reads: int64 [256], a point of four float16 each.

    grid: float32 [256, 4]
    """
    expect("grid", grid, (256, 4), torch.float32)
    return grid.half().view(torch.int64).squeeze(1)


def score_landmarks(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    points: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    first: int = 0,
    block_tokens: int = 128,
) -> tuple[Tensor, Tensor]:
    """Estimate the attention scores of one query token for each of many requests, in one layer.

    queries: float [B, Hq, D], rotated as the landmarks are; D is 64, 128 or 256
    codes: uint8 [slots, H*D/4]; scales: float16 [slots, H], one per token and head; rows may be strided
    points: int64 [256], the grid as `pack_points` returns it
    block_tables: int32 [B, pages], the pages of 256 slots of each request; lengths: int32 [B], in tokens
    first: tokens at the start of every request that have no landmark (sinks)
    block_tokens: per program, a divisor of 256. The default is to be measured.
    Returns scores float32 [B, Hq, pages*256], scaled by 1/sqrt(D), short of a constant per query head, and
    -inf where a request has no landmark; and their log-sum-exp float32 [B, Hq], so that choosing tokens
    need not read the scores twice.
    Twin: aquifer.kernels.landmarks.score_landmarks; points and queries are rounded to float16 here.
    """
    requests, num_q_heads, head_dim = queries.shape
    num_heads, pages = scales.shape[1], block_tables.shape[1]
    expect("queries", queries, (None, None, None), FLOATS)
    expect("codes", codes, (len(scales), num_heads * head_dim // 4), torch.uint8)
    expect("scales", scales, (None, None), torch.float16)
    expect("points", points, (256,), torch.int64)
    expect("block_tables", block_tables, (requests, None), torch.int32)
    expect("lengths", lengths, (requests,), torch.int32)
    expect_power_of_two("head_dim", head_dim, 64, 256)
    expect_power_of_two("block_tokens", block_tokens, 16, PAGE_TOKENS)
    if num_q_heads % num_heads:
        raise ValueError(f"{num_q_heads} query heads do not divide into groups of {num_heads} KV heads")
    group, blocks = num_q_heads // num_heads, pages * PAGE_TOKENS // block_tokens
    scores = torch.empty(requests, num_q_heads, pages * PAGE_TOKENS, device=queries.device)
    partial_lse = torch.empty(requests, num_q_heads, blocks, device=queries.device)
    _score_block[(blocks, num_heads, requests)](
        queries.contiguous(),
        points,
        codes,
        scales,
        block_tables,
        lengths,
        scores,
        partial_lse,
        first,
        block_tables.stride(0),
        codes.stride(0),
        scales.stride(0),
        SOFTMAX_SCALE=head_dim**-0.5,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),  # tensor cores take 16 rows
        HEAD_DIM=head_dim,
        PAGE=PAGE_TOKENS,
        BLOCK=block_tokens,
        num_warps=4,
    )
    return scores, partial_lse.logsumexp(dim=2)


def rank_tokens(
    scores: Tensor, lse: Tensor, num_kv_heads: int, *, shared: bool, block_tokens: int = 128
) -> Tensor:
    """The largest share of attention, as a logarithm, that any query head of a group would give a token.

    scores: float32 [B, Hq, T], T a multiple of 256; lse: float32 [B, Hq]: as `score_landmarks` returns them
    shared: one set of tokens for all KV heads; otherwise one per head
    block_tokens: per program, a divisor of 256. The default is to be measured.
    Returns float32 [B, H, T], or [B, 1, T] if shared: the tokens to choose are its largest.
    Twin: what aquifer.kernels.landmarks.select_tokens sorts by.
    """
    requests, num_q_heads, num_tokens = scores.shape
    expect("scores", scores, (None, None, None), torch.float32)
    expect("lse", lse, (requests, num_q_heads), torch.float32)
    expect_power_of_two("block_tokens", block_tokens, 16, PAGE_TOKENS)
    if num_q_heads % num_kv_heads or num_tokens % PAGE_TOKENS:
        raise ValueError(f"scores of shape {list(scores.shape)} do not fit {num_kv_heads} KV heads")
    sets = 1 if shared else num_kv_heads
    heads = num_q_heads // sets
    ranks = torch.empty(requests, sets, num_tokens, device=scores.device)
    _rank_block[(num_tokens // block_tokens, requests * sets)](
        scores.contiguous(),
        lse.contiguous(),
        ranks,
        HEADS=heads,
        ROWS=triton.next_power_of_2(heads),
        BLOCK=block_tokens,
        num_warps=4,
    )
    return ranks
