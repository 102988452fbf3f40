"""What several kernels are tested on. Imports Triton, so only for tests that run kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from aquifer.kernels.hadamard import Rotation
from aquifer.kernels.triton.lanes import Lane


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def rotated_state(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Rotation, Tensor, tuple[Tensor, Tensor]]:
    """A rotation, keys beside values [T, 2C] in rows that are longer, and cos and sin [T, D]."""
    channels = heads * head_dim
    state = normal(tokens, 3 * channels, device=device).to(dtype)[:, channels:]
    angles = normal(tokens, head_dim, device=device)
    # Not the usual table with equal halves: a mistaken half would not show.
    return Rotation.of(channels, 3, device), state, (angles.cos().to(dtype), angles.sin().to(dtype))


def a_lane(sets: int, count: int, device: torch.device, *, cells: int = 40, pages: int = 3) -> Lane:
    """Pages 2, 0, ... of the index; the tail in pages 5 and 1 of the pool, rows in 3 and 2."""
    return Lane(
        [2, 0, 1][:pages],
        [5, 1],
        [3, 2],
        layers=2,
        sets=sets,
        num_q_heads=2,
        wanted=count,
        cells=cells,
        device=device,
    )
