"""The geometry of a KV cache, and what a segment is."""

from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT_TOKENS = 256
"""Consecutive tokens, across all layers, that are hashed, stored, evicted and fetched as one unit."""

SINK_TOKENS = 4
"""First tokens of a sequence. Attention leans on them far beyond their meaning, so they stay raw."""


@dataclass(frozen=True)
class KVSpec:
    """Geometry of the KV cache of one model. Channels are all kv heads of one token, side by side."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """The dtype in which the model keeps its KV cache."""
    rope: str
    """Canonical JSON of the RoPE parameters: stored keys are only worth something under the same ones."""

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_kv_heads, self.head_dim) < 1:
            raise ValueError(
                f"a KV cache needs at least one layer, head and channel, not {self.num_layers} layers, "
                f"{self.num_kv_heads} heads of {self.head_dim}"
            )
        if not self.dtype.is_floating_point:
            raise ValueError(f"KV is floating point, not {self.dtype}")

    @property
    def channels(self) -> int:
        """C = H*D: values in one row of keys (or of values)."""
        return self.num_kv_heads * self.head_dim

    @property
    def bytes_per_token(self) -> int:
        """Uncompressed bytes of one token: keys and values of all layers in the model's dtype."""
        return 2 * self.num_layers * self.channels * self.dtype.itemsize

    def describe(self) -> dict[str, int | str]:
        """A JSON-ready description; it goes into fingerprints, so its content is part of the format."""
        return {
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "rope": self.rope,
        }


@dataclass(frozen=True)
class Encoded:
    """Segments as a codec has encoded them. On a CUDA device the work may still be queued."""

    bodies: list[Tensor]
    """uint8 [segment bytes], one per segment."""
    damaged: Tensor | None = None
    """int32 [T]: not zero where a token held a value that is not finite, so that its segment must not be
    used. None: no token did, or the codec keeps such values."""
