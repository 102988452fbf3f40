"""Decoding with a part of the KV cache, simulated: what a method chooses and what it costs in answers.

A prompt is read once, densely. Every method then goes on from that one prefill, greedily, each in a branch
of its own; all branches go through the model as one flat batch, and methods that rank alike share products.
Generated tokens stay exact in every branch. No speed is measured here: the service's own modes do that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

import torch
from torch import Tensor

from aquifer.kernels.attention import attend, merge_attention
from aquifer.server.models.adapter import DecoderAdapter
from aquifer.workloads.selectors.base import (
    ExactKeys,
    Prompt,
    Ranker,
    Rows,
    RowStore,
    Scorer,
    TokenSelector,
    attention_share,
    bar,
    choose,
    exact_bytes,
)

PREFILL_CHUNK = 1024
RECALL_EVERY = 16
"""Steps between two measurements of recall: neighbouring steps choose mostly the same tokens."""


@dataclass(frozen=True)
class Method:
    """A selector with its two seams, either of which may have been swapped."""

    label: str
    selector: TokenSelector
    ranker: Ranker | None
    store: RowStore

    @classmethod
    def of(cls, label: str, selector: TokenSelector) -> Self:
        return cls(label, selector, selector.ranker(), selector.store())


@dataclass(frozen=True)
class Costs:
    """Of one method on one prompt. Bytes count 2 per unquantized value."""

    budget: float
    """Prompt tokens attended to at a step, exact ones included, as a share of the prompt"""
    bits: float
    """Stored on device and host, scales and landmarks included, per key or value of the prompt"""
    device_bytes: float
    """Per prompt token, all layers: landmarks, factors, exact tokens; not the rows fetched for a step"""
    fetched_bytes: int
    """Per step and sequence: every selected row counts, also one that the step before had fetched"""


@dataclass(frozen=True)
class Decoded:
    """What one branch generated. recall: per layer, mean over the steps measured; empty without a ranker."""

    tokens: list[int]
    stopped: bool
    recall: list[float]
    costs: Costs


@torch.inference_mode()
def prefill(
    adapter: DecoderAdapter, token_ids: Sequence[int], key_means: Tensor | None
) -> tuple[Prompt, Tensor]:
    """Read a prompt densely. Returns its KV cache and the logits [vocab] after its last token."""
    spec, device = adapter.spec, adapter.device
    shape = (spec.num_layers, spec.num_kv_heads, len(token_ids), spec.head_dim)
    raw_keys, keys, values = (torch.empty(shape, device=device) for _ in range(3))
    ids = torch.tensor(token_ids, device=device)
    positions = torch.arange(len(token_ids), device=device)
    hidden = torch.empty(0)
    for start in range(0, len(token_ids), PREFILL_CHUNK):
        end = min(start + PREFILL_CHUNK, len(token_ids))

        def attend_chunk(
            layer: int, q: Tensor, k_raw: Tensor, k: Tensor, v: Tensor, start: int = start, end: int = end
        ) -> Tensor:
            for cache, new in ((raw_keys, k_raw), (keys, k), (values, v)):
                cache[layer, :, start:end] = new.transpose(0, 1)
            dtype, q = q.dtype, q.float().transpose(0, 1)
            parts = [attend(q, keys[layer, :, start:end], values[layer, :, start:end], causal=True)]
            if start:
                parts.append(attend(q, keys[layer, :, :start], values[layer, :, :start]))
            return merge_attention(parts).transpose(0, 1).to(dtype)

        hidden = adapter.forward(ids[start:end], positions[start:end], attend_chunk)
    cos, sin = adapter.rope_table(positions)
    prompt = Prompt(spec, raw_keys, keys, values, (cos.float(), sin.float()), key_means)
    return prompt, adapter.logits(hidden[-1:])[0]


@torch.inference_mode()
def decode(
    adapter: DecoderAdapter,
    prompt: Prompt,
    first_logits: Tensor,
    methods: Sequence[Method],
    *,
    room: int,
    eos_token_ids: Sequence[int],
) -> list[Decoded]:
    """Answer from one prefill with every method, greedily, at most `room` tokens each.

    The first token comes from the prefill's logits, so it is the same for all. Results in the methods' order.
    Raises ValueError if a method's budget leaves nothing to choose or its knobs do not fit the model.
    """
    branches = [_Branch(prompt, method, room) for method in methods]
    # Equal rankers side by side, so that their queries are scored together.
    running = sorted(branches, key=lambda b: hash(b.method.ranker))
    first = int(first_logits.argmax())
    for branch in running:
        branch.take(first, eos_token_ids)
    for step in range(room - 1):
        running = [branch for branch in running if not branch.stopped]
        if not running:
            break
        ids = torch.tensor([branch.tokens[-1] for branch in running], device=adapter.device)
        positions = torch.full_like(ids, prompt.tokens + step)
        walk = _Step(prompt, running, step, measured=step % RECALL_EVERY == 0)
        best = adapter.logits(adapter.forward(ids, positions, walk.attend)).argmax(dim=1).tolist()
        for branch, token in zip(running, best, strict=True):
            branch.take(token, eos_token_ids)
    return [branch.result() for branch in branches]


class _Branch:
    """One method's continuation of the prompt."""

    def __init__(self, prompt: Prompt, method: Method, room: int) -> None:
        selector, spec = method.selector, prompt.spec
        self.method = method
        self.tokens: list[int] = []
        self.stopped = False
        self.count = selector.selected(prompt.tokens)
        self.scorer: Scorer | None = None
        self.rows: Rows | None = None
        self.barred: list[dict[int, Tensor]] = []
        """By layer, then by tokens per unit, as `choose` takes it"""
        exact = selector.exact_tokens(prompt)
        self.exact_count = exact.shape[2]
        if method.ranker is not None and self.count:
            ranker, store = method.ranker, method.store
            self.scorer = prompt.once(ranker, lambda: ranker.read(prompt))
            self.rows = prompt.once(store, lambda: store.read(prompt))
            self.barred = [
                {
                    unit: bar(tokens, prompt.tokens, unit, shared=selector.shared)
                    for unit in {1, self.scorer.unit}
                }
                for tokens in exact
            ]
        # Exact tokens of the prompt, then the generated ones: one piece of attention.
        shape = (spec.num_layers, spec.num_kv_heads, self.exact_count + room, spec.head_dim)
        index = exact.unsqueeze(3).expand(-1, -1, -1, spec.head_dim)
        self.keys, self.values = torch.empty(2, *shape, device=prompt.keys.device)
        self.keys[:, :, : self.exact_count] = prompt.keys.gather(2, index)
        self.values[:, :, : self.exact_count] = prompt.values.gather(2, index)
        self._recalls: list[list[Tensor]] = [[] for _ in range(spec.num_layers)]
        self._costs = self._count_costs(prompt)

    def take(self, token: int, eos_token_ids: Sequence[int]) -> None:
        self.tokens.append(token)
        self.stopped = token in eos_token_ids

    def result(self) -> Decoded:
        recall = [float(torch.stack(steps).mean()) for steps in self._recalls if steps]
        return Decoded(self.tokens[:-1] if self.stopped else self.tokens, self.stopped, recall, self._costs)

    def note_recall(self, layer: int, chosen: Tensor, best: Tensor, tokens: int) -> None:
        """chosen, best: int64 [S, count]."""
        found = torch.zeros(len(best), tokens, device=best.device).scatter_(1, chosen, 1.0)
        self._recalls[layer].append(found.gather(1, best).mean())

    def _count_costs(self, prompt: Prompt) -> Costs:
        spec = prompt.spec
        values = 2 * spec.num_layers * spec.channels
        device_bytes = self.exact_count / prompt.tokens * exact_bytes(spec)
        budget = (self.exact_count + self.count) / prompt.tokens
        if self.scorer is None or self.rows is None:
            return Costs(budget, 8 * exact_bytes(spec) / values, device_bytes, 0)
        coded = self.scorer.device_bytes + self.rows.device_bytes
        bits = 8 * (coded + self.rows.host_bytes) / values
        return Costs(budget, bits, device_bytes + coded, round(self.count * self.rows.host_bytes))


