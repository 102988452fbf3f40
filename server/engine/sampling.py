"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquifer.server.engine.types import SamplingParams


@dataclass(frozen=True)
class Choice:
    token_id: int
    logprob: float


class Sampler:
    """One request's sampler. It owns its random generator, so that the tokens a seed draws do not
    depend on what other requests are running."""

    def __init__(self, params: SamplingParams, prompt_ids: tuple[int, ...]) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is not None:
            self._generator.manual_seed(params.seed)
        else:
            self._generator.seed()
        # Only the penalty needs to know what was seen; most requests do not pay for it.
        self._seen = set(prompt_ids) if params.repetition_penalty != 1.0 else None

    def choose(self, logits: Tensor) -> Choice:
        """logits: [vocab] float32 on the CPU. The log probability is the model's own, before penalty,
        temperature and cuts."""
        params = self._params
        scores = logits if self._seen is None else self._penalized(logits)
        if params.temperature == 0.0:
            token = int(scores.argmax())
        else:
            weights = filtered_probabilities(scores / params.temperature, params.top_k, params.top_p)
            token = int(torch.multinomial(weights, 1, generator=self._generator))
        if self._seen is not None:
            self._seen.add(token)
        return Choice(token, float(logits[token] - logits.logsumexp(-1)))

    def _penalized(self, logits: Tensor) -> Tensor:
        """Divide positive and multiply negative scores of tokens seen before.

        Source: CTRL, arXiv 1909.05858.
        """
        seen = torch.tensor(sorted(self._seen or ()))
        scores = logits.clone()
        old = scores[seen]
        penalty = self._params.repetition_penalty
        scores[seen] = torch.where(old > 0, old / penalty, old * penalty)
        return scores


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
