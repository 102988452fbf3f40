"""Attention over pieces of a KV cache, merged exactly by log-sum-exp.

A cache is rarely one block of memory: pages lie apart, a chunk of queries sees its past in full and
itself causally. Each piece is attended alone and returns its output with the log-sum-exp of its
scores; `merge_attention` joins the pieces into what one softmax over all of them would have given.

Bytes moved per piece: K and V once, 2 * H * S * D elements. Twin: `attend_ref`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

PAGE_TOKENS = 256
"""Slots of one page of a pool."""

_aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Grouped-query attention of one sequence over one piece of its cache.

    q: [Hq, R, D]; k, v: [H, S, D], Hq a multiple of H, last dimension contiguous, any other strides.
    causal: query r sees keys 0..r; needs R == S. Otherwise every query sees every key.
    Returns (out [Hq, R, D] in q's dtype, lse [Hq, R] float32). Scores are scaled by 1/sqrt(D).
    Twin: attend_ref.
    """
    num_q_heads, rows, head_dim = q.shape
    num_heads = k.shape[0]
    group = num_q_heads // num_heads
    if _knows_groups(q) and (causal or rows >= _UNFOLDED_ROWS):
        out, lse = _sdpa(q[None], k[None], v[None], causal=causal)
    elif causal:
        # The diagonal ties query rows to keys, so the group cannot be folded into rows: expand KV
        # instead. It is one chunk, small against the past.
        k, v = (t.repeat_interleave(group, dim=0) if group > 1 else t for t in (k, v))
        out, lse = _sdpa(q[None], k[None], v[None], causal=True)
    else:
        # Every query sees every key: the query heads of a group are just more rows for one KV head.
        folded = q.reshape(1, num_heads, group * rows, head_dim)
        out, lse = _sdpa(folded, k[None], v[None], causal=False)
    return out.reshape(num_q_heads, rows, head_dim), lse.reshape(num_q_heads, rows)


def attend_in_pieces(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`attend` to any number of keys, as parts for `merge_attention`: cut so that cuDNN sees few shapes."""
    cuts = [0]
    if _suits_cudnn(q):
        while k.shape[1] - cuts[-1] >= _LEAST_PIECE:
            cuts.append(cuts[-1] + (1 << (k.shape[1] - cuts[-1]).bit_length() - 1))
    if cuts[-1] < k.shape[1]:
        cuts.append(k.shape[1])
    return [attend(q, k[:, first:last], v[:, first:last]) for first, last in pairwise(cuts)]


_UNFOLDED_ROWS = 128
"""From so many on, operators that know groups fill the device without folding them."""

_CUDNN_ROWS = 1024
"""cuDNN is used for multiples of it. From there on it is twice as fast as flash attention (H200: 670 against
350 TFLOP/s), but it takes about 40 ms to prepare for each new shape; so it gets chunks of prefill, which are
equally long but for the last, and keys in pieces of a power of two."""

_LEAST_PIECE = 4096


def _knows_groups(q: Tensor) -> bool:
    """Whether the operators that serve it take fewer KV heads than query heads."""
    return q.device.type == "cuda" and q.dtype != torch.float32


def _suits_cudnn(q: Tensor) -> bool:
    """q: [..., R, D]"""
    rows, head_dim = q.shape[-2:]
    if not (_knows_groups(q) and torch.backends.cudnn.is_available()):
        return False
    return rows > 0 and rows % _CUDNN_ROWS == 0 and head_dim in (64, 128)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Fused attention that also gives log-sum-exp. q: [1, Hq, R, D]; k, v: [1, H, S, D].

    The public scaled_dot_product_attention drops the log-sum-exp, hence the operators behind it.
    """
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif q.dtype == torch.float32:
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
        lse = lse[..., : q.shape[2]]  # padded to a multiple of 32 rows
    elif _suits_cudnn(q) and (causal or (k.shape[2] >= _LEAST_PIECE and k.shape[2].bit_count() == 1)):
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    else:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, lse


def attend_ref(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Plain twin of `attend`: the same shapes, in float64."""
    group = q.shape[0] // k.shape[0]
    k, v = (t.double().repeat_interleave(group, dim=0) for t in (k, v))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v
    return out.to(q.dtype), lse.float()


def attend_pages(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of one or some query tokens of each of many requests to its pages, in one layer of a pool.

    q: [B * R, Hq, D], R query tokens of each request side by side
    keys, values: [H, slots, D], the slots of a page side by side
    block_tables: int32 [B, pages], the pages of each request in order
    lengths: int32 [B * R], the first tokens of its request that a query token attends to; may be 0
    Returns (out [B * R, Hq, D], lse float32 [B * R, Hq]); 0 and -inf for a query without tokens.
    """
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, device=q.device)
    offsets = torch.arange(PAGE_TOKENS, device=q.device)
    for query, length in enumerate(lengths.tolist()):
        if not length:
            continue
        pages = block_tables[query * len(block_tables) // len(q)]
        slots = (pages[:, None] * PAGE_TOKENS + offsets).flatten()[:length].long()
        own, own_lse = attend(q[query, :, None], keys[:, slots], values[:, slots])
        out[query], lse[query] = own[:, 0], own_lse[:, 0]
    return out, lse


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Join the attention of disjoint pieces of one cache.

    parts: (out [..., D], lse [...]) of each piece, as `attend` returns them.
    Returns [..., D]: the attention over all pieces, in the dtype of the parts.
    """
    if len(parts) == 1:
        return parts[0][0]
    if (
        parts[0][0].ndim == 3
        and parts[0][0].device.type == "cuda"
        and parts[0][0].shape[-1] in (16, 32, 64, 128, 256)
    ):
        from aquifer.kernels.triton.attention import merge_parts

        return merge_parts(parts)[0]
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0)
    merged = sum(out * w[..., None] for (out, _), w in zip(parts, weights, strict=True))
    assert isinstance(merged, Tensor)
    return merged.to(parts[0][0].dtype)
