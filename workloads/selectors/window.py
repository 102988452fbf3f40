"""Sinks and the most recent tokens, nothing else: the floor."""

from dataclasses import dataclass

from torch import Tensor

from aquifer.compression.spec import SINK_TOKENS
from aquifer.workloads.selectors.base import ExactRows, Prompt, check_budget, ends


@dataclass(frozen=True)
class Window:
    """Keeps 4 sinks and as many of the last tokens as the budget allows.

    Source: StreamingLLM, arXiv 2309.17453.
    """

    budget: float = 0.05
    """Exact tokens / prompt tokens"""

    def __post_init__(self) -> None:
        check_budget(self.budget)

    @property
    def shared(self) -> bool:
        return False

    def ranker(self) -> None:
        return None

    def store(self) -> ExactRows:
        return ExactRows()

    def exact_tokens(self, prompt: Prompt) -> Tensor:
        recent = max(1, round(self.budget * prompt.tokens) - SINK_TOKENS)
        return ends(prompt, SINK_TOKENS, recent)

    def selected(self, tokens: int) -> int:
        return 0
