"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aquifer.server.engine.types import SamplingParams


@dataclass(frozen=True)
class Choice:
    token_id: int
    logprob: float


@dataclass(frozen=True)
class Pick:
    """All that choosing a token takes besides its logits, so that the device that has them can choose.

    The fields are those of SamplingParams; uniform: gives a number from [0, 1), of the request's generator.
    """

    temperature: float
    top_k: int
    top_p: float
    uniform: Callable[[], float]


class Sampler:
    """One request's sampler. It owns its random generator, so that the tokens a seed draws do not
    depend on what other requests are running."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is not None:
            self._generator.manual_seed(params.seed)
        else:
            self._generator.seed()
        # Only the penalty needs to know what was seen; most requests do not pay for it.
        self._seen = set(prompt_ids) if params.repetition_penalty != 1.0 else None

    @property
    def pick(self) -> Pick | None:
        """How to choose the next token where the logits are; None if that needs to know the tokens before."""
        if self._seen is not None:
            return None
        params = self._params
        return Pick(params.temperature, params.top_k, params.top_p, self._fine_uniform)

    def choose(self, logits: Tensor) -> Choice:
        """logits: [vocab] float32 on the CPU. The log probability is the model's own, before penalty,
        temperature and cuts."""
        return self._chosen(self.draw(self.distribution(logits)), logits)

    def distribution(self, logits: Tensor, drafted: Sequence[int] = ()) -> Tensor:
        """Probabilities [vocab] by which the next token is drawn; greedy: all of it on one token.

        drafted: tokens after those that were chosen, if the logits are for a position further on.
        """
        params = self._params
        scores = logits if self._seen is None else self._penalized(logits, self._seen.union(drafted))
        if params.temperature == 0.0:
            return torch.zeros_like(scores).index_fill_(0, scores.argmax(), 1.0)
        return filtered_probabilities(_cooled(scores, params.temperature), params.top_k, params.top_p)

    def draw(self, probabilities: Tensor) -> int:
        """A token by its probability [vocab]."""
        if self._params.temperature == 0.0:
            return int(probabilities.argmax())
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def accept(self, drafts: Sequence[int], proposals: Sequence[Tensor], logits: Tensor) -> list[Choice]:
        """Keep the longest run of drafts that exact decoding could have drawn, and draw one token after it.

        drafts[i] was drawn from proposals[i] [vocab]; logits: [len(drafts) + 1, vocab] of the exact model.
        A draft x stays with probability min(1, p(x)/q(x)); the first that does not is replaced by a draw
        from what p has more than q. So the tokens are distributed as if each was drawn from p; greedily,
        they are those of p. Source: speculative sampling, arXiv 2302.01318.
        """
        choices: list[Choice] = []
        for place, (token, proposal) in enumerate(zip(drafts, proposals, strict=True)):
            wanted = self.distribution(logits[place])
            keep = float(wanted[token] / proposal[token])
            if keep < 1.0 and self._uniform() >= keep:
                surplus = (wanted - proposal).clamp_(min=0)
                # Rounding can leave nothing of two distributions that are equal.
                rest = surplus if bool(surplus.any()) else wanted
                choices.append(self._chosen(self.draw(rest / rest.sum()), logits[place]))
                return choices
            choices.append(self._chosen(token, logits[place]))
        choices.append(self.choose(logits[len(drafts)]))
        return choices

    def _uniform(self) -> float:
        """A draw from [0, 1)."""
        return float(torch.rand((), generator=self._generator))

    def _fine_uniform(self) -> float:
        """A draw from [0, 1), fine enough for the least likely token of a large vocabulary."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def _chosen(self, token: int, logits: Tensor) -> Choice:
        if self._seen is not None:
            self._seen.add(token)
        return Choice(token, float(logits[token] - logits.logsumexp(-1)))

    def _penalized(self, logits: Tensor, seen_ids: set[int]) -> Tensor:
        """Divide positive and multiply negative scores of tokens seen before.

        Source: CTRL, arXiv 1909.05858.
        """
        seen = torch.tensor(sorted(seen_ids))
        scores = logits.clone()
        old = scores[seen]
        penalty = self._params.repetition_penalty
        scores[seen] = torch.where(old > 0, old / penalty, old * penalty)
        return scores


