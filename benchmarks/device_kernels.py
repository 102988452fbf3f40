"""The codec's kernels on a CUDA device, as `aquifer bench kernels` measures them.

Import this module only where a CUDA device is in use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from aquifer.benchmarks.geometries import Subject
from aquifer.compression.aqua import SCALE_BYTES, SIGNS_SEED, load_quantizer
from aquifer.kernels.hadamard import Rotation
from aquifer.kernels.prediction import Linear
from aquifer.kernels.triton.chain import predict, predict_and_add
from aquifer.kernels.triton.emit import emit
from aquifer.kernels.triton.encode import encode_rows

KEYS = 0
"""Which half is coded."""

Work = tuple[str, Callable[[], object], float, float]
"""Name, what to time, bytes moved at least, and operations."""


def codec_work(subject: Subject, tokens: int, bits: int) -> list[Work]:
    """One half of a layer of `tokens` tokens; `emit` does both."""
    spec, device, dtype = subject.spec, subject.device, torch.bfloat16
    channels = spec.channels
    rotation, quantizer = Rotation.of(channels, SIGNS_SEED, device), load_quantizer(bits, device)
    group = rotation.group
    ring = torch.randn(tokens, 3 * channels, device=device).to(dtype)
    state, out = ring[:, : 2 * channels], ring[:, 2 * channels :]
    weight = torch.randn(2 * channels, channels, device=device).mul_(0.25 / channels**0.5).to(dtype)
    linear = Linear(weight, torch.zeros(channels, device=device))
    rows, prediction = torch.randn(tokens, channels, device=device).to(dtype), torch.empty_like(out).float()
    code_bytes, scale_bytes = quantizer.code_bytes(channels), channels // group * SCALE_BYTES
    number = torch.arange(tokens, dtype=torch.int32, device=device)
    codes, scales = number * code_bytes, tokens * code_bytes + number * scale_bytes
    offsets = torch.stack((codes, codes, scales, scales))
    data = torch.empty(tokens * (code_bytes + scale_bytes), dtype=torch.uint8, device=device)
    damaged = torch.zeros_like(number)
    angles = torch.randn(tokens, spec.head_dim, device=device).to(dtype)
    pages = torch.empty(2, spec.num_kv_heads, tokens, spec.head_dim, dtype=dtype, device=device)
    slots = number.long()

    def encode() -> None:
        encode_rows(rows, rotation.signs, group, prediction, quantizer, KEYS, offsets, data, out, damaged)

    def decode() -> None:
        predict_and_add(state, KEYS, linear, group, data, offsets, quantizer, out)

    half = 2.0 * tokens * channels
    stored, weights = float(data.numel()), 2.0 * weight.numel()
    gemm = 4.0 * tokens * channels**2
    predict(state, KEYS, linear, group, prediction)
    encode()  # so that there are codes to decode
    return [
        (
            "predict",
            lambda: predict(state, KEYS, linear, group, prediction),
            4 * half + weights,
            gemm,
        ),
        (f"rotate and encode, {bits} bits", encode, 4 * half + stored, 0.0),
        (f"predict and add, {bits} bits", decode, 3 * half + weights + stored, gemm),
        (
            "unrotate, RoPE and write (keys and values)",
            lambda: emit(state, rotation.signs, group, (angles, angles), slots, pages[0], pages[1]),
            4 * half,
            0.0,
        ),
    ]
