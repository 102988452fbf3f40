"""`aquifer bench kernels`: each kernel alone, against what this device can do.

A kernel is bound by the bytes it has to move or by the operations it has to do; its percent of the limit is
the larger of both times over its own. Data is larger than the caches wherever that fits `--tokens`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import Contestant, Report, Row, clocked
from aquifer.benchmarks.limits import Limits, measure_limits
from aquifer.benchmarks.transfer import new_report
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


@dataclass(frozen=True)
class Kernel:
    """bytes_moved: read and written at least. flop: multiplications and additions, 0 where they do not
    count."""

    name: str
    work: Callable[[], object]
    bytes_moved: float
    flop: float = 0.0


def bench_kernels(subject: Subject, tokens: int, repeat: int) -> Report:
    """Every kernel on `tokens` tokens of one layer."""
    report = new_report("kernels", subject, tokens=tokens, repeat=repeat)
    limits = measure_limits(subject)
    kernels = [*_codec_kernels(subject, tokens), *_attention_kernels(subject, tokens)]
    rows = report.measure(
        [Contestant(kernel.name, "ours", clocked(subject.device, kernel.work)) for kernel in kernels], repeat
    )
    for kernel in kernels:
        rows[kernel.name].figures.update(_figures(kernel, rows[kernel.name].figures["seconds"], limits))
    memory = {"gb_per_second": limits.bytes_per_second / 1e9, "of_limit_percent": 100.0}
    gemm = {"gflop_per_second": limits.flop_per_second / 1e9, "of_limit_percent": 100.0}
    report.rows += [Row("copy in memory", "limit", memory), Row("large GEMM", "limit", gemm)]
    return report


def _figures(kernel: Kernel, seconds: float, limits: Limits) -> dict[str, float]:
    least = max(kernel.bytes_moved / limits.bytes_per_second, kernel.flop / limits.flop_per_second)
    figures = {"gb_per_second": kernel.bytes_moved / seconds / 1e9}
    if kernel.flop:
        figures["gflop_per_second"] = kernel.flop / seconds / 1e9
    return figures | {"of_limit_percent": 100 * least / seconds}


def _codec_kernels(subject: Subject, tokens: int) -> list[Kernel]:
    """What the engine uses on this device."""
    if subject.codec(f"higgs:{BITS}").chain is None:
        return _plain_codec_kernels(subject, tokens)
    from aquifer.benchmarks.device_kernels import codec_work

    return [Kernel(*work) for work in codec_work(subject, tokens, BITS)]


def _plain_codec_kernels(subject: Subject, tokens: int) -> list[Kernel]:
    device, channels = subject.device, subject.spec.channels
    state_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    group = hadamard_group(channels)
    rotation = Rotation.of(channels, SIGNS_SEED, device)
    quantizer = load_quantizer(BITS, device)
    rows = torch.randn(tokens, channels, device=device)
    state = torch.randn(tokens, 2 * channels, device=device).to(state_dtype)
    weight = torch.randn(2 * channels, channels, device=device).mul_(0.25 / channels**0.5).to(state_dtype)
    linear = Linear(weight, torch.zeros(channels, device=device))
    coder = HalfCoder(Half.KEYS, linear, quantizer, group)
    codes, scales = higgs_encode(rows, quantizer, group)
    reconstructed = torch.empty(tokens, channels, dtype=state_dtype, device=device)

    wide = 4.0 * tokens * channels
    coded = float(tokens * (quantizer.code_bytes(channels) + channels // group * SCALE_BYTES))
    halves = float(state_dtype.itemsize * tokens * channels)
    gemm = 2.0 * tokens * 2 * channels * channels
    weights = float(weight.numel() * weight.element_size())

    def decode() -> None:
        higgs_decode_add(rows, codes, scales, quantizer, out=reconstructed)

    return [
        Kernel("rotate (signs and Hadamard)", lambda: rotation.rotate(rows), 2 * wide),
        Kernel(f"HIGGS encode, {BITS} bits", lambda: higgs_encode(rows, quantizer, group), wide + coded),
        Kernel(f"HIGGS decode and add, {BITS} bits", decode, wide + coded + halves),
        Kernel("predict", lambda: linear(state), 2 * halves + weights + wide, gemm),
        Kernel(
            "predict and reconstruct",
            lambda: coder.decode(state, (codes, scales)),
            3 * halves + weights + coded,
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
        Kernel("RoPE", lambda: apply_rope(unrotated, cos, sin), cached),
        Kernel(
            "attention, chunk to past",
            lambda: attend(queries, keys, values),
            cached + 2 * chunk_rows,
            4.0 * query_heads * chunk * tokens * head_dim,
        ),
        Kernel(
            "attention, chunk to itself",
            lambda: attend(queries, own_keys, own_values, causal=True),
            cached * chunk / tokens + 2 * chunk_rows,
            2.0 * query_heads * chunk**2 * head_dim,
        ),
        Kernel("attention, one token", lambda: attend(one, keys, values), cached),
        Kernel("merge of two pieces", lambda: merge_attention(parts), 3 * chunk_rows),
        Kernel(
            "score landmarks",
            lambda: score_landmarks(rotated, landmarks, scales, quantizer),
            landmark_bytes + score_bytes,
        ),
        Kernel(
            "select tokens",
            lambda: select_tokens(scores, heads, count, shared=False),
            score_bytes,
        ),
    ]
