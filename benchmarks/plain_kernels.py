"""The plain operations, as the engine runs them where it has no kernels: on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.roofline import Kernel, Limit
from aquifer.compression.aqua import SCALE_BYTES, SIGNS_SEED, load_quantizer
from aquifer.compression.chain import Half, HalfCoder
from aquifer.kernels.attention import attend, merge_attention
from aquifer.kernels.hadamard import Rotation, hadamard_group
from aquifer.kernels.higgs import higgs_decode_add, higgs_encode
from aquifer.kernels.landmarks import score_landmarks, select_tokens
from aquifer.kernels.prediction import Linear
from aquifer.kernels.rope import apply_rope

CHUNK_TOKENS = 2048
"""Queries of one prefill chunk."""

BITS = 2
SELECTED_SHARE = 32
"""One of so many tokens is selected."""


def plain_kernels(subject: Subject, tokens: int) -> list[Kernel]:
    """All of them on `tokens` tokens of one layer."""
    return [*_codec_kernels(subject, tokens), *_attention_kernels(subject, tokens)]


def _kernel(name: str, work: Callable[[], object], bytes_moved: float, flop: float = 0.0) -> Kernel:
    needs = {Limit.MEMORY: bytes_moved}
    return Kernel(name, [work], needs | {Limit.GEMM: flop} if flop else needs)


def _codec_kernels(subject: Subject, tokens: int) -> list[Kernel]:
    device, channels = subject.device, subject.spec.channels
    group = hadamard_group(channels)
    rotation = Rotation.of(channels, SIGNS_SEED, device)
    quantizer = load_quantizer(BITS, device)
    rows = torch.randn(tokens, channels, device=device)
    state = torch.randn(tokens, 2 * channels, device=device)
    weight = torch.randn(2 * channels, channels, device=device).mul_(0.25 / channels**0.5)
    linear = Linear(weight, torch.zeros(channels, device=device))
    coder = HalfCoder(Half.KEYS, linear, quantizer, group)
    codes, scales = higgs_encode(rows, quantizer, group)
    reconstructed = torch.empty_like(rows)

    wide = 4.0 * tokens * channels
    coded = float(tokens * (quantizer.code_bytes(channels) + channels // group * SCALE_BYTES))
    gemm = 2.0 * tokens * 2 * channels * channels
    weights = float(weight.numel() * weight.element_size())

    def decode() -> None:
        higgs_decode_add(rows, codes, scales, quantizer, out=reconstructed)

    return [
        _kernel("rotate (signs and Hadamard)", lambda: rotation.rotate(rows), 2 * wide),
        _kernel(f"HIGGS encode, {BITS} bits", lambda: higgs_encode(rows, quantizer, group), wide + coded),
        _kernel(f"HIGGS decode and add, {BITS} bits", decode, 2 * wide + coded),
        _kernel("predict", lambda: linear(state), 3 * wide + weights, gemm),
        _kernel(
            "predict and reconstruct",
            lambda: coder.decode(state, (codes, scales)),
            3 * wide + weights + coded,
            gemm,
        ),
    ]


def _attention_kernels(subject: Subject, tokens: int) -> list[Kernel]:
    spec, device, dtype = subject.spec, subject.device, subject.dtype
    heads, head_dim = spec.num_kv_heads, spec.head_dim
    query_heads = int(subject.config.num_attention_heads)
    chunk = min(CHUNK_TOKENS, tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    keys, values = random(heads, tokens, head_dim), random(heads, tokens, head_dim)
    queries, one = random(query_heads, chunk, head_dim), random(query_heads, 1, head_dim)
    own_keys, own_values = keys[:, :chunk].contiguous(), values[:, :chunk].contiguous()
    parts = [attend(queries, own_keys, own_values) for _ in range(2)]
    unrotated, cos, sin = random(tokens, heads, head_dim), random(tokens, head_dim), random(tokens, head_dim)

    quantizer = load_quantizer(BITS, device)
    group = hadamard_group(head_dim)
    landmarks, scales = higgs_encode(torch.randn(tokens, spec.channels, device=device), quantizer, group)
    rotated = torch.randn(query_heads, head_dim, device=device)
    scores = torch.randn(query_heads, tokens, device=device)
    count = max(1, tokens // SELECTED_SHARE)

    cached = 2.0 * spec.channels * tokens * dtype.itemsize
    chunk_rows = float(query_heads * chunk * head_dim * dtype.itemsize)
    landmark_bytes = float(landmarks.numel() + scales.numel() * SCALE_BYTES)
    score_bytes = 4.0 * query_heads * tokens
    return [
        _kernel("RoPE", lambda: apply_rope(unrotated, cos, sin), cached),
        _kernel(
            "attention, chunk to past",
            lambda: attend(queries, keys, values),
            cached + 2 * chunk_rows,
            4.0 * query_heads * chunk * tokens * head_dim,
        ),
        _kernel(
            "attention, chunk to itself",
            lambda: attend(queries, own_keys, own_values, causal=True),
            cached * chunk / tokens + 2 * chunk_rows,
            2.0 * query_heads * chunk**2 * head_dim,
        ),
        _kernel("attention, one token", lambda: attend(one, keys, values), cached),
        _kernel("merge of two pieces", lambda: merge_attention(parts), 3 * chunk_rows),
        _kernel(
            "score landmarks",
            lambda: score_landmarks(rotated, landmarks, scales, quantizer),
            landmark_bytes + score_bytes,
        ),
        _kernel(
            "select tokens",
            lambda: select_tokens(scores, heads, count, shared=False),
            score_bytes,
        ),
    ]
