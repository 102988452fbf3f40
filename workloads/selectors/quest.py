"""Bounding boxes of pages."""

from dataclasses import dataclass

from torch import Tensor

from aquifer.workloads.selectors.base import (
    VALUE_BYTES,
    ExactRows,
    Prompt,
    check_budget,
    ends,
    products,
    within_budget,
)


@dataclass(frozen=True)
class BoxScorer:
    """Scores a page by the highest product any key inside of its bounding box could have."""

    high: Tensor
    """[L, H, U, D]: channel maxima"""
    low: Tensor
    """[L, H, U, D]: channel minima"""
    unit: int
    device_bytes: float

    def score(self, layer: int, queries: Tensor) -> Tensor:
        # Per channel, the maximum meets the positive part of the query and the minimum the negative part.
        return products(queries.relu(), self.high[layer]) - products((-queries).relu(), self.low[layer])


@dataclass(frozen=True)
class Boxes:
    """Ranks pages by bounding boxes of their keys after RoPE, kept in 16 bits."""

    page: int

    def read(self, prompt: Prompt) -> BoxScorer:
        spec = prompt.spec
        whole = prompt.tokens // self.page * self.page
        low, high = prompt.keys[:, :, :whole].unflatten(2, (-1, self.page)).aminmax(dim=3)
        device_bytes = spec.num_layers * spec.channels * 2 * VALUE_BYTES / self.page
        return BoxScorer(high.bfloat16().float(), low.bfloat16().float(), self.page, device_bytes)


@dataclass(frozen=True)
class Quest:
    """Reads whole pages of exact rows; the first and last pages always.

    Sources: Quest, arXiv 2406.10774; with the pages offloaded, ArkVale, NeurIPS 2024.
    """

    budget: float = 0.05
    """(sinks + window + selected) / prompt tokens"""
    page: int = 16
    """Tokens per page"""
    sink_pages: int = 2
    window_pages: int = 5

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if min(self.page, self.sink_pages, self.window_pages) < 1:
            raise ValueError("page, sink_pages and window_pages are at least 1")

    @property
    def shared(self) -> bool:
        return False

    def ranker(self) -> Boxes:
        return Boxes(self.page)

    def store(self) -> ExactRows:
        return ExactRows()

    def exact_tokens(self, prompt: Prompt) -> Tensor:
        return ends(prompt, *self._ends(prompt.tokens))

    def selected(self, tokens: int) -> int:
        return within_budget(self.budget, tokens, sum(self._ends(tokens)), self.page)

    def _ends(self, tokens: int) -> tuple[int, int]:
        """A last page that is not full comes on top of the window's pages."""
        return self.sink_pages * self.page, self.window_pages * self.page + tokens % self.page
