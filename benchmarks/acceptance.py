"""Which share of the drafts is accepted: imposed, where random KV would have a share that is no text's.

How fast verified decoding is hangs on it. Drafts are made and checked as always, and only what the check says
of them is replaced.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

from torch import Tensor

from aquifer.server.engine import decoding
from aquifer.server.engine.sampling import Choice, Sampler


@contextmanager
def imposed_acceptance(share: float) -> Iterator[None]:
    """Within it, engines accept `share` of the drafts, on average over their checks.

    As in a text, a check accepts drafts until the first wrong one; every draft before it had the same chance.
    """
    chance = random.Random(0)

    def agreement(drafted: Sequence[int], exact: Sequence[Choice]) -> int:
        each = chance_of_one(share, len(drafted))
        wrong = (place for place in range(len(drafted)) if chance.random() >= each)
        return next(wrong, len(drafted))

    def accept(
        sampler: Sampler, drafted: Sequence[int], proposals: Sequence[Tensor], logits: Tensor
    ) -> list[Choice]:
        return [sampler.choose(own) for own in logits[: agreement(drafted, ()) + 1]]

    # The first where tokens are chosen on the device, the second elsewhere.
    with patch.object(decoding, "agreement", agreement), patch.object(Sampler, "accept", accept):
        yield


@cache
def chance_of_one(share: float, count: int) -> float:
    """That a draft is right if those before it are, so that `share` of `count` drafts is accepted."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        accepted = sum(middle**place for place in range(1, count + 1))
        low, high = (middle, high) if accepted < share * count else (low, middle)
    return high
