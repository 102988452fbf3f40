"""The rows of chosen tokens: which are on the device, which slots the others get, and how they come there.

Rows lie in page-locked host memory, which the device reads in place; so only the rows that are missing
travel, and no list of them has to come back to the host first. A row is one token and head: 4-bit codes of
its key and of its value, and both scales (compression/landmarks.py).

Bytes moved: D + 4 per missing row over the bus, and 2 * D elements written. The bus is the limit, so a few
programs suffice; more of them would only keep other kernels off the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import FLOATS, expect, expect_pool, expect_power_of_two
from aquifer.kernels.triton.hadamard import turn_group
from aquifer.kernels.triton.lanes import (
    CHOSEN,
    FIELDS,
    INDEX_PAGES,
    LAST_USED,
    MISSING,
    PAGE,
    ROW_PAGES,
    SLOT_OF,
    SLOTS,
    STEP,
    TAIL,
    TARGETS,
    TOKEN_IN,
    TOKENS,
    WANTED,
    memory,
    number,
)

SCALES_BYTES = 4
"""Two float16: one word, behind the codes."""

OLDEST = tl.constexpr(255)
"""Slots that were not wanted for so many steps, or never, are all as old as this."""


@triton.jit
def _age(last_used: tl.tensor, slot: tl.tensor, slots: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Steps since slots were wanted; 0 for those that do not exist, which are never the oldest."""
    return tl.minimum(step - tl.load(last_used + slot, mask=slot < slots, other=step), OLDEST)


