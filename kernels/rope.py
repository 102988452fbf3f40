"""Rotary position embedding in the half-split layout of Llama, Mistral and Qwen.

cos and sin come from the model's own rotary module (YaRN and llama3 scaling, attention factor
included); they are never rebuilt from frequencies here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of each token by its position.

    x: [T, H, D]; cos, sin: [T, D], in the dtype of x.
    Returns [T, H, D]. Source: RoFormer, arXiv 2104.09864.
    """
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + rotated * sin[:, None]
