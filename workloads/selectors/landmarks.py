"""Two-bit landmarks of every token: this project's method."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from aquifer.compression.spec import SINK_TOKENS
from aquifer.workloads.selectors.base import (
    WINDOW_TOKENS,
    ExactRows,
    Prompt,
    RowStore,
    check_budget,
    ends,
    within_budget,
)
from aquifer.workloads.selectors.coded import FourBitRows, Landmarks, ResidualRows


@dataclass(frozen=True)
class TokenLandmarks:
    """Ranks every token by its own 2-bit key and reads rows of 4 bits.

    Source: YAKV in "KV-Cache Offloading for Context-Intensive Tasks", arXiv 2604.08426.
    """

    budget: float = 0.05
    """(sinks + window + selected) / prompt tokens"""
    heads: Literal["own", "shared"] = "own"
    """One set of tokens per KV head, or one for all heads of a layer"""
    rows: Literal["separate", "residual", "exact"] = "separate"
    """Keys of 4 bits; or landmark + residual of 2 bits; or nothing quantized (values neither)"""
    mean: bool = True
    """Subtract the calibrated channel means before rounding"""
    softmax: Literal["all", "rest"] = "all"
    """Heads are compared by the share of attention among all tokens, or without sinks and window"""

    def __post_init__(self) -> None:
        check_budget(self.budget)

    @property
    def shared(self) -> bool:
        return self.heads == "shared"

    def ranker(self) -> Landmarks:
        return Landmarks(self.mean, ends=self.softmax == "all")

    def store(self) -> RowStore:
        if self.rows == "exact":
            return ExactRows()
        return FourBitRows(self.mean) if self.rows == "separate" else ResidualRows(self.mean)

    def exact_tokens(self, prompt: Prompt) -> Tensor:
        return ends(prompt, SINK_TOKENS, WINDOW_TOKENS)

    def selected(self, tokens: int) -> int:
        return within_budget(self.budget, tokens, SINK_TOKENS + WINDOW_TOKENS, 1)
