"""Ranking tokens by their landmarks: 2-bit sketches of keys that stay on the device.

A landmark is the key of one token and head, rotated (see hadamard.py) and rounded to a grid. Because the
rotation is orthonormal, <q, k> = <Hq, Hk>: the few queries are rotated, never the many landmarks. What a
calibrated mean took out of every key of a head changes all scores of a query by one constant, so neither the
order nor a softmax notices.

Bytes moved: the codes once, H * T * (D/4 + 2).
"""

import torch
from torch import Tensor

from aquifer.kernels.higgs import Quantizer, higgs_decode_ref


def score_landmarks(queries: Tensor, codes: Tensor, scales: Tensor, quantizer: Quantizer) -> Tensor:
    """Estimate the attention scores of one query token.

    queries: float32 [Hq, D], rotated as the landmarks are; query head h reads KV head h // (Hq/H)
    codes: uint8 [T, C*bits/8]; scales: float16 [T, C/G], heads side by side, groups within heads
    Returns float32 [Hq, T]: scaled by 1/sqrt(D), short of a constant per query head.
    Twin: score_landmarks_ref.
    """
    num_q_heads, head_dim = queries.shape
    tokens = len(codes)
    values = quantizer.look_up(codes).view(*scales.shape, -1)
    heads = (values * scales.unsqueeze(-1)).view(tokens, -1, head_dim)
    groups = queries.view(heads.shape[1], -1, head_dim) * head_dim**-0.5
    return (groups @ heads.permute(1, 2, 0)).view(num_q_heads, tokens)


def score_landmarks_ref(queries: Tensor, codes: Tensor, scales: Tensor, grid: Tensor) -> Tensor:
    """The same in float64, key by key."""
    num_q_heads, head_dim = queries.shape
    keys = higgs_decode_ref(codes, scales, grid).double().view(len(codes), -1, head_dim)
    keys = keys.repeat_interleave(num_q_heads // keys.shape[1], dim=1)
    return torch.einsum("hd,thd->ht", queries.double(), keys) / head_dim**0.5


def select_tokens(scores: Tensor, num_kv_heads: int, count: int, *, shared: bool) -> Tensor:
    """Choose the tokens that matter most to any query head of a group.

    scores: float32 [Hq, T], comparable within a row only, hence the softmax: heads are compared by the share
        of attention they would give a token (its logarithm, which has no ties where the share underflows)
    count: tokens per set, at most T
    shared: one set for all KV heads, so that a fetched row holds all of them; otherwise one set per head
    Returns int64 [H, count], or [1, count] if shared; each set ascending. Twin: select_tokens_ref.
    """
    log_share = scores - scores.logsumexp(dim=1, keepdim=True)
    best = log_share.view(1 if shared else num_kv_heads, -1, scores.shape[1]).amax(dim=1)
    return best.topk(count, dim=1, sorted=False).indices.sort(dim=1).values


def select_tokens_ref(scores: Tensor, num_kv_heads: int, count: int, *, shared: bool) -> Tensor:
    """The same by sorting, set by set."""
    share = torch.log_softmax(scores.double(), dim=1)
    sets = share.chunk(1 if shared else num_kv_heads)
    return torch.stack([rows.amax(0).argsort(descending=True)[:count].sort().values for rows in sets])
