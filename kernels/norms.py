"""RMSNorm, with the sum before it, and SwiGLU: twins of the kernels in triton/norms.py."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight, over the last dimension.

    x: float [..., N]; weight: [N], in x's dtype
    Computes in float32; the normed row is rounded to x's dtype before it is weighted, as models do.
    Source: arXiv 1910.07467.
    """
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, epsilon), total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, in float32, rounded once. gate, up: [T, F]. Source: arXiv 2002.05202."""
    return (gate.float() * gate.float().sigmoid() * up.float()).to(gate.dtype)
