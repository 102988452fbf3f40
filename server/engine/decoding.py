"""How a request gets from one token to the next: one by one, or by drafting several and checking them.

Drafts come from selective attention, which reads little and may be wrong. One pass over the whole cache then
computes what exact decoding says at all drafted places at once, and the drafts it agrees with are kept. The
pass computes their KV anew, in the same slots, so a draft leaves nothing behind in any cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from aquifer.server.engine.runner import Rows, SequenceCache
from aquifer.server.engine.sampling import Choice, Sampler, StepResult
from aquifer.server.engine.types import DraftCounts
from aquifer.server.metrics import Metrics

MAX_DRAFTS = 16


class Decoding(Protocol):
    """Decides what a request contributes to the next step, and what comes of the step's result."""

    @property
    def drafts(self) -> DraftCounts | None:
        """What speculation did so far; None without it."""

    @property
    def held_bytes(self) -> int:
        """What its caches keep of the device between steps besides pages and landmarks."""

    def rows(self, token_id: int, position: int, remaining: int) -> Rows:
        """token_id: the last token of the answer, at `position`. remaining: tokens it may still get."""

    def take(self, result: StepResult) -> list[Choice]:
        """The tokens that the step has settled, maybe none."""

    def release(self) -> None:
        """Let its caches go."""


class OneByOne:
    """Each step attends to one cache and gives one token."""

    drafts = None

    def __init__(self, cache: SequenceCache, sampler: Sampler) -> None:
        self._cache = cache
        self._sampler = sampler

    @property
    def held_bytes(self) -> int:
        return self._cache.held_bytes

    def rows(self, token_id: int, position: int, remaining: int) -> Rows:
        return Rows([token_id], position, self._cache, pick=self._sampler.pick)

    def take(self, result: StepResult) -> list[Choice]:
        if isinstance(result, Tensor):
            return [self._sampler.choose(result[0])]
        return _each(result)

    def release(self) -> None:
        self._cache.release()


class Verified:
    """Steps over a cheap cache draft tokens; a step over the exact one checks them.

    How many are drafted follows the acceptance seen in this request, not the clock, so that what else is
    running does not change what a seed draws.
    """

    def __init__(
        self,
        cheap: SequenceCache,
        exact: SequenceCache,
        sampler: Sampler,
        eos_token_ids: frozenset[int],
        metrics: Metrics,
    ) -> None:
        self.drafts = DraftCounts()
        self._cheap, self._exact, self._sampler = cheap, exact, sampler
        self._eos, self._metrics = eos_token_ids, metrics
        self._length = DraftLength()
        self._tokens: list[int] = []
        self._proposals: list[Tensor] = []  # none where the best token is chosen on the device
        self._checking = False

    @property
    def held_bytes(self) -> int:
        return self._cheap.held_bytes + self._exact.held_bytes

    def rows(self, token_id: int, position: int, remaining: int) -> Rows:
        # The check gives one token more than it accepts.
        wanted = min(self._length.best, remaining - 1)
        ended = bool(self._tokens) and self._tokens[-1] in self._eos
        self._checking = len(self._tokens) >= wanted or ended
        # A draft that was drawn is checked by the probabilities it was drawn by. The best tokens need none,
        # and bringing the logits of a check to the host would take longer than the check.
        pick = self._sampler.pick
        best = pick if pick is not None and pick.temperature == 0.0 else None
        if self._checking:
            return Rows([token_id, *self._tokens], position, self._exact, pick=best)
        last = [token_id, *self._tokens][-1]
        return Rows([last], position + len(self._tokens), self._cheap, pick=best)

    def take(self, result: StepResult) -> list[Choice]:
        if not self._checking:
            self._draft(result)
            return []
        if isinstance(result, Tensor):
            choices = self._sampler.accept(self._tokens, self._proposals, result)
        else:
            exact = _each(result)
            choices = exact[: agreement(self._tokens, exact) + 1]
        drafted, accepted = len(self._tokens), len(choices) - 1
        self._length.saw(accepted, drafted)
        self.drafts = self.drafts.plus(drafted, accepted)
        self._metrics.draft_tokens.labels(result="accepted").inc(accepted)
        self._metrics.draft_tokens.labels(result="rejected").inc(drafted - accepted)
        self._tokens, self._proposals = [], []
        return choices

    def release(self) -> None:
        try:
            self._cheap.release()
        finally:
            self._exact.release()

    def _draft(self, result: StepResult) -> None:
        if isinstance(result, Tensor):
            self._proposals.append(self._sampler.distribution(result[0], self._tokens))
            self._tokens.append(self._sampler.draw(self._proposals[-1]))
        else:
            self._tokens += [choice.token_id for choice in _each(result)]


def agreement(drafted: Sequence[int], exact: Sequence[Choice]) -> int:
    """How many of the first drafted tokens are what exact decoding says in their place."""
    wrong = (place for place, token in enumerate(drafted) if exact[place].token_id != token)
    return next(wrong, len(drafted))


def _each(result: Choice | list[Choice]) -> list[Choice]:
    return [result] if isinstance(result, Choice) else result


class DraftLength:
    """How many tokens to draft: as many as give the most tokens in a given time, by the acceptance so far.

    More than MAX_DRAFTS would give 1 % more tokens where 98 % of drafts agree with the check, 6 % at 99 %.
    """

    _CHECK_COST = 7.0
    """Of a check, in drafts: from 4, behind 8,192 tokens on a CPU, to 9, behind 131,072 on a GPU. Where it is
    half or twice as much, tokens take at most 5 % longer than at the best number."""

    _MEMORY = 0.8
    """Weight of a check against the one after it."""

    def __init__(self) -> None:
        self._accepted, self._tried = 9.0, 10.0
        self.best = self._best()

    def saw(self, accepted: int, drafted: int) -> None:
        """Learn from one check. What comes after the first rejected draft says nothing."""
        tried = accepted + (accepted < drafted)
        self._accepted = self._MEMORY * self._accepted + accepted
        self._tried = self._MEMORY * self._tried + tried
        self.best = self._best()

    def _best(self) -> int:
        rate = self._accepted / self._tried

        def tokens_in_time(count: int) -> float:
            # The check gives one token, and one for every draft if all drafts before it were right, too.
            return sum(rate**place for place in range(count + 1)) / (count + self._CHECK_COST)

        return max(range(1, MAX_DRAFTS + 1), key=tokens_in_time)
