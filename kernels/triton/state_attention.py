"""Attention of one token to a layer that stands only in the state of AQUA-KV's chain.

Keys and values are not written first: a decode step reads each of them once, and writing them out of the
rotated domain and reading them again takes longer than the attention. Three kernels:

    scores    keys leave the rotated domain in registers, RoPE, a product with each query of their head
    values    softmax and the sum of values, still rotated, split along the tokens as in attention.py; the
              Hadamard matrix mixes the heads of a group, so each query head gets all channels of its group
    merge     splits are joined, and the one sum of each query head leaves the rotated domain

Bytes moved: the state once, 4 * C per token in 16 bits, 4 * D for RoPE, and the scores twice, 4 * Hq each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.attention import LN_2, weigh
from aquifer.kernels.triton.checks import FLOATS, expect, expect_power_of_two
from aquifer.kernels.triton.emit import upright_heads, with_rope
from aquifer.kernels.triton.hadamard import LEAST, factors, turn_group

SPLITS = 64
"""Of the tokens: with four programs per split and group, two for each multiprocessor of an H200."""

LOWEST = tl.constexpr(-1e30)
"""Finite, so that it can be subtracted from itself."""


@triton.jit
def _score_keys(
    state: tl.tensor,
    signs: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    queries: tl.tensor,
    scores: tl.tensor,
    count: tl.tensor,
    row_stride: tl.tensor,
    query_heads: tl.tensor,
    GROUP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The keys of one Hadamard group of one block of tokens, against PER_HEAD queries each."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = token < count
    group = tl.program_id(1)
    angle = token[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    cosines = tl.load(cos + angle, mask=exists[:, None], other=0.0)
    sines = tl.load(sin + angle, mask=exists[:, None], other=0.0)
    low, high = upright_heads(
        state, token, exists, row_stride, signs, group * GROUP, GROUP, LEFT, RIGHT, HEAD_DIM, SCALE, EXACT
    )
    low, high = with_rope(low, high, cosines, sines)
    half: tl.constexpr = HEAD_DIM // 2
    heads: tl.constexpr = GROUP // HEAD_DIM
    head = group * heads + tl.arange(0, heads)
    row = scores + token.to(tl.int64)[:, None] * query_heads
    for nth in tl.static_range(PER_HEAD):
        query_head = head * PER_HEAD + nth
        query = queries + query_head[:, None] * HEAD_DIM + tl.arange(0, half)[None, :]
        products = low * tl.load(query).to(tl.float32)[None, :, :]
        products += high * tl.load(query + half).to(tl.float32)[None, :, :]
        tl.store(row + query_head[None, :], tl.sum(products, 2), mask=exists[:, None])


@triton.jit
def _sum_values(
    values: tl.tensor,
    scores: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    count: tl.tensor,
    row_stride: tl.tensor,
    query_heads: tl.tensor,
    tokens_per_split: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Some columns of one split, for the HEADS query heads of their group. Scores are in powers of two."""
    split, first_column = tl.program_id(0), tl.program_id(1) * COLUMNS
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    query_head, own = first_column // GROUP * HEADS + row, row < HEADS
    top = tl.full([ROWS], LOWEST, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    out = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    stop = tl.minimum(count, (split + 1) * tokens_per_split)
    for at in range(split * tokens_per_split, stop, BLOCK):
        token = at + tl.arange(0, BLOCK)
        exists = token < stop
        place = token.to(tl.int64)[None, :] * query_heads + query_head[:, None]
        there = own[:, None] & exists[None, :]
        score = tl.load(scores + place, mask=there, other=float("-inf"))
        weight, kept, top, total = weigh(score, top, total)
        place = token.to(tl.int64)[:, None] * row_stride + first_column + column[None, :]
        value = tl.load(values + place, mask=exists[:, None], other=0.0)
        out = out * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    total = tl.maximum(total, 1e-30)  # of rows that are nobody's
    partial = split.to(tl.int64) * query_heads + query_head
    place = partial[:, None] * GROUP + first_column % GROUP + column[None, :]
    tl.store(partial_out + place, out / total[:, None], mask=own[:, None])
    if first_column % GROUP == 0:
        tl.store(partial_lse + partial, top + tl.log2(total), mask=own)


@triton.jit
def _merge_rotated(
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    signs: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    splits: tl.tensor,
    GROUP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PER_HEAD: tl.constexpr,
    NORM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    COPIES: tl.constexpr,
) -> None:
    """All splits of one query head, BLOCK at a time. COPIES: of the row, where a product needs more."""
    query_head, query_heads = tl.program_id(0), tl.num_programs(0)
    channel, every = tl.arange(0, GROUP), tl.arange(0, SPLITS)
    each = tl.load(partial_lse + every * query_heads + query_head, mask=every < splits, other=LOWEST)
    top = tl.max(each, axis=0)
    total = tl.sum(tl.exp2(each - top), axis=0)
    merged = tl.zeros([GROUP], dtype=tl.float32)
    for at in range(0, splits, BLOCK):
        split = at + tl.arange(0, BLOCK)
        partial = split.to(tl.int64) * query_heads + query_head
        weight = tl.exp2(tl.load(partial_lse + partial, mask=split < splits, other=LOWEST) - top)
        place = partial[:, None] * GROUP + channel[None, :]
        rows = tl.load(partial_out + place, mask=(split < splits)[:, None], other=0.0)
        merged += tl.sum(rows * weight[:, None], axis=0)

    head = query_head // PER_HEAD
    first_channel = head * HEAD_DIM // GROUP * GROUP
    row = tl.broadcast_to((merged / total)[None, :], [COPIES, GROUP])
    row = turn_group(row, LEFT, RIGHT, True) * (tl.load(signs + first_channel + channel) * NORM)[None, :]
    within = first_channel + channel - head * HEAD_DIM
    wanted = (tl.arange(0, COPIES) == 0)[:, None] & ((within >= 0) & (within < HEAD_DIM))[None, :]
    place = tl.broadcast_to((query_head * HEAD_DIM + within)[None, :], [COPIES, GROUP])
    tl.store(out + place, row, mask=wanted)
    tl.store(lse + query_head, (top + tl.log2(total)) * LN_2)


def attend_state(
    q: Tensor,
    state: Tensor,
    signs: Tensor,
    group: int,
    rope: tuple[Tensor, Tensor],
    *,
    splits: int = SPLITS,
    block_tokens: int = 4,
) -> tuple[Tensor, Tensor]:
    """Attention of one query token to the tokens of a state.

    q: [Hq, D], after RoPE; D is a power of two from 16 to G
    state: [T, 2C], T > 0, any float dtype, rotated keys beside rotated values; rows may be strided
    signs: float32 [C]; group: G, the largest power of two that divides C
    rope: cos and sin [T, D], from the model's own rotary module
    splits: at most, for sums of values; block_tokens: per program, for scores
    Returns (out [Hq, D] in q's dtype, lse float32 [Hq]). Scores are scaled by 1/sqrt(D).
    Twin: aquifer.kernels.triton.emit.emit, then aquifer.kernels.attention.attend, which round keys and values
    to the pool's dtype in between.
    """
    query_heads, head_dim = q.shape
    tokens, width = state.shape
    channels = width // 2
    expect("q", q, (None, None), FLOATS)
    expect("state", state, (None, 2 * channels), FLOATS)
    expect("signs", signs, (channels,), torch.float32)
    expect("cos", rope[0], (tokens, head_dim), FLOATS)
    expect("sin", rope[1], (tokens, head_dim), rope[0].dtype)
    expect_power_of_two("group", group, 16, 4096)
    expect_power_of_two("head_dim", head_dim, 16, group)
    if channels % group or query_heads % (channels // head_dim):
        raise ValueError(f"{query_heads} query heads do not fit {channels} channels in groups of {group}")
    per_head = query_heads // (channels // head_dim)
    heads = group // head_dim * per_head
    left, right = factors(group)
    # Products of matrices have at least 16 rows.
    block_tokens = max(block_tokens, LEAST // left)
    cos, sin = (table.contiguous() for table in rope)
    q = q.contiguous()
    scores = torch.empty(tokens, query_heads, device=q.device)
    _score_keys[(triton.cdiv(tokens, block_tokens), channels // group)](
        state,
        signs,
        cos,
        sin,
        q,
        scores,
        tokens,
        state.stride(0),
        query_heads,
        GROUP=group,
        LEFT=left,
        RIGHT=right,
        HEAD_DIM=head_dim,
        PER_HEAD=per_head,
        SCALE=(group * head_dim) ** -0.5 / LN_2.value,
        EXACT=state.dtype == torch.float32,
        BLOCK=block_tokens,
        num_warps=4,
    )

    block, columns = 64, min(256, group)
    tokens_per_split = triton.cdiv(triton.cdiv(tokens, splits), block) * block
    splits = triton.cdiv(tokens, tokens_per_split)
    partial_out = torch.empty(splits, query_heads, group, device=q.device)
    partial_lse = torch.empty(splits, query_heads, device=q.device)
    _sum_values[(splits, channels // columns)](
        state[:, channels:],
        scores,
        partial_out,
        partial_lse,
        tokens,
        state.stride(0),
        query_heads,
        tokens_per_split,
        GROUP=group,
        HEADS=heads,
        ROWS=max(LEAST, triton.next_power_of_2(heads)),
        COLUMNS=columns,
        BLOCK=block,
        num_warps=4 if state.element_size() == 2 else 8,  # float32 spills registers with four
        num_stages=3,
    )

    out, lse = torch.empty_like(q), torch.empty(query_heads, device=q.device)
    _merge_rotated[(query_heads,)](
        partial_out,
        partial_lse,
        signs,
        out,
        lse,
        splits,
        GROUP=group,
        LEFT=left,
        RIGHT=right,
        HEAD_DIM=head_dim,
        PER_HEAD=per_head,
        NORM=group**-0.5,
        SPLITS=triton.next_power_of_2(splits),
        BLOCK=16,
        COPIES=max(1, LEAST // left),
        num_warps=8,
    )
    return out, lse
