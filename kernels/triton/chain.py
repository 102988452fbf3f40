"""A step of AQUA-KV's chain over the layers: predict half of a layer from the state, and add its residual.

    state      [T, 2C], the two halves of the layer before (for values: values before, and the layer's keys)
    decoding   one GEMM, which adds the residual straight from stored bytes before it writes a row
    encoding   the same GEMM gives the prediction in float32; encode.py codes what it misses

A row's bits do not depend on the rows beside it: every tile sums over K in the same order. So rows encoded a
few at a time are decoded to the same state in a batch of any size, which cuBLAS does not promise.

The arithmetic is `round(x @ weight + bias + round(value * scale))`, with the sum in float32 and both
roundings to the state's dtype. The plain code (compression/chain.py) does not round the residual by itself.

Bytes moved by a step, in 16 bits: 4 C + bits/8 * C read and 2 C written per token. It is bound by its 4 C^2
operations. Per half of a layer and 32,768 tokens with C = 1024, on an H200: 222 us, without the residual 195;
cuBLAS needs 180 without it and 220 if it adds a residual that another pass has to decode first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from aquifer.kernels.higgs import Quantizer
from aquifer.kernels.triton.checks import FLOATS, expect

KEY_CODES, VALUE_CODES, KEY_SCALES, VALUE_SCALES = range(4)
"""Rows of a table of offsets, int32 [4, T]: where in a buffer of bytes a token has its parts of a layer."""

ROWS, DEPTH = 128, 64
"""Of a tile of the GEMM. It is the same at any number of tokens, or bits would depend on that."""

COLUMNS = 128
"""Channels must be whole multiples of this."""


@triton.jit
def _point(codes: tl.tensor, point: tl.tensor, there: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Indices uint8 [T, P] of points from packed rows. codes: [T] pointers to rows; there: [T, 1]."""
    # Rows of codes are whole units of 16 bytes and begin at one.
    codes = tl.multiple_of(codes, 16)
    if BITS == 8:  # not divided, so that the compiler sees which bytes are neighbours
        index = tl.load(codes[:, None] + point[None, :], mask=there, other=0)
    else:
        first_bit = point * BITS
        byte = codes[:, None] + (first_bit // 8)[None, :]
        index = tl.load(byte, mask=there, other=0)
        shift = first_bit % 8
        spills = there & (shift + BITS > 8)[None, :]
        behind = tl.load(byte + 1, mask=spills, other=0).to(tl.int32) << 8
        index = (((index.to(tl.int32) | behind) >> shift[None, :]) & ((1 << BITS) - 1)).to(tl.uint8)
    return index


@triton.jit
def _value(
    index: tl.tensor, scale: tl.tensor, grid: tl.tensor, DIMENSION: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """Residuals [T, P, DIMENSION] in DTYPE. scale: float32 [T]."""
    axis = tl.arange(0, DIMENSION)
    values = tl.load(grid + index.to(tl.int32)[:, :, None] * DIMENSION + axis[None, None, :])
    return (values * scale[:, None, None]).to(DTYPE)


@triton.jit
def _decode_rows(
    data: tl.tensor,
    offsets: tl.tensor,
    grid: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    offset_stride: tl.tensor,
    row_stride: tl.tensor,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    DIMENSION: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    POINTS: tl.constexpr,
) -> None:
    """Some points, which share a scale, of a block of tokens; keys and values side by side."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = token < count
    half = tl.program_id(2)
    own_codes = tl.load(offsets + half * offset_stride + token, mask=exists, other=0)
    own_scales = tl.load(offsets + (2 + half) * offset_stride + token, mask=exists, other=0)
    scales = (data + own_scales).to(tl.pointer_type(tl.float16))
    group = tl.program_id(1) * POINTS * DIMENSION // GROUP
    scale = tl.load(scales + group, mask=exists, other=0.0).to(tl.float32)

    point = tl.program_id(1) * POINTS + tl.arange(0, POINTS)
    index = _point(data + own_codes, point, exists[:, None], BITS)
    channel = half * CHANNELS + point[:, None] * DIMENSION + tl.arange(0, DIMENSION)[None, :]
    values = tl.load(bias + channel)[None, :, :] + _value(
        index, scale, grid, DIMENSION, out.dtype.element_ty
    ).to(tl.float32)
    where = out + token.to(tl.int64)[:, None, None] * row_stride + channel[None, :, :]
    tl.store(where, values.to(out.dtype.element_ty), mask=exists[:, None, None])


@triton.jit
def _step(
    state: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    data: tl.tensor,
    offsets: tl.tensor,
    grid: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    half: tl.tensor,
    offset_stride: tl.tensor,
    out_stride: tl.tensor,
    CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    DIMENSION: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    """One tile. The state's columns meet the weight's rows from FIRST on, and then those before. TOGETHER
    tiles of rows are taken through all columns before the next ones, for the L2 cache."""
    tiles: tl.constexpr = CHANNELS // COLUMNS
    number = tl.program_id(0)
    first = number // (TOGETHER * tiles) * TOGETHER
    height = tl.minimum(tl.cdiv(count, ROWS) - first, TOGETHER)
    within = number % (TOGETHER * tiles)
    row, column = (first + within % height) * ROWS, within // height * COLUMNS
    token = row + tl.arange(0, ROWS)
    exists = token < count
    if ADD:
        # Codes are on their way while the tile is summed up.
        own_codes = tl.load(offsets + half * offset_stride + token, mask=exists, other=0)
        own_scales = tl.load(offsets + (2 + half) * offset_stride + token, mask=exists, other=0)
        scales = (data + own_scales).to(tl.pointer_type(tl.float16))
        scale = tl.load(scales + column // GROUP, mask=exists, other=0.0).to(tl.float32)
        point = column // DIMENSION + tl.arange(0, COLUMNS // DIMENSION)
        index = _point(data + own_codes, point, exists[:, None], BITS)

    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for k in range(0, 2 * CHANNELS, DEPTH):
        left, right = state.load([row, k]), weight.load([(k + FIRST) % (2 * CHANNELS), column])
        total = tl.dot(left, right, total)

    channel = column + tl.arange(0, COLUMNS)
    total += tl.load(bias + channel)[None, :]
    if ADD:
        residual = _value(index, scale, grid, DIMENSION, out.dtype.element_ty)
        total += tl.reshape(residual, [ROWS, COLUMNS]).to(tl.float32)
    where = out + token.to(tl.int64)[:, None] * out_stride + channel[None, :]
    tl.store(where, total.to(out.dtype.element_ty), mask=exists[:, None])


def decode_rows(
    data: Tensor,
    offsets: Tensor,
    quantizer: Quantizer,
    group: int,
    bias: Tensor,
    out: Tensor,
    *,
    block_tokens: int = 2,
    block_points: int = 256,
) -> None:
    """A layer that nothing is predicted from: bias and residuals, keys beside values, still rotated.

    data: uint8 [B]; offsets: int32 [4, T], see KEY_CODES; group: G; bias: float32 [2, C]
    out: [T, 2C], any float dtype, rows may be strided
    block_tokens, block_points: per program. The defaults are the fastest of nine on an H200.
    Twin: aquifer.kernels.higgs.higgs_decode_ref, rounded to out's dtype, plus the bias.
    """
    tokens, width = out.shape
    channels = width // 2
    expect("data", data, (None,), torch.uint8)
    expect("offsets", offsets, (4, tokens), torch.int32)
    expect("bias", bias, (2, channels), torch.float32)
    expect("out", out, (tokens, 2 * channels), FLOATS)
    block_points = min(block_points, group // quantizer.dimension)
    grid = (triton.cdiv(tokens, block_tokens), channels // quantizer.dimension // block_points, 2)
    _decode_rows[grid](
        data,
        offsets,
        quantizer.grid,
        bias,
        out,
        tokens,
        offsets.stride(0),
        out.stride(0),
        CHANNELS=channels,
        GROUP=group,
        DIMENSION=quantizer.dimension,
        BITS=quantizer.index_bits,
        BLOCK=block_tokens,
        POINTS=block_points,
        num_warps=4,
    )


def predict(state: Tensor, half: int, weight: Tensor, bias: Tensor, group: int, out: Tensor) -> None:
    """out = state @ weight + bias.

    state: [T, 2C], float16 or bfloat16, rows may be strided: for keys (half 0) keys beside values of the
    layer before, for values (half 1) those values beside this layer's keys
    weight: [2C, C] of the same dtype, contiguous, its rows for keys first; bias: float32 [C]
    group: G, a power of two; out: float32 [T, C]
    A row's bits do not depend on T. Raises ValueError where C or G is not a multiple of COLUMNS.
    Twin: torch.addmm.
    """
    expect("out", out, (len(state), weight.shape[1]), torch.float32)
    _launch(state, half, weight, bias, group, out, None)


def predict_and_add(
    state: Tensor,
    half: int,
    weight: Tensor,
    bias: Tensor,
    group: int,
    data: Tensor,
    offsets: Tensor,
    quantizer: Quantizer,
    out: Tensor,
) -> None:
    """Decode half of a layer: `predict`, plus the residual.

    data: uint8 [B]; offsets: int32 [4, T], see KEY_CODES
    out: [T, C], of the state's dtype, rows may be strided
    """
    expect("data", data, (None,), torch.uint8)
    expect("offsets", offsets, (4, len(state)), torch.int32)
    expect("out", out, (len(state), weight.shape[1]), state.dtype)
    _launch(state, half, weight, bias, group, out, (data, offsets, quantizer))


def _launch(
    state: Tensor,
    half: int,
    weight: Tensor,
    bias: Tensor,
    group: int,
    out: Tensor,
    coded: tuple[Tensor, Tensor, Quantizer] | None,
) -> None:
    tokens, width = state.shape
    channels = width // 2
    expect("state", state, (None, 2 * channels), (torch.float16, torch.bfloat16))
    expect("weight", weight, (2 * channels, channels), state.dtype)
    expect("bias", bias, (channels,), torch.float32)
    if channels % COLUMNS or group % COLUMNS or channels % group:
        raise ValueError(f"{channels} channels in groups of {group} are not whole tiles of {COLUMNS}")
    # Wider tiles are faster; the columns of a tile share their scales.
    columns = min(2 * COLUMNS, group)
    # Without a residual nothing of it is read.
    data, offsets, grid = bias, bias, bias
    dimension, bits = 1, 8
    if coded is not None:
        data, offsets, quantizer = coded
        grid, dimension, bits = quantizer.grid, quantizer.dimension, quantizer.index_bits
    _step[(triton.cdiv(tokens, ROWS) * (channels // columns),)](
        TensorDescriptor(state, [tokens, width], [state.stride(0), 1], [ROWS, DEPTH]),
        TensorDescriptor(weight, [width, channels], [channels, 1], [DEPTH, columns]),
        bias,
        data,
        offsets,
        grid,
        out,
        tokens,
        half,
        offsets.stride(0),
        out.stride(0),
        CHANNELS=channels,
        FIRST=half * channels,
        ADD=coded is not None,
        GROUP=group,
        DIMENSION=dimension,
        BITS=bits,
        ROWS=ROWS,
        COLUMNS=columns,
        DEPTH=DEPTH,
        TOGETHER=8,
        num_warps=8,
        num_stages=3,
    )
