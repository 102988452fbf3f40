"""Means of chunks as landmarks, everything else as with token landmarks: what the ranking alone changes."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from aquifer.workloads.selectors.base import (
    VALUE_BYTES,
    ExactRows,
    KeyScorer,
    Prompt,
    RowStore,
    check_budget,
    ends,
    unit_aligned_ends,
    within_budget,
)
from aquifer.workloads.selectors.coded import FourBitRows


@dataclass(frozen=True)
class ChunkMeans:
    """Ranks chunks of consecutive tokens by the mean of their keys after RoPE, kept in 16 bits."""

    chunk: int

    def read(self, prompt: Prompt) -> KeyScorer:
        spec = prompt.spec
        whole = prompt.tokens // self.chunk * self.chunk
        means = prompt.keys[:, :, :whole].unflatten(2, (-1, self.chunk)).mean(dim=3)
        device_bytes = spec.num_layers * spec.channels * VALUE_BYTES / self.chunk
        return KeyScorer(means.bfloat16().float(), self.chunk, device_bytes)


@dataclass(frozen=True)
class Chunks:
    """Reads whole chunks. Of 8 tokens, their means take 2 bits per key value, as token landmarks do."""

    budget: float = 0.05
    """(sinks + window + selected) / prompt tokens"""
    chunk: int = 8
    """Tokens per chunk"""
    rows: Literal["separate", "exact"] = "separate"
    """Keys and values of 4 bits, or nothing quantized"""
    mean: bool = True
    """Subtract the calibrated channel means before rounding keys to 4 bits"""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; a chunk holds at least one token")

    @property
    def shared(self) -> bool:
        return False

    def ranker(self) -> ChunkMeans:
        return ChunkMeans(self.chunk)

    def store(self) -> RowStore:
        return FourBitRows(self.mean) if self.rows == "separate" else ExactRows()

    def exact_tokens(self, prompt: Prompt) -> Tensor:
        return ends(prompt, *unit_aligned_ends(prompt.tokens, self.chunk))

    def selected(self, tokens: int) -> int:
        kept = sum(unit_aligned_ends(tokens, self.chunk))
        return within_budget(self.budget, tokens, kept, self.chunk)
