"""The last step of decoding a layer: out of the rotated domain, RoPE, and into the pages.

All of it happens in registers. Everything a program reads is asked for before the product with the Hadamard
matrix: behind its barriers each load would wait for memory once more.

Bytes moved: one element read and one written per channel, plus 2 * D per token for RoPE. The plain code
moves about eight times as many, a pass over memory per step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquifer.kernels.triton.checks import FLOATS, INDICES, expect, expect_pool, expect_power_of_two
from aquifer.kernels.triton.hadamard import LEAST, factors, turn_group


@triton.jit
def upright_heads(
    state: tl.tensor,
    token: tl.tensor,
    exists: tl.tensor,
    row_stride: tl.tensor,
    signs: tl.tensor,
    first_channel: tl.tensor,
    GROUP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    EXACT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Some tokens' heads of one Hadamard group, out of the rotated domain and times SCALE * sqrt(GROUP).

    state: pointer to channel 0 of token 0. Returns the lower and the upper half of each head's channels,
    float32 [T, GROUP / HEAD_DIM, HEAD_DIM / 2] both.
    """
    rows: tl.constexpr = token.shape[0]
    channel = first_channel + tl.arange(0, GROUP)
    place = token.to(tl.int64)[:, None] * row_stride + channel[None, :]
    x = tl.load(state + place, mask=exists[:, None], other=0.0).to(tl.float32)
    sign = tl.load(signs + channel) * SCALE
    x = turn_group(x, LEFT, RIGHT, EXACT) * sign[None, :]
    halves = tl.permute(tl.reshape(x, [rows, GROUP // HEAD_DIM, 2, HEAD_DIM // 2]), [0, 1, 3, 2])
    return tl.split(halves)


@triton.jit
def with_rope(low: tl.tensor, high: tl.tensor, cos: tl.tensor, sin: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The same heads after RoPE, half-split: channel i of a head turns with channel i + D/2.

    cos, sin: [T, HEAD_DIM].
    """
    cos_low, cos_high = _halves(cos)
    sin_low, sin_high = _halves(sin)
    return low * cos_low - high * sin_low, high * cos_high + low * sin_high


@triton.jit
def _halves(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The lower and the upper half of rows [T, D], float32 [T, 1, D/2] both."""
    rows: tl.constexpr = x.shape[0]
    half: tl.constexpr = x.shape[1] // 2
    low, high = tl.split(tl.permute(tl.reshape(x.to(tl.float32), [rows, 2, half]), [0, 2, 1]))
    return low[:, None, :], high[:, None, :]


@triton.jit
def _emit(
    state: tl.tensor,
    signs: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    count: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One Hadamard group, which is some whole heads, of one block of tokens; keys and values side by side."""
    is_values = tl.program_id(2)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = token < count
    first_channel = tl.program_id(1) * GROUP
    slot = tl.load(slots + token, mask=exists, other=-1).to(tl.int64)
    angle = token[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    turns = (exists & (is_values == 0))[:, None]
    cosines = tl.load(cos + angle, mask=turns, other=0.0)
    sines = tl.load(sin + angle, mask=turns, other=0.0)
    state += is_values * CHANNELS
    low, high = upright_heads(
        state, token, exists, row_stride, signs, first_channel, GROUP, LEFT, RIGHT, HEAD_DIM, NORM, EXACT
    )
    if is_values == 0:
        low, high = with_rope(low, high, cosines, sines)

    half: tl.constexpr = HEAD_DIM // 2
    heads: tl.constexpr = GROUP // HEAD_DIM
    within = tl.arange(0, half)
    head = first_channel // HEAD_DIM + tl.arange(0, heads)
    place = slot[:, None] * HEAD_DIM + head.to(tl.int64)[None, :] * head_stride
    place = place[:, :, None] + within[None, None, :]
    there = (slot >= 0)[:, None, None]
    pages = keys
    if is_values == 1:
        pages = values
    tl.store(pages + place, low, mask=there)
    tl.store(pages + place + half, high, mask=there)


def emit(
    state: Tensor,
    signs: Tensor,
    group: int,
    rope: tuple[Tensor, Tensor],
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    block_tokens: int = 4,
) -> None:
    """Write the decoded rows of one layer to where attention reads them.

    state: [T, 2C], any float dtype, rotated keys beside rotated values; rows may be strided
    signs: float32 [C]; group: G, the largest power of two that divides C; D divides it
    rope: cos and sin [T, D], from the model's own rotary module; only keys are turned
    slots: int [T], where each token goes; a negative one is skipped
    keys, values: [H, slots, D], of one layer, any float dtype, the slots of a head side by side
    block_tokens: per program.
    Computes in float32 and rounds once. Twins: aquifer.kernels.hadamard.Rotation.unrotate, then
    aquifer.kernels.rope.apply_rope, then an assignment.
    """
    tokens, width = state.shape
    channels = width // 2
    heads, _, head_dim = keys.shape
    cos, sin = rope
    expect("state", state, (None, 2 * heads * head_dim), FLOATS)
    expect("signs", signs, (channels,), torch.float32)
    expect("slots", slots, (tokens,), INDICES)
    expect_pool(keys, values, None, None, FLOATS)
    expect("cos", cos, (tokens, head_dim), FLOATS)
    expect("sin", sin, (tokens, head_dim), cos.dtype)
    expect_power_of_two("group", group, 16, 4096)
    expect_power_of_two("head_dim", head_dim, 16, group)
    expect_power_of_two("block_tokens", block_tokens, 1, 256)
    if channels % group:
        raise ValueError(f"{channels} channels do not divide into groups of {group}")
    left, right = factors(group)
    block_tokens = max(block_tokens, LEAST // left)
    _emit[(triton.cdiv(tokens, block_tokens), channels // group, 2)](
        state,
        signs,
        cos.contiguous(),
        sin.contiguous(),
        slots,
        keys,
        values,
        tokens,
        state.stride(0),
        keys.stride(0),
        CHANNELS=channels,
        GROUP=group,
        LEFT=left,
        RIGHT=right,
        HEAD_DIM=head_dim,
        NORM=group**-0.5,
        EXACT=keys.dtype == torch.float32,
        BLOCK=block_tokens,
        num_warps=4,
    )
