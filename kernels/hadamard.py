"""Rotation by random signs and a block-diagonal Hadamard matrix.

The rotation spreads a row's energy evenly over its channels, so that every value of a group is close to
Gaussian and one scale per group is enough. It is orthonormal: errors keep their size on the way back.

A Sylvester matrix is a Kronecker product, H_ab = H_a ⊗ H_b, so a group of a*b channels takes two GEMMs
with about 2(a+b) operations per channel in place of 2ab for one GEMM with H_ab, and no butterfly passes
over memory.
"""

from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def hadamard_group(channels: int) -> int:
    """G: the largest power of two that divides the channels."""
    return channels & -channels


@cache
def hadamard_matrix(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthonormal Sylvester matrix [size, size], size a power of two: entry (i, j) is
    (-1)^popcount(i & j) / sqrt(size)."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix needs a power of two, not {size}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(size.bit_length() - 1):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return (matrix / size**0.5).to(device, dtype)


def random_signs(count: int, seed: int) -> Tensor:
    """float32 [count] of ±1: the lowest bits of SplitMix64 started at `seed`.

    Stored segments depend on these signs, so they come from a generator that is fixed here and not from
    torch's, whose streams may change between versions and differ between devices.
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    signs = []
    state = seed & _MASK
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        signs.append(1.0 - 2.0 * ((mixed ^ (mixed >> 31)) & 1))
    return torch.tensor(signs)


@dataclass(frozen=True)
class Rotation:
    """H·D(signs), block-diagonal over groups of G channels, on one device."""

    signs: Tensor
    """float32 [C]"""
    group: int

    @classmethod
    def of(cls, channels: int, seed: int, device: torch.device) -> Self:
        """The rotation of rows of C channels, with the largest group that divides them."""
        return cls(random_signs(channels, seed).to(device), hadamard_group(channels))

    def rotate(self, x: Tensor) -> Tensor:
        """x: float32 [T, C]. Returns the rows in the rotated domain."""
        return hadamard(x * self.signs, self.group)

    def unrotate(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The inverse. x: float32 [T, C], or several such rows side by side, [T, k*C].

        Returns the shape of x: `out`, contiguous and of any float dtype, or a float32 tensor without it.
        """
        rows = hadamard(x, self.group).view(-1, len(self.signs))
        return torch.mul(rows, self.signs, out=None if out is None else out.view(rows.shape)).view(x.shape)


def hadamard(x: Tensor, group: int) -> Tensor:
    """Multiply each group of G channels of x [..., C] by the orthonormal Hadamard matrix.

    Computes in x's dtype. Raises ValueError if G does not divide C. Twin: hadamard_ref.
    """
    if x.shape[-1] % group:
        raise ValueError(f"{x.shape[-1]} channels do not divide into groups of {group}")
    right = 1 << (group.bit_length() // 2)
    left = group // right
    blocks = x.reshape(-1, left, right)
    turned = hadamard_matrix(left, x.device, x.dtype) @ (blocks @ hadamard_matrix(right, x.device, x.dtype))
    return turned.view(x.shape)


def hadamard_ref(x: Tensor, group: int) -> Tensor:
    """The same in float64, with the whole matrix."""
    matrix = hadamard_matrix(group, x.device, torch.float64)
    return (x.double().reshape(-1, group) @ matrix).reshape(x.shape)
