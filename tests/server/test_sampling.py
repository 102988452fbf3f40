"""Choosing a token: greedy, cut, penalized, seeded."""

from collections import Counter
from typing import Any

import pytest
import torch

from aquifer.server.engine.sampling import Choice, Sampler, filtered_probabilities, settle
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


@pytest.mark.parametrize("temperature", [1e-30, 1e-50, 5e-324])
def test_the_smallest_temperatures_take_the_best(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1), ())
    assert [sampler.choose(100 * LOGITS).token_id for _ in range(8)] == [0] * 8
    assert sampler.pick is not None
    (choice,) = settle([100 * LOGITS[None]], [sampler.pick])
    assert isinstance(choice, Choice) and choice.token_id == 0


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_same_seed_same_tokens_other_seed_other_tokens(temperature: float) -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=temperature, seed=seed), ())
        return [sampler.choose(LOGITS).token_id for _ in range(40)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 4},
    ],
)
def test_tokens_picked_beside_others_follow_their_own_distribution(options: dict[str, Any]) -> None:
    """Many rows of one request, between rows with other parameters."""
    pick = Sampler(SamplingParams(seed=1, **options), ()).pick
    others = [Sampler(SamplingParams(temperature=t, top_p=0.5, top_k=2, seed=2), ()).pick for t in (0.0, 2.0)]
    results = settle([LOGITS[None]] * 4002, [others[0], *[pick] * 4000, others[1]])
    choices = [result for result in results if isinstance(result, Choice)]
    counts = Counter(choice.token_id for choice in choices[1:-1])
    wanted = filtered_probabilities(
        LOGITS / options["temperature"], options.get("top_k", 0), options.get("top_p", 1.0)
    )
    assert set(counts) == set(wanted.nonzero().flatten().tolist())
    expected = {token: 4000 * float(wanted[token]) for token in counts}
    # 18.47 is the 0.999 quantile of chi-square with four degrees of freedom; with fewer it is lower.
    assert sum((counts[t] - e) ** 2 / e for t, e in expected.items()) < 18.47
    for choice in choices[:50]:
        assert choice.logprob == pytest.approx(LOGITS.log_softmax(-1)[choice.token_id].item(), abs=1e-5)


def test_what_is_picked_greedily_is_the_first_of_equals_and_what_is_not_picked_comes_back_whole() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    first, second = settle(logits.split([2, 1]), [None, Sampler(SamplingParams(), ()).pick])
    assert isinstance(first, torch.Tensor) and torch.equal(first, logits[:2])
    assert isinstance(second, Choice) and second.token_id == 0
    (tie,) = settle([logits[1:2]], [Sampler(SamplingParams(), ()).pick])
    assert isinstance(tie, Choice) and tie.token_id == 1
    (several, one) = settle([logits[:2], logits[2:]], [Sampler(SamplingParams(), ()).pick] * 2)
    assert isinstance(several, list) and [choice.token_id for choice in several] == [1, 1]
    assert isinstance(one, Choice) and one.token_id == 0


@pytest.mark.parametrize(
    "neighbour", [{}, {"temperature": 2.0, "top_p": 0.5}, {"temperature": 1.0, "top_k": 2}]
)
def test_what_a_seed_draws_does_not_depend_on_the_rows_beside_it(neighbour: dict[str, Any]) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))

    def draw(beside: bool) -> list[int]:
        sampler, other = (Sampler(SamplingParams(seed=3, **o), ()) for o in ({"temperature": 1.0}, neighbour))
        found = []
        for _ in range(40):
            rows = [logits, logits] if beside else [logits]
            (choice, *_) = settle(rows, [sampler.pick, other.pick][: len(rows)])
            assert isinstance(choice, Choice)
            found.append(choice.token_id)
        return found

    assert draw(beside=True) == draw(beside=False)


def test_a_penalty_cannot_be_picked_from_logits_alone() -> None:
    assert Sampler(SamplingParams(repetition_penalty=1.1), (1,)).pick is None
