from __future__ import annotations

import pytest
import torch

from aquifer.kernels.rope import apply_rope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_has_the_bits_of_its_definition(dtype: torch.dtype) -> None:
    x, angles = torch.randn(37, 3, 16).to(dtype), torch.randn(37, 8).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    other_half = torch.cat((-x[..., 8:], x[..., :8]), dim=-1)
    assert torch.equal(apply_rope(x, cos, sin), x * cos[:, None] + other_half * sin[:, None])


def test_pairs_turn_by_their_angle_and_keep_their_length() -> None:
    x = torch.randn(5, 2, 8)
    quarter = torch.full((5, 8), torch.pi / 2)
    turned = apply_rope(x, quarter.cos(), quarter.sin())
    torch.testing.assert_close(turned, torch.cat((-x[..., 4:], x[..., :4]), dim=-1))
