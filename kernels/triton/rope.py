"""RoPE of new tokens' queries and keys, with the store of keys and values into the pool: one kernel per layer
in place of a dozen.

Bytes moved: q read and written once, k read once and written twice, v read and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import FLOATS, INDICES, expect, expect_pool, expect_power_of_two

_FEW_TOKENS = 64
"""Up to so many, a program takes one token of one head: a decode step is bound by latency."""


@triton.jit
def _rotated(
    x: tl.tensor, place: tl.tensor, exists: tl.tensor, cos: tl.tensor, sin: tl.tensor, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of some heads. Each product is rounded before the sum, as in the plain operation."""
    dtype = x.dtype.element_ty
    low = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    high = tl.load(x + place + HALF, mask=exists, other=0.0).to(tl.float32)
    low_cos = (low * tl.load(cos, mask=exists, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    low_sin = (high * tl.load(sin, mask=exists, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    high_cos = (high * tl.load(cos + HALF, mask=exists, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    high_sin = (low * tl.load(sin + HALF, mask=exists, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    return (low_cos - low_sin).to(dtype), (high_cos + high_sin).to(dtype)


@triton.jit
def _rotate_store(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    out_q: tl.tensor,
    out_k: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    num_tokens: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    pool_stride: tl.tensor,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One head of some tokens: first come the query heads, then the KV heads."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = (token < num_tokens)[:, None]
    head = tl.program_id(1)
    channel = tl.arange(0, HALF)[None, :]
    row = token.to(tl.int64)[:, None]
    cos += row * (2 * HALF) + channel
    sin += row * (2 * HALF) + channel
    if head < QUERY_HEADS:
        low, high = _rotated(q, row * q_stride + head * (2 * HALF) + channel, exists, cos, sin, HALF)
        place = (row * QUERY_HEADS + head) * (2 * HALF) + channel
        tl.store(out_q + place, low, mask=exists)
        tl.store(out_q + place + HALF, high, mask=exists)
    else:
        head -= QUERY_HEADS
        low, high = _rotated(k, row * k_stride + head * (2 * HALF) + channel, exists, cos, sin, HALF)
        place = (row * KV_HEADS + head) * (2 * HALF) + channel
        tl.store(out_k + place, low, mask=exists)
        tl.store(out_k + place + HALF, high, mask=exists)
        slot = tl.load(slots + token, mask=token < num_tokens, other=-1).to(tl.int64)[:, None]
        stored = slot >= 0
        place = head.to(tl.int64) * pool_stride + slot * (2 * HALF) + channel
        tl.store(keys + place, low, mask=stored)
        tl.store(keys + place + HALF, high, mask=stored)
        source = v + row * v_stride + head * (2 * HALF) + channel
        tl.store(values + place, tl.load(source, mask=stored, other=0.0), mask=stored)
        tl.store(values + place + HALF, tl.load(source + HALF, mask=stored, other=0.0), mask=stored)


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
    """See the twin. Tokens of q, k and v may be strided, such as parts of one product; D is a power of two;
    slots: int32 or int64.

    Twin: aquifer.kernels.rope.rotate_and_store.
    """
    tokens, query_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    expect("q", q, (None, None, None), FLOATS)
    expect("k", k, (tokens, None, head_dim), q.dtype)
    expect("v", v, k.shape, q.dtype)
    expect("cos", cos, (tokens, head_dim), q.dtype)
    expect("sin", sin, (tokens, head_dim), q.dtype)
    expect("slots", slots, (tokens,), INDICES)
    expect_pool(keys, values, kv_heads, head_dim, q.dtype)
    expect_power_of_two("head_dim", head_dim, 16, 256)
    if not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("cos and sin must be contiguous")
    if any(t.stride(1) != head_dim for t in (q, k, v)):
        raise ValueError("the heads of a token must lie side by side")
    out_q = torch.empty(tokens, query_heads, head_dim, dtype=q.dtype, device=q.device)
    out_k = torch.empty(tokens, kv_heads, head_dim, dtype=q.dtype, device=q.device)
    block = 1 if tokens <= _FEW_TOKENS else 16
    _rotate_store[(triton.cdiv(tokens, block), query_heads + kv_heads)](
        q,
        k,
        v,
        cos,
        sin,
        slots,
        out_q,
        out_k,
        keys,
        values,
        tokens,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        keys.stride(0),
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK=block,
        num_warps=1 if block == 1 else 4,
    )
    return out_q, out_k
