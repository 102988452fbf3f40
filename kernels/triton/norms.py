"""RMSNorm, with the sum before it, and SwiGLU: small steps of every layer, each a single pass over memory.

A decode step of one token is bound by the weights and by launches, so what counts here is that each step is
one kernel in place of five.

Bytes moved: rms_norm one element read and one written per value, add_rms_norm two of each; swiglu two read
and one written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import FLOATS, expect, expect_power_of_two

MAX_WIDTH = 1 << 15
"""Values of a row that the registers of one program hold."""


@triton.jit
def _rms_norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    epsilon: tl.tensor,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row."""
    column = tl.arange(0, BLOCK)
    place, exists = tl.program_id(0).to(tl.int64) * WIDTH + column, column < WIDTH
    values = tl.load(x + place, mask=exists, other=0.0)
    if ADD:
        values = values.to(tl.float32) + tl.load(residual + place, mask=exists, other=0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)  # the norm is that of the sum as it is kept
        tl.store(total + place, values, mask=exists)
    wide = values.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / WIDTH + epsilon)
    normed = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + place, normed * tl.load(weight + column, mask=exists, other=0.0), mask=exists)


@triton.jit
def _swiglu(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One block of one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    g = tl.load(gate + row * gate_stride + column, mask=exists, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, g / (1.0 + tl.exp(-g)) * u, mask=exists)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight, over the last dimension.

    x: float [..., N], contiguous; weight: [N], in x's dtype
    Twin: aquifer.kernels.norms.rms_norm.
    """
    out, _ = _normed(x, None, weight, epsilon)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); residual like x.

    Twin: aquifer.kernels.norms.add_rms_norm.
    """
    return _normed(x, residual, weight, epsilon)


def swiglu(gate: Tensor, up: Tensor, *, block: int = 1024) -> Tensor:
    """gate * sigmoid(gate) * up.

    gate, up: [T, F], float, of one dtype; rows may be strided, such as two halves of one product
    block: values per program, a power of two. The default is to be measured.
    Computes in float32 and rounds once. Twin: aquifer.kernels.norms.swiglu.
    """
    rows, width = gate.shape
    expect("gate", gate, (None, None), FLOATS)
    expect("up", up, (rows, width), gate.dtype)
    expect_power_of_two("block", block, 16, 8192)
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    grid = (rows, triton.cdiv(width, block))
    _swiglu[grid](gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=block, num_warps=4)
    return out


def _normed(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    expect("x", x, (None,) * x.ndim, FLOATS)
    expect("weight", weight, (width,), x.dtype)
    if residual is not None:
        expect("residual", residual, x.shape, x.dtype)
    if not all(t.is_contiguous() for t in (x, x if residual is None else residual)):
        raise ValueError(f"rows of strides {x.stride()} are not contiguous")
    if width > MAX_WIDTH:
        raise ValueError(f"rows of {width} values are too wide; at most {MAX_WIDTH}")
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _rms_norm[(x.numel() // width,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        total,
        epsilon,
        ADD=residual is not None,
        WIDTH=width,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return out, total
