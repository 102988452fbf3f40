"""What this device can do at most, measured in the same run as what is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import Run, clocked

_REPEAT = 5


@dataclass(frozen=True)
class Limits:
    """bytes_per_second: of a large copy, what it reads and what it writes added up.
    flop_per_second: of a large matrix product in the model's dtype."""

    bytes_per_second: float
    flop_per_second: float


def measure_limits(subject: Subject) -> Limits:
    """A copy far larger than the caches, and a product large enough to fill the device."""
    device, on_gpu = subject.device, subject.device.type == "cuda"
    copied_bytes = (4 << 30) if on_gpu else (256 << 20)
    source = torch.ones(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 2048
    left, right = (torch.randn(size, size, dtype=subject.dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)

    def seconds(work: Callable[[], object]) -> float:
        return typical_seconds(clocked(device, work))

    return Limits(
        bytes_per_second=2 * copied_bytes / seconds(lambda: target.copy_(source)),
        flop_per_second=2 * size**3 / seconds(lambda: torch.mm(left, right, out=out)),
    )


def typical_seconds(run: Run) -> float:
    """The median of some runs after the first one."""
    run()
    return median(run() for _ in range(_REPEAT))


def weight_count(subject: Subject) -> int:
    """Weights that every token is multiplied with: all but the embedding table, the output head included."""
    c = subject.config
    query_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = c.hidden_size * (2 * query_width + 2 * kv_width)
    layer = attention + 3 * c.hidden_size * c.intermediate_size
    return int(c.num_hidden_layers * layer + c.vocab_size * c.hidden_size)


def prefill_flop(subject: Subject, tokens: int) -> float:
    """Operations of reading a prompt: two per weight and token, and causal attention. The output head
    counts once, because only the last token needs it."""
    c = subject.config
    head = c.vocab_size * c.hidden_size
    attention = 2 * tokens**2 * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    return 2.0 * tokens * (weight_count(subject) - head) + 2.0 * head + attention


def decode_bytes(subject: Subject, context_tokens: int, batch: int) -> float:
    """Bytes that one decode step has to read: the weights once, and the KV of every sequence."""
    weights = weight_count(subject) * subject.dtype.itemsize
    return float(weights + batch * context_tokens * subject.spec.bytes_per_token)
