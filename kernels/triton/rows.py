"""How the rows of chosen tokens that are not on the device come there.

Rows lie in page-locked host memory, which the device reads in place; so only the rows that are missing
travel, and no list of them has to come back to the host first. A row is one token and head: 4-bit codes of
its key and of its value (compression/landmarks.py). Their scales are on the device.

Bytes moved: D per missing row over the bus, and 2 * D elements written. The bus is the limit: 52 GB/s if a
row is one read of 128 bytes; key codes, value codes and scales in three places took 1.8 times as long.
Before that, the device learns where host memory is: 24 ns for every 64 kB that it did not touch lately.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import FLOATS, expect, expect_pool, expect_power_of_two
from aquifer.kernels.triton.hadamard import turn_group
from aquifer.kernels.triton.lanes import (
    FIELDS,
    INDEX_PAGES,
    MISSING,
    PAGE,
    TARGETS,
    WANTED,
    memory,
    number,
)

SCALES_BYTES = 4
"""Two float16, of a key and of its value: one word."""


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
    # Two small products take a third of the time of one with the whole matrix, and of its registers.
    return turn_group(tl.reshape(points, [BLOCK, HEAD_DIM]), HEAD_DIM // 16, 16, EXACT)


@triton.jit
def _fetch_rows(
    lanes: tl.tensor,
    num_missing: tl.tensor,
    rows: tl.tensor,
    scales: tl.tensor,
    grid: tl.tensor,
    signs: tl.tensor,
    means: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    sets: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    MOST_SETS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Of one request, every program takes every so many-th block of rows. rows, scales: 32-bit words."""
    part, request = tl.program_id(0), tl.program_id(1)
    every_set = tl.arange(0, MOST_SETS)
    wanted = tl.load(num_missing + request * sets + every_set, mask=every_set < sets, other=0)
    entries = wanted * HEADS if SHARED else wanted
    ends = tl.cumsum(tl.cdiv(entries, BLOCK), 0)
    blocks = tl.max(ends, 0)
    if part < blocks:
        count = number(lanes, request, WANTED)
        missing = memory(lanes, request, MISSING, tl.int32)
        targets = memory(lanes, request, TARGETS, tl.int32)
        pages = memory(lanes, request, INDEX_PAGES, tl.int32)
        code_words: tl.constexpr = HEAD_DIM // 8
        word, channel = tl.arange(0, HEAD_DIM // 8), tl.arange(0, HEAD_DIM)
        sign = tl.load(signs + channel) * NORM
        for block in range(part, blocks, tl.num_programs(0)):
            own_set = tl.sum((ends <= block).to(tl.int32), 0)
            first = tl.max(tl.where(every_set < own_set, ends, 0), 0)
            entry = (block - first) * BLOCK + tl.arange(0, BLOCK)
            there = entry < tl.sum(tl.where(every_set == own_set, entries, 0), 0)
            if SHARED:  # the heads of a token lie side by side, and so do the reads
                head, place = entry % HEADS, entry // HEADS
                mean = tl.load(means + head[:, None] * HEAD_DIM + channel[None, :])
            else:
                head, place = own_set, entry
                mean = tl.load(means + own_set * HEAD_DIM + channel)[None, :]
            token = tl.load(missing + own_set * count + place, mask=there, other=0)
            index_slot = tl.load(pages + token // PAGE).to(tl.int64) * PAGE + token % PAGE

            row, valid = index_slot * HEADS + head, there[:, None]
            key_at = (rows + row * (2 * code_words))[:, None] + word[None, :]
            key_words = tl.load(key_at, mask=valid, other=0)
            value_words = tl.load(key_at + code_words, mask=valid, other=0)
            both = tl.load(scales + row, mask=there, other=0)
            key_scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            value_scale = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)

            key = _decode(key_words, grid, BLOCK, HEAD_DIM, EXACT) * key_scale[:, None] * sign[None, :] + mean
            value = _decode(value_words, grid, BLOCK, HEAD_DIM, EXACT) * value_scale[:, None] * sign[None, :]
            slot = tl.load(targets + own_set * count + place, mask=there, other=0).to(tl.int64)
            target = (head.to(tl.int64) * head_stride + slot * HEAD_DIM)[:, None] + channel[None, :]
            tl.store(keys + target, key, mask=valid)
            tl.store(values + target, value, mask=valid)


def fetch_rows(
    lanes: Tensor,
    num_missing: Tensor,
    rows: Tensor,
    scales: Tensor,
    grid: Tensor,
    signs: Tensor,
    means: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    programs: int = 528,
    block_rows: int = 16,
) -> None:
    """Bring the missing rows of one layer from host memory into the pool.

    lanes: int64 [B, fields]; num_missing: int32 [B, S], as `find_rows` left them; S is 1 (one set for all
        heads) or H (one per head)
    rows: uint8 [index slots, H * D] in page-locked host memory: head by head, key codes and value codes; D is
        64 or 128
    scales: uint8 [index slots, H * 4] on the device: head by head, two float16 (see IndexPool)
    grid: float32 [256, 2]; signs: float32 [D]; means: float32 [H, D], of the keys of this layer
    keys, values: [H, slots, D], the pool of one layer, any float dtype, the slots of a head side by side
    programs: how many blocks of rows are in work at a time. More than the default are no faster: the bus
        is full.
    Twin: aquifer.compression.landmarks.TokenCodec.decode_rows, and an assignment.
    """
    heads, _, head_dim = keys.shape
    requests, sets = num_missing.shape
    expect("lanes", lanes, (requests, FIELDS.value), torch.int64)
    expect("num_missing", num_missing, (None, None), torch.int32)
    expect("rows", rows, (None, heads * head_dim), torch.uint8)
    expect("scales", scales, (len(rows), heads * SCALES_BYTES), torch.uint8)
    expect("grid", grid, (256, 2), torch.float32)
    expect("signs", signs, (head_dim,), torch.float32)
    expect("means", means, (heads, head_dim), torch.float32)
    expect_pool(keys, values, heads, head_dim, FLOATS)
    expect_power_of_two("head_dim", head_dim, 64, 128)
    expect_power_of_two("block_rows", block_rows, 16, 128)
    if sets not in (1, heads):
        raise ValueError(f"{sets} sets of tokens for {heads} heads; needed: 1 or {heads}")
    if not (rows.is_contiguous() and scales.is_contiguous()):
        raise ValueError("rows or scales are not contiguous")
    if keys.is_cuda and not rows.is_pinned():
        raise ValueError("rows are in pageable memory, which the device cannot read; pin them")
    _fetch_rows[(max(1, programs // requests), requests)](
        lanes,
        num_missing,
        rows.view(torch.int32),
        scales.view(torch.int32),
        grid,
        signs,
        means,
        keys,
        values,
        sets,
        keys.stride(0),
        HEADS=heads,
        MOST_SETS=triton.next_power_of_2(sets),
        SHARED=sets == 1,
        HEAD_DIM=head_dim,
        NORM=head_dim**-0.5,
        EXACT=keys.dtype == torch.float32,
        BLOCK=block_rows,
        num_warps=4,
    )
