"""Speculation must not change what is answered: not the tokens (greedy), not their distribution (sampled)."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aquifer.server.engine.decoding import MAX_DRAFTS, DraftLength, Verified
from aquifer.server.engine.runner import CachePass
from aquifer.server.engine.sampling import Sampler, settle
from aquifer.server.engine.types import SamplingParams
from aquifer.server.metrics import Metrics

VOCABULARY = 4
RUNS = 1500


class Place:
    """Stands for a cache: says which of two models computes a step."""

    held_bytes = 0

    def staging_bytes(self, start: int, count: int) -> int:
        return 0

    def open(self, start: int, count: int) -> CachePass:
        raise AssertionError("no pass is run here")

    def release(self) -> None: ...


def models(sharpness: float) -> tuple[Tensor, Tensor]:
    """Logits [V, V] of the next token after each token: of the exact and of the drafting model."""
    generator = torch.Generator().manual_seed(3)
    exact, noise = torch.randn(2, VOCABULARY, VOCABULARY, generator=generator)
    return sharpness * exact, sharpness * (exact + 0.7 * noise)


def chi_square(observed: Sequence[int], expected: Sequence[float]) -> float:
    """Probability of a deviation this large or larger, if `expected` is the truth."""
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def generate(
    exact: Tensor, drafting: Tensor, params: SamplingParams, count: int, *, on_device: bool = False
) -> list[int]:
    """`count` tokens after token 0 by verified decoding. on_device: rows that say how to choose their next
    token get it, rather than logits."""
    cheap, whole = Place(), Place()
    decoding = Verified(cheap, whole, Sampler(params, (0,)), frozenset(), Metrics())
    tokens = [0]
    while len(tokens) <= count:
        rows = decoding.rows(tokens[-1], len(tokens) - 1, count + 1 - len(tokens))
        assert rows.start + len(rows.token_ids) <= count + 1
        logits = (exact if rows.cache is whole else drafting)[torch.tensor(list(rows.token_ids))]
        (result,) = settle([logits], [rows.pick if on_device else None])
        tokens += [choice.token_id for choice in decoding.take(result)]
    return tokens[1 : count + 1]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.3, top_k=3),
    ],
    ids=["all", "top_p", "top_k"],
)
def test_sampled_tokens_have_the_distribution_of_the_exact_model(sampling: SamplingParams) -> None:
    exact, drafting = models(1.0)
    seen = Counter(
        tuple(generate(exact, drafting, replace(sampling, seed=seed), 3))
        for seed in range(7_000, 7_000 + RUNS)
    )
    probabilities = Sampler(sampling, ())
    step = torch.stack([probabilities.distribution(row) for row in exact]).double()
    observed, expected = [], []
    for path in itertools.product(range(VOCABULARY), repeat=3):
        share = float(step[0, path[0]] * step[path[0], path[1]] * step[path[1], path[2]])
        if share == 0:
            assert path not in seen
            continue
        observed.append(seen[path])
        expected.append(share * RUNS)
    assert chi_square(observed, expected) > 0.001


def test_a_wrong_rule_would_be_noticed() -> None:
    """The test above has the power to tell the drafting model from the exact one."""
    exact, drafting = models(1.0)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(RUNS)]
    seen = Counter(generate(drafting, drafting, p, 1)[0] for p in params)
    expected = torch.softmax(exact[0].double(), -1) * RUNS
    assert chi_square([seen[token] for token in range(VOCABULARY)], expected.tolist()) < 1e-6


def test_greedy_tokens_are_those_of_the_exact_model() -> None:
    exact, drafting = models(1.0)
    expected, token = [], 0
    for _ in range(40):
        token = int(exact[token].argmax())
        expected.append(token)
    assert generate(exact, drafting, SamplingParams(), 40) == expected
    assert generate(exact, drafting, SamplingParams(), 40, on_device=True) == expected


def test_the_penalty_counts_drafted_tokens_like_chosen_ones() -> None:
    exact, drafting = models(2.0)
    params = SamplingParams(repetition_penalty=1.8)
    one_by_one = Sampler(params, (0,))
    expected, token = [], 0
    for _ in range(12):
        token = one_by_one.choose(exact[token]).token_id
        expected.append(token)
    assert generate(exact, drafting, params, 12) == expected


def test_distributions_that_differ_by_rounding_only_can_be_rejected_and_redrawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1), ())
    monkeypatch.setattr(sampler, "_uniform", lambda: 1.0)
    logits = torch.tensor([1.0, 2.0, 3.0])
    wanted = sampler.distribution(logits)
    choices = sampler.accept([2], [wanted * (1 + 1e-6)], torch.stack([logits, logits]))
    assert len(choices) == 1 and 0 <= choices[0].token_id <= 2


def test_one_seed_draws_the_same_tokens_again() -> None:
    exact, drafting = models(1.0)
    params = SamplingParams(temperature=1.0, seed=5)
    tokens = generate(exact, drafting, params, 30)
    assert generate(exact, drafting, params, 30) == tokens
    # A draft that is drawn is never left to the device: the check needs the probabilities it was drawn by.
    assert generate(exact, drafting, params, 30, on_device=True) == tokens


def test_drafting_adapts_to_what_is_accepted() -> None:
    always, never = DraftLength(), DraftLength()
    for _ in range(30):
        always.saw(always.best, always.best)
        never.saw(0, never.best)
    assert always.best == MAX_DRAFTS
    assert never.best == 1


def test_drafts_are_counted() -> None:
    exact, _ = models(1.0)
    metrics = Metrics()
    decoding = Verified(Place(), whole := Place(), Sampler(SamplingParams(), (0,)), frozenset(), metrics)
    settled = 0
    while settled < 20:
        rows = decoding.rows(0, 0, 100)
        logits = exact[torch.tensor(list(rows.token_ids))]
        if rows.cache is whole:
            logits = logits.flip(1)  # the check disagrees with every draft
        settled += len(decoding.take(logits))
    assert decoding.drafts.checks == settled == 20
    assert decoding.drafts.accepted == 0
    assert metrics.draft_tokens.labels(result="rejected")._value.get() == decoding.drafts.drafted > 20
