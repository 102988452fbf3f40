"""Shapes that kernels are measured on, and data for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from aquifer.benchmarks.geometries import Subject
from aquifer.compression.spec import KVSpec

COLD_BYTES = 1 << 28
"""Of data that operations take turns at: several times the caches of a device (50 MB on an H200)."""

HOST_SPAN = 8
"""So many times more of host memory: a device reads faster within a gigabyte, whose addresses it knows."""

MOST_LAYERS = 16

BATCH = 16
"""Requests of a full decode step."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Shape:
    """A model's layers behind a prompt. cold_bytes: see COLD_BYTES."""

    spec: KVSpec
    query_heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    tokens: int
    device: torch.device
    cold_bytes: int = COLD_BYTES

    @classmethod
    def of(cls, subject: Subject, tokens: int) -> Self:
        config = subject.config
        return cls(
            subject.spec,
            config.num_attention_heads,
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            tokens,
            subject.device,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.dtype

    @property
    def heads(self) -> int:
        return self.spec.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.spec.head_dim

    @property
    def channels(self) -> int:
        return self.spec.channels

    def half_bytes(self, tokens: int) -> float:
        """Of keys or of values of one layer."""
        return float(tokens * self.channels * self.dtype.itemsize)

    def random(self, *shape: int) -> Tensor:
        """Normal numbers in the model's dtype."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def num_layers(self, num_bytes: float, *, span: int = 1) -> int:
        """How many layers' data operations take turns at, two at least, if one of them moves so many bytes.
        span: how many times more data there should be, such as HOST_SPAN."""
        return max(2, min(MOST_LAYERS, math.ceil(span * self.cold_bytes / num_bytes)))

    def layers(self, num_bytes: float, make: Callable[[], Made]) -> list[Made]:
        """The data of as many layers."""
        return [make() for _ in range(self.num_layers(num_bytes))]
