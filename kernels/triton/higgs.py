"""HIGGS: decoding residuals onto a prediction, and encoding them.

A point of a grid of dimension d is addressed by an index of 4, 6 or 8 bits, wherever in a byte it starts;
its d values lie side by side in table, base and output. Encoding computes a group's scale, looks each point
up in the cell table and packs, all in one pass over the group.

Bytes moved per value: decoding reads bits/8 and 4 (base) and writes an element of the output; encoding reads
4 and writes bits/8. A scale of 2 bytes per group comes on top.

Codes must be the same bytes as the plain code's, so what it rounds twice is rounded twice here (the cell of a
value), and what it fuses is fused (the residual onto its prediction); the compiler decides neither.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.higgs import CELLS, Quantizer
from aquifer.kernels.packing import indices_per_unit
from aquifer.kernels.triton.checks import FLOATS, expect, expect_power_of_two


@triton.jit
def _decode_add(
    base: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    grid: tl.tensor,
    out: tl.tensor,
    num_points: tl.tensor,
    base_stride: tl.tensor,
    out_stride: tl.tensor,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    DIMENSION: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of points, counted over all rows."""
    per_row: tl.constexpr = CHANNELS // DIMENSION
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = point < num_points
    row, column = (point // per_row).to(tl.int64), point % per_row

    first_bit = column * BITS
    byte = codes + row * (per_row * BITS // 8) + first_bit // 8
    index = tl.load(byte, mask=exists, other=0).to(tl.int32)
    if BITS < 8:
        shift = first_bit % 8
        spills = exists & (shift + BITS > 8)
        index = index | (tl.load(byte + 1, mask=spills, other=0).to(tl.int32) << 8)
        index = (index >> shift) & ((1 << BITS) - 1)

    axis = tl.arange(0, DIMENSION)
    values = tl.load(grid + index[:, None] * DIMENSION + axis[None, :])
    scale = tl.load(scales + point * DIMENSION // GROUP, mask=exists, other=0.0).to(tl.float32)
    channel = column[:, None] * DIMENSION + axis[None, :]
    there = exists[:, None]
    prediction = tl.load(base + row[:, None] * base_stride + channel, mask=there, other=0.0)
    decoded = tl.fma(values, scale[:, None], prediction)
    tl.store(out + row[:, None] * out_stride + channel, decoded, mask=there)


@triton.jit
def _encode(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    cells: tl.tensor,
    num_groups: tl.tensor,
    GROUP: tl.constexpr,
    DIMENSION: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    AXIS_CELLS: tl.constexpr,
    TO_CELLS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of groups, counted over all rows. A unit of indices fills whole bytes."""
    points: tl.constexpr = GROUP // DIMENSION
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = group < num_groups
    point, axis = tl.arange(0, points), tl.arange(0, DIMENSION)
    channel = point[:, None] * DIMENSION + axis[None, :]
    values = tl.load(
        x + group[:, None, None] * GROUP + channel[None, :, :], mask=exists[:, None, None], other=0.0
    )

    rms = tl.sqrt_rn(tl.sum(tl.sum(values * values, axis=2), axis=1)) * NORM
    scale = tl.minimum(rms, 65504.0).to(tl.float16)
    tl.store(scales + group, scale, mask=exists)
    wide = scale.to(tl.float32)
    per_cell = tl.where(wide > 0.0, tl.div_rn(1.0, tl.where(wide > 0.0, wide, 1.0)), 0.0) * TO_CELLS

    # Clamped before it becomes an integer, which a huge value would not fit into.
    cell = values * per_cell[:, None, None] + AXIS_CELLS / 2
    cell = tl.minimum(tl.maximum(cell, 0.0), AXIS_CELLS - 1.0).to(tl.int32)
    # The first coordinate counts most: its cells are a whole table of the others apart.
    radix = tl.full([DIMENSION], 1, dtype=tl.int32)
    for power in tl.static_range(1, DIMENSION):
        radix = tl.where(axis < DIMENSION - power, radix * AXIS_CELLS, radix)
    index = tl.load(cells + tl.sum(cell * radix[None, None, :], axis=2)).to(tl.int32)

    units: tl.constexpr = points // UNIT
    unit_bytes: tl.constexpr = UNIT * BITS // 8
    place = tl.arange(0, UNIT)
    word = tl.sum(tl.reshape(index, [BLOCK, units, UNIT]) << (place * BITS)[None, None, :], axis=2)
    byte = tl.arange(0, 4)  # tiles are powers of two; the largest unit has three
    packed = (word[:, :, None] >> (byte * 8)[None, None, :]) & 255
    where = group[:, None] * (units * unit_bytes) + tl.arange(0, units)[None, :] * unit_bytes
    tl.store(
        codes + where[:, :, None] + byte[None, None, :],
        packed.to(tl.uint8),
        mask=exists[:, None, None] & (byte < unit_bytes)[None, None, :],
    )


def higgs_decode_add(
    base: Tensor,
    codes: Tensor,
    scale: Tensor,
    quantizer: Quantizer,
    out: Tensor,
    *,
    block_points: int = 512,
) -> None:
    """out = base + what the codes stand for, still rotated.

    base: float32 [T, C]; out: [T, C], any float dtype; rows of both may be strided, base's by 0 as well
    codes: uint8 [T, C*bits/8]; scale: float16 [T, C/G]
    block_points: points of the grid per program. The default is to be measured.
    Computes in float32 and rounds once. Twin: aquifer.kernels.higgs.higgs_decode_add, bit for bit.
    """
    tokens, channels = base.shape
    groups = scale.shape[1]
    expect("base", base, (None, None), torch.float32)
    expect("out", out, (tokens, channels), FLOATS)
    expect("codes", codes, (tokens, quantizer.code_bytes(channels)), torch.uint8)
    expect("scale", scale, (tokens, groups), torch.float16)
    expect_power_of_two("block_points", block_points, 16, 4096)
    if channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups")
    if base.numel() >= 2**31:
        raise ValueError(f"{base.numel():,} values at once are too many to be counted in 32 bits")
    num_points = base.numel() // quantizer.dimension
    _decode_add[(triton.cdiv(num_points, block_points),)](
        base,
        codes.contiguous(),
        scale.contiguous(),
        quantizer.grid,
        out,
        num_points,
        base.stride(0),
        out.stride(0),
        CHANNELS=channels,
        GROUP=channels // groups,
        DIMENSION=quantizer.dimension,
        BITS=quantizer.index_bits,
        BLOCK=block_points,
        num_warps=4,
        enable_fp_fusion=False,
    )


def higgs_encode(
    x: Tensor, quantizer: Quantizer, group: int, *, block_values: int = 1024
) -> tuple[Tensor, Tensor]:
    """Round rotated values to the grid.

    x: [T, C] float32, any finite values; G = group divides C, a power of two from 8 to 4096
    block_values: per program, at least one group. The default is to be measured.
    Returns codes uint8 [T, C*bits/8] and scale float16 [T, C/G].
    Twin: aquifer.kernels.higgs.higgs_encode. Equal scales give equal bytes; a scale itself may differ in its
    last bit, once in thousands of groups, because sums of squares are added in another order.
    """
    tokens, channels = x.shape
    expect("x", x, (None, None), torch.float32)
    expect_power_of_two("group", group, 8, 4096)
    expect_power_of_two("block_values", block_values, 8, 8192)
    if channels % group:
        raise ValueError(f"{channels} channels do not divide into groups of {group}")
    count, reach = CELLS[quantizer.dimension]
    codes = torch.empty(tokens, quantizer.code_bytes(channels), dtype=torch.uint8, device=x.device)
    scale = torch.empty(tokens, channels // group, dtype=torch.float16, device=x.device)
    block = max(1, block_values // group)
    _encode[(triton.cdiv(scale.numel(), block),)](
        x.contiguous(),
        codes,
        scale,
        quantizer.cells,
        scale.numel(),
        GROUP=group,
        DIMENSION=quantizer.dimension,
        BITS=quantizer.index_bits,
        UNIT=indices_per_unit(quantizer.index_bits),
        AXIS_CELLS=count,
        TO_CELLS=count / (2 * reach),
        NORM=group**-0.5,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, scale