@triton.jit(do_not_specialize=["layer"])  # one program for all of them
def _find_rows(
    lanes: tl.tensor,
    layer: tl.tensor,
    lists: tl.tensor,
    num_missing: tl.tensor,
    counters: tl.tensor,
    set_stride: tl.tensor,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One set of one request."""
    own_set, request = tl.program_id(0), tl.program_id(1)
    own = request * tl.num_programs(0) + own_set
    count, slots = number(lanes, request, WANTED), number(lanes, request, SLOTS)
    step, tokens = number(lanes, request, STEP), number(lanes, request, TOKENS)
    book = (layer * tl.num_programs(0) + own_set).to(tl.int64)
    slot_of = memory(lanes, request, SLOT_OF, tl.int32) + book * tokens
    token_in = memory(lanes, request, TOKEN_IN, tl.int32) + book * slots
    last_used = memory(lanes, request, LAST_USED, tl.int32) + book * slots
    chosen = memory(lanes, request, CHOSEN, tl.int32) + own_set * count
    missing = memory(lanes, request, MISSING, tl.int32) + own_set * count
    targets = memory(lanes, request, TARGETS, tl.int32) + own_set * count
    row_pages = memory(lanes, request, ROW_PAGES, tl.int32)

    # Hits are stamped first, so that no slot is given away that is wanted in this very step.
    absent = 0
    for at in range(0, count, BLOCK):
        place = at + tl.arange(0, BLOCK)
        token = tl.load(chosen + place, mask=place < count, other=0)
        slot = tl.load(slot_of + token, mask=place < count, other=0)
        tl.store(last_used + slot, step, mask=(place < count) & (slot >= 0))
        absent += tl.sum((slot < 0).to(tl.int32), 0)
    tl.debug_barrier()

    # The `absent` oldest slots: all above some age, and the first ones of that age.
    if absent > 0:
        ages = tl.zeros([256], dtype=tl.int32)
        for at in range(0, slots, BLOCK):
            slot = at + tl.arange(0, BLOCK)
            ages += tl.histogram(_age(last_used, slot, slots, step), 256)
        at_least = tl.sum(ages, 0) - tl.cumsum(ages, 0) + ages
        limit = tl.sum((at_least >= absent).to(tl.int32), 0) - 1
        older = tl.sum(tl.where(tl.arange(0, 256) > limit, ages, 0), 0)
        ties_wanted = absent - older
        ties_before = 0
        older_before = 0
        for at in range(0, slots, BLOCK):
            slot = at + tl.arange(0, BLOCK)
            age = _age(last_used, slot, slots, step)
            sure, tie = (age > limit).to(tl.int32), (age == limit).to(tl.int32)
            ties = ties_before + tl.cumsum(tie, 0)
            given = (sure == 1) | ((tie == 1) & (ties <= ties_wanted))
            place = older_before + tl.cumsum(sure, 0) + tl.minimum(ties, ties_wanted) - 1
            old = tl.load(token_in + slot, mask=given, other=-1)
            tl.store(slot_of + old, -1, mask=given & (old >= 0))
            tl.store(targets + place, slot, mask=given)
            ties_before += tl.sum(tie, 0)
            older_before += tl.sum(sure, 0)
        tl.debug_barrier()

    found = 0
    list_of_set = lists + own * set_stride + SINKS + number(lanes, request, TAIL)
    for at in range(0, count, BLOCK):
        place = at + tl.arange(0, BLOCK)
        token = tl.load(chosen + place, mask=place < count, other=0)
        slot = tl.load(slot_of + token, mask=place < count, other=0)
        fresh = slot < 0
        nth = found + tl.cumsum(fresh.to(tl.int32), 0) - 1
        slot = tl.where(fresh, tl.load(targets + nth, mask=fresh, other=0), slot)
        tl.store(slot_of + token, slot, mask=fresh)
        tl.store(token_in + slot, token, mask=fresh)
        tl.store(last_used + slot, step, mask=fresh)
        row = SINKS + slot
        page = tl.load(row_pages + row // PAGE, mask=place < count, other=0)
        pooled = page * PAGE + row % PAGE
        tl.store(list_of_set + place, pooled, mask=place < count)
        tl.store(missing + nth, token, mask=fresh)
        tl.store(targets + nth, pooled, mask=fresh)
        found += tl.sum(fresh.to(tl.int32), 0)
    tl.store(num_missing + own, absent)
    if count > 0:
        tl.atomic_add(counters, tl.cast(count, tl.int64))
        tl.atomic_add(counters + 1, tl.cast(absent, tl.int64))


def find_rows(
    lanes: Tensor, layer: int, lists: Tensor, counters: Tensor, *, sinks: int, block: int = 4096
) -> Tensor:
    """Give every chosen token of one layer a slot: the one its row is in, or else that of the row that was
    wanted least recently, the first such slot first.

    lanes: int64 [B, fields]; reads chosen, keeps slot_of, token_in and last_used, and writes what is to be
        fetched: missing and targets
    lists: int32 [B, S, W]; slots of the pool are written behind sinks and tail, in the order of the tokens
    counters: int64 [2]; grows by the numbers of chosen and of missing tokens, summed over sets
    sinks: how many there are. block: tokens or slots per turn
    Returns int32 [B, S]: how many are missing.
    """
    requests, sets, _ = lists.shape
    expect("lanes", lanes, (requests, FIELDS.value), torch.int64)
    expect("lists", lists, (None, None, None), torch.int32)
    expect("counters", counters, (2,), torch.int64)
    expect_power_of_two("block", block, 16, 8192)
    num_missing = torch.empty(requests, sets, dtype=torch.int32, device=lanes.device)
    _find_rows[(sets, requests)](
        lanes, layer, lists, num_missing, counters, lists.stride(1), SINKS=sinks, BLOCK=block, num_warps=8
    )
    return num_missing


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
    grid: tl.tensor,
    signs: tl.tensor,
    means: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Of one set of one request, every program takes every so many-th block of rows. rows: 32-bit words."""
    part, own_set, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wanted = tl.load(num_missing + request * tl.num_programs(1) + own_set)
    entries = wanted * HEADS if SHARED else wanted
    if part * BLOCK < entries:
        count = number(lanes, request, WANTED)
        missing = memory(lanes, request, MISSING, tl.int32) + own_set * count
        targets = memory(lanes, request, TARGETS, tl.int32) + own_set * count
        pages = memory(lanes, request, INDEX_PAGES, tl.int32)
        code_words: tl.constexpr = HEAD_DIM // 8
        word, channel = tl.arange(0, HEAD_DIM // 8), tl.arange(0, HEAD_DIM)
        sign = tl.load(signs + channel) * NORM
        for block in range(part, tl.cdiv(entries, BLOCK), tl.num_programs(0)):
            entry = block * BLOCK + tl.arange(0, BLOCK)
            if SHARED:  # the heads of a token lie side by side, and so do the reads
                head, place = entry % HEADS, entry // HEADS
            else:
                head, place = own_set + tl.zeros([BLOCK], dtype=tl.int32), entry
            there = entry < entries
            token = tl.load(missing + place, mask=there, other=0)
            index_slot = tl.load(pages + token // PAGE).to(tl.int64) * PAGE + token % PAGE

            row, valid = rows + index_slot * (HEADS * (2 * code_words + 1)), there[:, None]
            key_at = (row + head * code_words)[:, None] + word[None, :]
            key_words = tl.load(key_at, mask=valid, other=0)
            value_words = tl.load(key_at + HEADS * code_words, mask=valid, other=0)
            scales = tl.load(row + HEADS * 2 * code_words + head, mask=there, other=0)
            key_scale = scales.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            value_scale = (scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)

            key = _decode(key_words, grid, BLOCK, HEAD_DIM, EXACT) * key_scale[:, None] * sign[None, :]
            key += tl.load(means + head[:, None] * HEAD_DIM + channel[None, :])
            value = _decode(value_words, grid, BLOCK, HEAD_DIM, EXACT) * value_scale[:, None] * sign[None, :]
            slot = tl.load(targets + place, mask=there, other=0).to(tl.int64)
            target = (head.to(tl.int64) * head_stride + slot * HEAD_DIM)[:, None] + channel[None, :]
            tl.store(keys + target, key, mask=valid)
            tl.store(values + target, value, mask=valid)


def fetch_rows(
    lanes: Tensor,
    num_missing: Tensor,
    rows: Tensor,
    grid: Tensor,
    signs: Tensor,
    means: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    programs: int = 256,
    block_rows: int = 16,
) -> None:
    """Bring the missing rows of one layer from host memory into the pool.

    lanes: int64 [B, fields]; num_missing: int32 [B, S], as `find_rows` left them; S is 1 (one set for all
        heads) or H (one per head)
    rows: uint8 [index slots, H * (D + 4)] in page-locked host memory: key codes of all heads, value codes,
        scales (see IndexPool); D is 64 or 128
    grid: float32 [256, 2]; signs: float32 [D]; means: float32 [H, D], of the keys of this layer
    keys, values: [H, slots, D], the pool of one layer, any float dtype, the slots of a head side by side
    programs: about how many blocks of rows are in work at a time; limits what the kernel takes of the device.
        More than the default are no faster, as the bus is full; half as many take 1.25 times as long.
    Twin: aquifer.compression.landmarks.TokenCodec.decode_rows, and an assignment.
    """
    heads, _, head_dim = keys.shape
    requests, sets = num_missing.shape
    expect("lanes", lanes, (requests, FIELDS.value), torch.int64)
    expect("num_missing", num_missing, (None, None), torch.int32)
    expect("rows", rows, (None, heads * (head_dim + SCALES_BYTES)), torch.uint8)
    expect("grid", grid, (256, 2), torch.float32)
    expect("signs", signs, (head_dim,), torch.float32)
    expect("means", means, (heads, head_dim), torch.float32)
    expect_pool(keys, values, heads, head_dim, FLOATS)
    expect_power_of_two("head_dim", head_dim, 64, 128)
    expect_power_of_two("block_rows", block_rows, 16, 128)
    if sets not in (1, heads):
        raise ValueError(f"{sets} sets of tokens for {heads} heads; needed: 1 or {heads}")
    if not rows.is_contiguous():
        raise ValueError("rows are not contiguous")
    if keys.is_cuda and not rows.is_pinned():
        raise ValueError("rows are in pageable memory, which the device cannot read; pin them")
    _fetch_rows[(max(1, programs // (requests * sets)), sets, requests)](
        lanes,
        num_missing,
        rows.view(torch.int32),
        grid,
        signs,
        means,
        keys,
        values,
        keys.stride(0),
        HEADS=heads,
        SHARED=sets == 1,
        HEAD_DIM=head_dim,
        NORM=head_dim**-0.5,
        EXACT=keys.dtype == torch.float32,
        BLOCK=block_rows,
        num_warps=4,
    )
