"""Choosing a token: greedy, cut, penalized, seeded."""

from collections import Counter

import pytest
import torch

from aquifer.server.engine.sampling import Sampler, filtered_probabilities
from aquifer.server.engine.types import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def test_greedy_takes_the_best_and_reports_the_models_log_probability() -> None:
    choice = Sampler(SamplingParams(), ()).choose(LOGITS)
    assert choice.token_id == 0
    assert choice.logprob == pytest.approx(LOGITS.log_softmax(-1)[0].item())


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_top_k_keeps_k_tokens(top_k: int) -> None:
    assert int((filtered_probabilities(LOGITS, top_k, 1.0) > 0).sum()) == top_k


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, 1), (0.6, 1), (0.7, 2), (0.9, 3), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(top_p: float, kept: int) -> None:
    probabilities = filtered_probabilities(LOGITS, 0, top_p)
    assert int((probabilities > 0).sum()) == kept
    assert probabilities.sum().item() == pytest.approx(1.0)


def test_samples_follow_the_distribution() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1), ())
    counts = Counter(sampler.choose(LOGITS).token_id for _ in range(4000))
    expected = 4000 * LOGITS.softmax(-1)
    # 18.47 is the 0.999 quantile of chi-square with four degrees of freedom.
    assert sum((counts[t] - e) ** 2 / e for t, e in enumerate(expected.tolist())) < 18.47


def test_penalty_lowers_tokens_of_the_prompt_and_of_the_answer() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=3.0), prompt_ids=(0,))
    assert [sampler.choose(LOGITS).token_id for _ in range(2)] == [1, 0]


def test_penalty_pushes_negative_scores_further_down() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), prompt_ids=(0,))
    assert sampler.choose(torch.tensor([-1.0, -1.5])).token_id == 1


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_same_seed_same_tokens_other_seed_other_tokens(temperature: float) -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=temperature, seed=seed), ())
        return [sampler.choose(LOGITS).token_id for _ in range(40)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