class _Step:
    """One decode step of all running branches, layer by layer."""

    def __init__(self, prompt: Prompt, running: list[_Branch], step: int, *, measured: bool) -> None:
        self._prompt, self._running, self._step, self._measured = prompt, running, step, measured
        self._truth = prompt.once(ExactKeys(), lambda: ExactKeys().read(prompt))

    def attend(self, layer: int, q: Tensor, k_raw: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `adapter.forward` calls it, one row per running branch."""
        dtype, q = q.dtype, q.float()
        chosen = self._choose(layer, q)
        out = torch.empty_like(q)
        for number, branch in enumerate(self._running):
            end = branch.exact_count + self._step + 1
            branch.keys[layer, :, end - 1], branch.values[layer, :, end - 1] = k[number], v[number]
            query = q[number].unsqueeze(1)
            parts = [attend(query, branch.keys[layer, :, :end], branch.values[layer, :, :end])]
            if (tokens := chosen.get(number)) is not None:
                assert branch.rows is not None
                parts.append(attend(query, *branch.rows.fetch(layer, tokens)))
            out[number] = merge_attention(parts).squeeze(1)
        return out.to(dtype)

    def _choose(self, layer: int, q: Tensor) -> dict[int, Tensor]:
        """int64 [S, count] tokens by number of the branch; branches without a ranker have none."""
        chosen: dict[int, Tensor] = {}
        ranked = [number for number, branch in enumerate(self._running) if branch.scorer is not None]
        for _, group in groupby(ranked, key=lambda number: id(self._running[number].scorer)):
            numbers = list(group)
            scorer = self._running[numbers[0]].scorer
            assert scorer is not None
            chosen |= self._choose_with(scorer, layer, q, numbers)
        if self._measured and ranked:
            best = self._choose_with(self._truth, layer, q, ranked)
            for number in ranked:
                self._running[number].note_recall(layer, chosen[number], best[number], self._prompt.tokens)
        return chosen

    def _choose_with(self, scorer: Scorer, layer: int, q: Tensor, numbers: list[int]) -> dict[int, Tensor]:
        shares = attention_share(scorer.score(layer, q[numbers]))
        return {
            number: choose(
                share,
                self._running[number].barred[layer][scorer.unit],
                self._running[number].count,
                scorer.unit,
            )
            for number, share in zip(numbers, shares, strict=True)
        }
