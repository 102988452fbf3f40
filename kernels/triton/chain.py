"""A step of AQUA-KV's chain over the layers: predict half of a layer from the state, and add its residual.

    state      [T, 2C], the two halves of the layer before (for values: values before, and the layer's keys)
    decoding   one GEMM, which adds the residual straight from stored bytes before it writes a row
    encoding   the same GEMM gives the prediction in float32; encode.py codes what it misses

A row's bits do not depend on the rows beside it: every tile sums over K in the same order. So rows encoded a
few at a time are decoded to the same state in a batch of any size, which cuBLAS does not promise.

The arithmetic is `round(x @ weight + bias + round(value * scale))`, with the sum in float32 and both
roundings to the state's dtype. The plain code (compression/chain.py) does not round the residual by itself.
In int8 (kernels/prediction.py) it is `round(x @ weight * scales + bias + steps * scale)`: the product is
exact, residuals are steps of an int8 grid, and a copy of the result, rounded to int8, is written beside it.

Bytes moved by a step, in 16 bits: 4 C + bits/8 * C read and 2 C written per token; in int8 2 C read, 3 C
written. It is bound by its 4 C^2 operations. Per half of a layer with C = 1024, on an H200: 241 us for 32,768
tokens and 931 for 131,072; in int8 152 and 573. cuBLAS needs 186 and 708 for the 16-bit product alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from aquifer.kernels.higgs import Quantizer
from aquifer.kernels.prediction import Copy, IntegerLinear, Linear
from aquifer.kernels.triton.checks import FLOATS, expect

KEY_CODES, VALUE_CODES, KEY_SCALES, VALUE_SCALES = range(4)
"""Rows of a table of offsets, int32 [4, T]: where in a buffer of bytes a token has its parts of a layer."""

ROWS, COLUMNS = 128, 128
"""Of a tile of the GEMM. It is the same at any number of tokens, or bits would depend on that. Channels must
be whole multiples of COLUMNS. Two programs fit a multiprocessor, and one adds residuals while one multiplies.
"""

DEPTH_BYTES = 128
"""Of a tile's inputs, along the sum."""

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


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
def value(
    index: tl.tensor, scale: tl.tensor, grid: tl.tensor, DIMENSION: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """Residuals [T, P, DIMENSION] for `plus`: in DTYPE, or in steps of an int8 grid. scale: float32 [T]."""
    axis = tl.arange(0, DIMENSION)
    values = tl.load(grid + index.to(tl.int32)[:, :, None] * DIMENSION + axis[None, None, :])
    if values.dtype != tl.int8:
        values = (values * scale[:, None, None]).to(DTYPE)
    return values


@triton.jit
def plus(base: tl.tensor, residual: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """base, float32, and residuals. scale: float32, to be broadcast; of an int8 grid, times its step."""
    if residual.dtype == tl.int8:
        # One rounding, whatever the compiler likes: encoder and decoder must round alike. Because of int32 it
        # is bytes that go into the layout of the sum, and not floats.
        steps = residual.to(tl.int32).to(tl.float32)
        total = tl.fma(steps, tl.broadcast_to(scale, base.shape), base)
    else:
        total = base + residual.to(tl.float32)
    return total


@triton.jit
def to_int8(x: tl.tensor, centre: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """See aquifer.kernels.prediction.Rounding. x: in the state's dtype; centre: float32, to be broadcast."""
    steps = tl.minimum(tl.maximum((x.to(tl.float32) - centre) * factor, -127.0), 127.0)
    # Beside 1.5 * 2^23 a float32 has no bits for fractions, and its lowest byte is the rounded number's.
    return (steps + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _decode_rows(
    data: tl.tensor,
    offsets: tl.tensor,
    grid: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    copy: tl.tensor,
    step: tl.tensor,
    key_factor: tl.tensor,
    value_factor: tl.tensor,
    count: tl.tensor,
    offset_stride: tl.tensor,
    row_stride: tl.tensor,
    copy_stride: tl.tensor,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    DIMENSION: tl.constexpr,
    BITS: tl.constexpr,
    COPY: tl.constexpr,
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
    scale = tl.load(scales + group, mask=exists, other=0.0).to(tl.float32) * step

    point = tl.program_id(1) * POINTS + tl.arange(0, POINTS)
    index = _point(data + own_codes, point, exists[:, None], BITS)
    channel = half * CHANNELS + point[:, None] * DIMENSION + tl.arange(0, DIMENSION)[None, :]
    centre = tl.load(bias + channel)[None, :, :]
    residual = value(index, scale, grid, DIMENSION, out.dtype.element_ty)
    total = plus(tl.broadcast_to(centre, residual.shape), residual, scale[:, None, None])
    done, there, wide_token = (
        total.to(out.dtype.element_ty),
        exists[:, None, None],
        token.to(tl.int64)[:, None, None],
    )
    tl.store(out + wide_token * row_stride + channel[None, :, :], done, mask=there)
    if COPY:
        rounded = to_int8(done, centre, tl.where(half == 0, key_factor, value_factor))
        tl.store(copy + wide_token * copy_stride + channel[None, :, :], rounded, mask=there)


@triton.jit
def _step(
    state: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    data: tl.tensor,
    offsets: tl.tensor,
    grid: tl.tensor,
    out: tl.tensor,
    copy: tl.tensor,
    step: tl.tensor,
    factor: tl.tensor,
    count: tl.tensor,
    half: tl.tensor,
    offset_stride: tl.tensor,
    out_stride: tl.tensor,
    copy_stride: tl.tensor,
    CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    INTEGER: tl.constexpr,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    DIMENSION: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    """One tile. The state's columns meet the weight's inputs from FIRST on, and then those before. TOGETHER
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
        scale = tl.load(scales + column // GROUP, mask=exists, other=0.0).to(tl.float32) * step
        point = column // DIMENSION + tl.arange(0, COLUMNS // DIMENSION)
        index = _point(data + own_codes, point, exists[:, None], BITS)

    total = tl.zeros([ROWS, COLUMNS], dtype=tl.int32 if INTEGER else tl.float32)
    for k in range(0, 2 * CHANNELS, DEPTH):
        left, inputs = state.load([row, k]), (k + FIRST) % (2 * CHANNELS)
        if INTEGER:
            total = tl.dot(left, weight.load([column, inputs]).T, total, out_dtype=tl.int32)
        else:
            total = tl.dot(left, weight.load([inputs, column]), total)

    channel = column + tl.arange(0, COLUMNS)
    centre = tl.load(bias + channel)[None, :]
    if INTEGER:
        weight_scales = tl.broadcast_to(tl.load(weight_scale + channel)[None, :], total.shape)
        result = tl.fma(total.to(tl.float32), weight_scales, tl.broadcast_to(centre, total.shape))
    else:
        result = total + centre
    if ADD:
        residual = value(index, scale, grid, DIMENSION, out.dtype.element_ty)
        result = plus(result, tl.reshape(residual, [ROWS, COLUMNS]), scale[:, None])
    done, wide_token = result.to(out.dtype.element_ty), token.to(tl.int64)[:, None]
    tl.store(out + wide_token * out_stride + channel[None, :], done, mask=exists[:, None])
    if INTEGER and ADD:
        rounded = to_int8(done, centre, factor)
        tl.store(copy + wide_token * copy_stride + channel[None, :], rounded, mask=exists[:, None])


def decode_rows(
    data: Tensor,
    offsets: Tensor,
    quantizer: Quantizer,
    group: int,
    bias: Tensor,
    out: Tensor,
    copies: tuple[Copy, Copy] | None = None,
    *,
    block_tokens: int = 2,
    block_points: int = 256,
) -> None:
    """A layer that nothing is predicted from: bias and residuals, keys beside values, still rotated.

    data: uint8 [B]; offsets: int32 [4, T], see KEY_CODES; group: G; bias: float32 [2, C]
    out: [T, 2C], any float dtype, rows may be strided
    copies: of keys and of values, to be written as well; side by side in memory, and centred at the bias
    block_tokens, block_points: per program. The defaults are the fastest of nine on an H200.
    Twin: aquifer.kernels.higgs.higgs_decode_ref, rounded to out's dtype, plus the bias.
    """
    tokens, width = out.shape
    channels = width // 2
    expect("data", data, (None,), torch.uint8)
    expect("offsets", offsets, (4, tokens), torch.int32)
    expect("bias", bias, (2, channels), torch.float32)
    expect("out", out, (tokens, 2 * channels), FLOATS)
    keys, values = copies or (None, None)
    for copy in (keys, values):
        if copy:
            expect("copy", copy.rows, (tokens, channels), torch.int8)
    block_points = min(block_points, group // quantizer.dimension)
    grid = (triton.cdiv(tokens, block_tokens), channels // quantizer.dimension // block_points, 2)
    _decode_rows[grid](
        data,
        offsets,
        quantizer.table,
        bias,
        out,
        keys.rows if keys else out,
        quantizer.step,
        keys.rounding.factor if keys else 0.0,
        values.rounding.factor if values else 0.0,
        tokens,
        offsets.stride(0),
        out.stride(0),
        keys.rows.stride(0) if keys else 0,
        CHANNELS=channels,
        GROUP=group,
        DIMENSION=quantizer.dimension,
        BITS=quantizer.index_bits,
        COPY=copies is not None,
        BLOCK=block_tokens,
        POINTS=block_points,
        num_warps=4,
    )


def predict(state: Tensor, half: int, linear: Linear | IntegerLinear, group: int, out: Tensor) -> None:
    """out = linear(state).

    state: [T, 2C], float16 or bfloat16, int8 for IntegerLinear; rows may be strided: for keys (half 0) keys
    beside values of the layer before, for values (half 1) those values beside this layer's keys
    linear: with contiguous weights, of the state's dtype
    group: G, a power of two; out: float32 [T, C]
    A row's bits do not depend on T. Raises ValueError where C or G is not a multiple of COLUMNS.
    Twin: the linear itself.
    """
    expect("out", out, (len(state), len(linear.bias)), torch.float32)
    _launch(state, half, linear, group, out, None, None)


def predict_and_add(
    state: Tensor,
    half: int,
    linear: Linear | IntegerLinear,
    group: int,
    data: Tensor,
    offsets: Tensor,
    quantizer: Quantizer,
    out: Tensor,
    copy: Copy | None = None,
) -> None:
    """Decode half of a layer: `predict`, plus the residual, which is rounded by itself.

    data: uint8 [B]; offsets: int32 [4, T], see KEY_CODES
    out: [T, C], float16 or bfloat16, of the state's dtype unless that is int8; rows may be strided
    copy: for IntegerLinear, and only there, to be written as well; centred at the linear's bias
    Twin: the linear itself, and aquifer.kernels.higgs.higgs_decode_ref.
    """
    expect("data", data, (None,), torch.uint8)
    expect("offsets", offsets, (4, len(state)), torch.int32)
    integer = isinstance(linear, IntegerLinear)
    expect("out", out, (len(state), len(linear.bias)), SIXTEEN_BITS if integer else state.dtype)
    if (copy is not None) != integer:
        raise ValueError("a copy belongs to a prediction in integers, and to no other")
    _launch(state, half, linear, group, out, (data, offsets, quantizer), copy)


def _launch(
    state: Tensor,
    half: int,
    linear: Linear | IntegerLinear,
    group: int,
    out: Tensor,
    coded: tuple[Tensor, Tensor, Quantizer] | None,
    copy: Copy | None,
) -> None:
    tokens, width = state.shape
    channels = width // 2
    integer = isinstance(linear, IntegerLinear)
    expect("state", state, (None, 2 * channels), torch.int8 if integer else SIXTEEN_BITS)
    inputs_first = (2 * channels, channels)
    expect("weight", linear.weight, inputs_first[::-1] if integer else inputs_first, state.dtype)
    expect("bias", linear.bias, (channels,), torch.float32)
    if channels % COLUMNS or group % COLUMNS or channels % group:
        raise ValueError(f"{channels} channels in groups of {group} are not whole tiles of {COLUMNS}")
    # Without a residual nothing of it is read, and without a copy nothing written.
    data, offsets, grid, step, dimension, bits = linear.bias, linear.bias, linear.bias, 1.0, 1, 8
    if coded is not None:
        data, offsets, quantizer = coded
        grid, step, dimension, bits = (
            quantizer.table,
            quantizer.step,
            quantizer.dimension,
            quantizer.index_bits,
        )
    if copy is not None:
        expect("copy", copy.rows, (tokens, channels), torch.int8)
    depth = DEPTH_BYTES // state.itemsize
    block = [COLUMNS, depth] if integer else [depth, COLUMNS]
    _step[(triton.cdiv(tokens, ROWS) * (channels // COLUMNS),)](
        TensorDescriptor(state, [tokens, width], [state.stride(0), 1], [ROWS, depth]),
        TensorDescriptor(linear.weight, list(linear.weight.shape), [linear.weight.shape[1], 1], block),
        linear.scale if isinstance(linear, IntegerLinear) else linear.bias,
        linear.bias,
        data,
        offsets,
        grid,
        out,
        copy.rows if copy else out,
        step,
        copy.rounding.factor if copy else 0.0,
        tokens,
        half,
        offsets.stride(0),
        out.stride(0),
        copy.rows.stride(0) if copy else 0,
        CHANNELS=channels,
        FIRST=half * channels,
        INTEGER=integer,
        ADD=coded is not None,
        GROUP=group,
        DIMENSION=dimension,
        BITS=bits,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=depth,
        TOGETHER=8,
        num_warps=4,
        num_stages=3,
    )
