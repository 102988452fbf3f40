"""HIGGS encoding: a group's scale, a look-up of each point in the cell table, and packing, in one pass.

Bytes moved per value: 4 read, bits/8 written. A scale of 2 bytes per group comes on top.

Codes must be the same bytes as the plain code's, so what it rounds twice (the cell of a value) is rounded
twice here; the compiler does not decide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.higgs import CELLS, Quantizer
from aquifer.kernels.packing import indices_per_unit
from aquifer.kernels.triton.checks import expect, expect_power_of_two


@triton.jit
def group_scale(values: tl.tensor, NORM: tl.constexpr) -> tl.tensor:
    """Scales float16 [N] of groups [N, P, DIMENSION]: root mean squares, as they are stored. NORM: G^-0.5."""
    rms = tl.sqrt_rn(tl.sum(tl.sum(values * values, axis=2), axis=1)) * NORM
    return tl.minimum(rms, 65504.0).to(tl.float16)


@triton.jit
def nearest(
    values: tl.tensor,
    scale: tl.tensor,
    cells: tl.tensor,
    DIMENSION: tl.constexpr,
    AXIS_CELLS: tl.constexpr,
    TO_CELLS: tl.constexpr,
) -> tl.tensor:
    """Indices int32 [N, P] of the grid points next to values [N, P, DIMENSION] / scale, float32 [N]."""
    per_cell = tl.where(scale > 0.0, tl.div_rn(1.0, tl.where(scale > 0.0, scale, 1.0)), 0.0) * TO_CELLS
    # Clamped before it becomes an integer, which a huge value would not fit into.
    cell = values * per_cell[:, None, None] + AXIS_CELLS / 2
    cell = tl.minimum(tl.maximum(cell, 0.0), AXIS_CELLS - 1.0).to(tl.int32)
    # The first coordinate counts most: its cells are a whole table of the others apart.
    axis = tl.arange(0, DIMENSION)
    radix = tl.full([DIMENSION], 1, dtype=tl.int32)
    for power in tl.static_range(1, DIMENSION):
        radix = tl.where(axis < DIMENSION - power, radix * AXIS_CELLS, radix)
    return tl.load(cells + tl.sum(cell * radix[None, None, :], axis=2)).to(tl.int32)


@triton.jit
def store_codes(
    index: tl.tensor, codes: tl.tensor, exists: tl.tensor, BITS: tl.constexpr, UNIT: tl.constexpr
) -> None:
    """Pack indices int32 [N, P] to pointers [N], where they exist. A unit of indices fills whole bytes."""
    points: tl.constexpr = index.shape[1]
    if BITS == 8:
        tl.store(codes[:, None] + tl.arange(0, points)[None, :], index.to(tl.uint8), mask=exists[:, None])
    else:
        units: tl.constexpr = points // UNIT
        unit_bytes: tl.constexpr = UNIT * BITS // 8
        shift = tl.arange(0, UNIT) * BITS
        word = tl.sum(tl.reshape(index, [index.shape[0], units, UNIT]) << shift[None, None, :], axis=2)
        byte = tl.arange(0, 4)  # tiles are powers of two; the largest unit has three
        packed = (word[:, :, None] >> (byte * 8)[None, None, :]) & 255
        where = codes[:, None] + tl.arange(0, units)[None, :] * unit_bytes
        tl.store(
            where[:, :, None] + byte[None, None, :],
            packed.to(tl.uint8),
            mask=exists[:, None, None] & (byte < unit_bytes)[None, None, :],
        )


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
    """One block of groups, counted over all rows."""
    points: tl.constexpr = GROUP // DIMENSION
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = group < num_groups
    point, axis = tl.arange(0, points), tl.arange(0, DIMENSION)
    channel = point[:, None] * DIMENSION + axis[None, :]
    values = tl.load(
        x + group[:, None, None] * GROUP + channel[None, :, :], mask=exists[:, None, None], other=0.0
    )

    scale = group_scale(values, NORM)
    tl.store(scales + group, scale, mask=exists)
    index = nearest(values, scale.to(tl.float32), cells, DIMENSION, AXIS_CELLS, TO_CELLS)
    store_codes(index, codes + group * (points * BITS // 8), exists, BITS, UNIT)


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
