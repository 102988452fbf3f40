"""Fetching selected rows: read from host memory, decoded, and put into their slots, in one kernel.

The rows lie in page-locked host memory, which the device reads in place; so only the rows that are missing
travel, and no list of them has to come back to the host first. A row is one token and head: 4-bit codes of
its key and of its value, then both scales (compression/landmarks.py).

Bytes moved: D + 4 per row over the bus, and 2 * D elements written. The bus is the limit, so a few programs
suffice; more of them would only keep other kernels off the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import FLOATS, INDICES, expect, expect_power_of_two
from aquifer.kernels.triton.hadamard import turn

SCALES_BYTES = 4
"""Two float16: one word, behind the codes."""


@triton.jit
def _decode(
    words: tl.tensor,
    grid: tl.tensor,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EXACT: tl.constexpr,
) -> tl.tensor:
    """What int32 [BLOCK, D/8] words of codes stand for, rotated back but neither scaled nor signed."""
    place = tl.arange(0, 4)
    code = (words[:, :, None] >> (8 * place)[None, None, :]) & 255
    code = tl.reshape(code, [BLOCK, HEAD_DIM // 2])
    axis = tl.arange(0, 2)
    points = tl.load(grid + code[:, :, None] * 2 + axis[None, None, :])
    return turn(tl.reshape(points, [BLOCK, HEAD_DIM]), HEAD_DIM, EXACT)


@triton.jit
def _fetch_rows(
    rows: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    grid: tl.tensor,
    signs: tl.tensor,
    means: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    count: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Every program takes every so many-th block of rows. rows: words of 32 bits."""
    row_words: tl.constexpr = HEAD_DIM // 4 + 1
    word, channel = tl.arange(0, HEAD_DIM // 8), tl.arange(0, HEAD_DIM)
    sign = tl.load(signs + channel) * NORM
    for block in range(tl.program_id(0), tl.cdiv(count * HEADS, BLOCK), tl.num_programs(0)):
        entry = block * BLOCK + tl.arange(0, BLOCK)
        if SHARED:  # the heads of a token lie side by side, and so do the reads
            head, place = entry % HEADS, entry // HEADS
        else:
            head, place = entry // count, entry
        exists = entry < count * HEADS
        slot = tl.load(slots + place, mask=exists, other=-1).to(tl.int64)
        wanted = slot >= 0
        token = tl.load(tokens + place, mask=wanted, other=0).to(tl.int64)

        row = rows + (token * HEADS + head) * row_words
        row_of_words, there = row[:, None] + word[None, :], wanted[:, None]
        key_words = tl.load(row_of_words, mask=there, other=0)
        value_words = tl.load(row_of_words + HEAD_DIM // 8, mask=there, other=0)
        scales = tl.load(row + HEAD_DIM // 4, mask=wanted, other=0)
        key_scale = scales.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        value_scale = (scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)

        key = _decode(key_words, grid, BLOCK, HEAD_DIM, EXACT) * key_scale[:, None] * sign[None, :]
        key += tl.load(means + head[:, None] * HEAD_DIM + channel[None, :], mask=there, other=0.0)
        value = _decode(value_words, grid, BLOCK, HEAD_DIM, EXACT) * value_scale[:, None] * sign[None, :]
        target = head.to(tl.int64) * head_stride + slot * HEAD_DIM
        tl.store(keys + target[:, None] + channel[None, :], key, mask=there)
        tl.store(values + target[:, None] + channel[None, :], value, mask=there)


def fetch_rows(
    rows: Tensor,
    tokens: Tensor,
    slots: Tensor,
    grid: Tensor,
    signs: Tensor,
    means: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    programs: int = 32,
    block_rows: int = 16,
) -> None:
    """Bring the rows of some tokens of one layer from host memory into the pool.

    rows: uint8 [T, H, D + 4] in page-locked host memory, as TokenCodec encodes them; D is 64 or 128
    tokens: int [S, N], numbers of rows; S is 1 (one set for all heads) or H (one per head). Ascending
        numbers are read fastest.
    slots: like tokens, where each goes in the pool; a negative one is skipped, so hits need not be taken
        out of the list
    grid: float32 [256, 2]; signs: float32 [D]; means: float32 [H, D], of the keys of this layer
    keys, values: [H, slots, D], the pool of one layer, any float dtype, the slots of a head side by side
    programs: how many blocks of rows are in work at a time; limits what the kernel takes of the device.
        The default is to be measured.
    Twin: aquifer.compression.landmarks.TokenCodec.decode_rows, and an assignment.
    """
    num_rows, heads, _ = rows.shape
    sets, count = tokens.shape
    head_dim = keys.shape[2]
    expect("rows", rows, (num_rows, heads, head_dim + SCALES_BYTES), torch.uint8)
    expect("tokens", tokens, (None, None), INDICES)
    expect("slots", slots, tokens.shape, INDICES)
    expect("grid", grid, (256, 2), torch.float32)
    expect("signs", signs, (head_dim,), torch.float32)
    expect("means", means, (heads, head_dim), torch.float32)
    expect("keys", keys, (heads, None, head_dim), FLOATS)
    expect("values", values, keys.shape, keys.dtype)
    expect_power_of_two("head_dim", head_dim, 64, 128)
    expect_power_of_two("block_rows", block_rows, 16, 128)
    if sets not in (1, heads):
        raise ValueError(f"{sets} sets of tokens for {heads} heads; needed: 1 or {heads}")
    for name, pool in (("keys", keys), ("values", values)):
        if pool.stride()[:2] != (keys.stride(0), head_dim):
            raise ValueError(f"{name} has strides {pool.stride()}; needed: those of a pool")
    if not rows.is_contiguous():
        raise ValueError("rows are not contiguous")
    if keys.is_cuda and not rows.is_pinned():
        raise ValueError("rows are in pageable memory, which the device cannot read; pin them")
    _fetch_rows[(max(1, min(programs, triton.cdiv(count * heads, block_rows))),)](
        rows.view(torch.int32),
        tokens.contiguous(),
        slots.contiguous(),
        grid,
        signs,
        means,
        keys,
        values,
        count,
        keys.stride(0),
        HEADS=heads,
        SHARED=sets == 1,
        HEAD_DIM=head_dim,
        NORM=head_dim**-0.5,
        EXACT=keys.dtype == torch.float32,
        BLOCK=block_rows,
        num_warps=8,  # with 4 the matrix that rotates back does not fit into registers
    )
