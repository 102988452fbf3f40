"""Rotary position embedding in the half-split layout of Llama, Mistral and Qwen.

cos and sin come from the model's own rotary module (YaRN and llama3 scaling, attention factor
included); they are never rebuilt from frequencies here.
"""

from __future__ import annotations

from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of each token by its position.

    x: [T, H, D]; cos, sin: [T, D], in the dtype of x.
    Returns [T, H, D]. Source: RoFormer, arXiv 2104.09864.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    # In place: memory that is new to the process takes longer than the arithmetic. Not by addcmul_, which
    # rounds once where models round twice.
    rotated = x * cos
    rotated[..., :half] -= x[..., half:] * sin[..., :half]
    rotated[..., half:] += x[..., :half] * sin[..., half:]
    return rotated


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rotate the queries and keys of new tokens, and put keys and values into one layer of a pool.

    q: [T, Hq, D]; k, v: [T, H, D], before RoPE; cos, sin: [T, D]
    slots: int [T], where each token goes; those of negative slots go nowhere
    keys, values: [H, S, D], changed in place
    Returns q and k after RoPE, shaped as they came.
    """
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    new_keys, new_values = k.transpose(0, 1), v.transpose(0, 1)
    stored = slots >= 0
    if not stored.all():
        slots, new_keys, new_values = slots[stored], new_keys[:, stored], new_values[:, stored]
    slots = slots.long()
    keys.index_copy_(1, slots, new_keys)
    values.index_copy_(1, slots, new_values)
    return q, k
