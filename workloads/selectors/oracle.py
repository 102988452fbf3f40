"""The tokens with the truly highest attention: what any ranking at the same budget is held against."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from aquifer.compression.spec import SINK_TOKENS
from aquifer.workloads.selectors.base import (
    WINDOW_TOKENS,
    ExactKeys,
    ExactRows,
    Prompt,
    check_budget,
    ends,
    within_budget,
)


@dataclass(frozen=True)
class Oracle:
    """Ranks by the true scores and reads exact rows."""

    budget: float = 0.05
    """(sinks + window + selected) / prompt tokens"""
    heads: Literal["own", "shared"] = "own"
    """One set of tokens per KV head, or one for all heads of a layer"""

    def __post_init__(self) -> None:
        check_budget(self.budget)

    @property
    def shared(self) -> bool:
        return self.heads == "shared"

    def ranker(self) -> ExactKeys:
        return ExactKeys()

    def store(self) -> ExactRows:
        return ExactRows()

    def exact_tokens(self, prompt: Prompt) -> Tensor:
        return ends(prompt, SINK_TOKENS, WINDOW_TOKENS)

    def selected(self, tokens: int) -> int:
        return within_budget(self.budget, tokens, SINK_TOKENS + WINDOW_TOKENS, 1)