def _cooled(scores: Tensor, temperature: float | Tensor) -> Tensor:
    """Scores [..., vocab] over a temperature, however small, up to what all of them have more."""
    divisor = torch.as_tensor(temperature, dtype=torch.float32, device=scores.device)
    smallest = torch.finfo(torch.float32).tiny
    return (scores - scores.amax(dim=-1, keepdim=True)) / divisor.clamp(min=smallest)


def filtered_probabilities(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Softmax over the tokens that top-k and then top-p leave.

    scores: [vocab] float32. top_k 0 and top_p 1.0 cut nothing; the best token always stays.
    Returns [vocab] probabilities.
    """
    if 0 < top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    probabilities = torch.softmax(scores, dim=-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        # A token is cut when those before it already hold the mass.
        cut = order[(ordered.cumsum(0) - ordered) >= top_p]
        cut = cut[cut != order[0]]
        probabilities = probabilities.index_fill(0, cut, 0.0)
        probabilities = probabilities / probabilities.sum()
    return probabilities


StepResult = Tensor | Choice | list[Choice]
"""What a step gives a sequence of R new tokens: logits [R, vocab] float32 on the CPU; or, if it said how to
choose, the token after each of them, in a list unless R is 1."""


def settle(logits: Sequence[Tensor], picks: Sequence[Pick | None]) -> list[StepResult]:
    """Choose tokens on the device of the logits, which are [R, vocab] float32 for each sequence.

    Returns the choices of each sequence with a pick, and for others their logits on the CPU.
    """
    picked = [(own, pick) for own, pick in zip(logits, picks, strict=True) if pick is not None]
    whole = [own for own, pick in zip(logits, picks, strict=True) if pick is None]
    each = [pick for own, pick in picked for _ in range(len(own))]
    chosen = iter(_picked(torch.cat([own for own, _ in picked]), each) if picked else ())
    moved = iter(torch.cat(whole).cpu().split([len(own) for own in whole]) if whole else ())
    results: list[StepResult] = []
    for own, pick in zip(logits, picks, strict=True):
        if pick is None:
            results.append(next(moved))
        else:
            results.append(next(chosen) if len(own) == 1 else [next(chosen) for _ in range(len(own))])
    return results


def _picked(logits: Tensor, picks: Sequence[Pick]) -> list[Choice]:
    """One token per row, with one wait for the device. logits: [N, vocab]. Draws by inverting the sum of
    the probabilities, which `Sampler.draw` need not do: the same distribution, other tokens for a seed."""
    vocabulary = logits.shape[1]
    numbers = [[p.temperature or 1.0, p.top_p if p.top_p < 1.0 else 2.0, 0.0] for p in picks]
    for row, pick in zip(numbers, picks, strict=True):
        if pick.temperature:
            row[2] = pick.uniform()
    temperature, top_p, uniform = torch.tensor(numbers, dtype=torch.float64).to(logits.device).T[..., None]
    scores = _cooled(logits, temperature)
    kept = [pick.top_k if 0 < pick.top_k < vocabulary else 0 for pick in picks]
    if any(kept):
        best = scores.topk(max(kept)).values
        last = torch.tensor(kept, device=logits.device)[:, None]
        least = best.gather(1, (last - 1).clamp(min=0)).masked_fill(last == 0, -torch.inf)
        scores = scores.masked_fill(scores < least, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1)
    if any(pick.top_p < 1.0 for pick in picks):
        ordered, order = probabilities.sort(descending=True)
        cut = ordered.cumsum(1) - ordered >= top_p
        cut[:, 0] = False
        # Back into the order of the vocabulary: what a number draws must not depend on the other rows' cuts.
        probabilities = probabilities.scatter(1, order, ordered.masked_fill(cut, 0.0))
    sums = probabilities.double().cumsum(1)
    drawn = torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp(max=vocabulary - 1)
    greedy = torch.tensor([pick.temperature == 0.0 for pick in picks], device=logits.device)[:, None]
    tokens = torch.where(greedy, logits.argmax(1, keepdim=True), drawn)
    logprobs = logits.gather(1, tokens) - logits.logsumexp(1, keepdim=True)
    ids, chances = torch.cat((tokens.double(), logprobs.double()), dim=1).T.tolist()
    return [Choice(int(token), logprob) for token, logprob in zip(ids, chances, strict=True)]
