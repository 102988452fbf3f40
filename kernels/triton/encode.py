"""Encoding in AQUA-KV's chain over the layers: one pass rotates half of a layer, codes what the prediction
misses, and makes the state that decoding will come to. The prediction, and decoding, are in chain.py.

Bytes moved per value: 2 of the half and 4 of the prediction read, 2 of state and bits/8 of codes written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.higgs import CELLS, Quantizer
from aquifer.kernels.packing import indices_per_unit
from aquifer.kernels.prediction import Copy
from aquifer.kernels.triton.chain import plus, to_int8, value
from aquifer.kernels.triton.checks import FLOATS, expect, expect_power_of_two
from aquifer.kernels.triton.hadamard import LEAST, factors, turn_group
from aquifer.kernels.triton.higgs import group_scale, nearest, store_codes


@triton.jit
def _encode_rows(
    x: tl.tensor,
    signs: tl.tensor,
    prediction: tl.tensor,
    cells: tl.tensor,
    grid: tl.tensor,
    offsets: tl.tensor,
    data: tl.tensor,
    state: tl.tensor,
    copy: tl.tensor,
    centre: tl.tensor,
    damaged: tl.tensor,
    step: tl.tensor,
    factor: tl.tensor,
    count: tl.tensor,
    half: tl.tensor,
    x_stride: tl.tensor,
    prediction_stride: tl.tensor,
    offset_stride: tl.tensor,
    state_stride: tl.tensor,
    copy_stride: tl.tensor,
    GROUP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DIMENSION: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    AXIS_CELLS: tl.constexpr,
    TO_CELLS: tl.constexpr,
    NORM: tl.constexpr,
    EXACT: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One Hadamard group of a block of tokens."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = token < count
    group = tl.program_id(1)
    flat = group * GROUP + tl.arange(0, GROUP)
    wide_token = token.to(tl.int64)
    rows = tl.load(x + wide_token[:, None] * x_stride + flat[None, :], mask=exists[:, None], other=0.0).to(
        tl.float32
    )
    # NaN fails the comparison as well, and would be no place in a table. Any program may set the flag.
    finite = tl.abs(rows) <= 3.4028234663852886e38
    bad = tl.max(finite.to(tl.int32) ^ 1, axis=1)
    tl.store(damaged + token, bad, mask=exists & (bad != 0))

    rows = tl.where(finite, rows, 0.0) * tl.load(signs + flat)[None, :]
    rows = turn_group(rows, LEFT, RIGHT, EXACT) * NORM
    points: tl.constexpr = GROUP // DIMENSION
    rows = tl.reshape(rows, [BLOCK, points, DIMENSION])

    axis = tl.arange(0, DIMENSION)
    channel = group * GROUP + tl.arange(0, points)[:, None] * DIMENSION + axis[None, :]
    there = exists[:, None, None]
    start = prediction + wide_token[:, None, None] * prediction_stride + channel[None, :, :]
    predicted = tl.load(start, mask=there, other=0.0)
    missed = rows - predicted

    scale = group_scale(missed, NORM)
    scales = (data + tl.load(offsets + (2 + half) * offset_stride + token, mask=exists, other=0)).to(
        tl.pointer_type(tl.float16)
    )
    tl.store(scales + group, scale, mask=exists)
    wide = scale.to(tl.float32)
    index = nearest(missed, wide, cells, DIMENSION, AXIS_CELLS, TO_CELLS)
    own_scale = wide * step
    residual = value(index, own_scale, grid, DIMENSION, state.dtype.element_ty)
    done = plus(predicted, residual, own_scale[:, None, None]).to(state.dtype.element_ty)
    tl.store(state + wide_token[:, None, None] * state_stride + channel[None, :, :], done, mask=there)
    if COPY:
        rounded = to_int8(done, tl.load(centre + channel)[None, :, :], factor)
        tl.store(copy + wide_token[:, None, None] * copy_stride + channel[None, :, :], rounded, mask=there)

    own_codes = tl.load(offsets + half * offset_stride + token, mask=exists, other=0)
    store_codes(index, data + own_codes + group * (points * BITS // 8), exists, BITS, UNIT)


def encode_rows(
    x: Tensor,
    signs: Tensor,
    group: int,
    prediction: Tensor,
    quantizer: Quantizer,
    half: int,
    offsets: Tensor,
    data: Tensor,
    state: Tensor,
    damaged: Tensor,
    copy: Copy | None = None,
    *,
    block_tokens: int = 2,
) -> None:
    """Code half of a layer, and make the state that decoding will come to.

    x: [T, C], any float dtype, rows may be strided; signs: float32 [C]; group: G
    prediction: float32 [T, C], rows may be strided, by 0 as well
    half: 0 for keys, 1 for values
    offsets: int32 [4, T], see chain.KEY_CODES, into data, uint8 [B], where codes and scales go
    state: [T, C], rows may be strided
    damaged: int32 [T], set to 1 for rows that hold a value that is not finite
    copy: of the state, to be written as well
    block_tokens: per program. 2 and 4 are alike on an H200, 1 takes half as long again.
    Twin: aquifer.kernels.hadamard.Rotation.rotate, then aquifer.kernels.higgs.higgs_encode of the difference.
    """
    tokens, channels = x.shape
    expect("x", x, (None, None), FLOATS)
    expect("signs", signs, (channels,), torch.float32)
    expect("prediction", prediction, (tokens, channels), torch.float32)
    expect("offsets", offsets, (4, tokens), torch.int32)
    expect("data", data, (None,), torch.uint8)
    expect("state", state, (tokens, channels), FLOATS)
    expect("damaged", damaged, (tokens,), torch.int32)
    if copy is not None:
        expect("copy", copy.rows, (tokens, channels), torch.int8)
    expect_power_of_two("group", group, 16, 4096)
    axis_cells, reach = CELLS[quantizer.dimension]
    left, right = factors(group)
    block_tokens = max(block_tokens, LEAST // left)
    _encode_rows[(triton.cdiv(tokens, block_tokens), channels // group)](
        x,
        signs,
        prediction,
        quantizer.cells,
        quantizer.table,
        offsets,
        data,
        state,
        copy.rows if copy else state,
        copy.rounding.centre if copy else signs,
        damaged,
        quantizer.step,
        copy.rounding.factor if copy else 0.0,
        tokens,
        half,
        x.stride(0),
        prediction.stride(0),
        offsets.stride(0),
        state.stride(0),
        copy.rows.stride(0) if copy else 0,
        GROUP=group,
        LEFT=left,
        RIGHT=right,
        DIMENSION=quantizer.dimension,
        BITS=quantizer.index_bits,
        UNIT=indices_per_unit(quantizer.index_bits),
        AXIS_CELLS=axis_cells,
        TO_CELLS=axis_cells / (2 * reach),
        NORM=group**-0.5,
        EXACT=x.dtype == torch.float32,
        COPY=copy is not None,
        BLOCK=block_tokens,
        num_warps=4,
        enable_fp_fusion=False,
    )
