"""An imposed share of accepted drafts."""

import pytest

from aquifer.benchmarks.acceptance import chance_of_one, imposed_acceptance
from aquifer.server.engine import decoding
from aquifer.server.engine.sampling import Choice

WRONG = Choice(0, 0.0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.85, 1.0])
def test_checks_accept_the_share_whatever_the_number_of_drafts(share: float) -> None:
    plain = decoding.agreement
    with imposed_acceptance(share):
        for count in (1, 6, 16):
            accepted = [decoding.agreement([1] * count, [WRONG] * count) for _ in range(2000)]
            assert sum(accepted) / (2000 * count) == pytest.approx(share, abs=0.03)
    assert decoding.agreement is plain and plain([1, 1], [WRONG, WRONG]) == 0


def test_drafts_of_a_check_have_one_chance_each() -> None:
    assert chance_of_one(0.85, 1) == pytest.approx(0.85)
    assert 0.97 < chance_of_one(0.85, 16) < 0.99
