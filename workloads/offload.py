"""Decoding with a part of the KV cache, simulated: what a method chooses and what it costs in answers.

A prompt is read once, densely. Every method then goes on from that one prefill, greedily, each in a branch
of its own; all branches go through the model as one flat batch, and methods that rank alike share products.
Generated tokens stay exact in every branch. No speed is measured here: the service's own modes do that.

Greedy tokens can be checked many at a time. A branch gets its last token and a guess of the next ones in one
pass; each of them ranks and chooses for itself, as its own step would, and sees the new ones before it. What
agrees with the model's choice stays, and the first that does not is replaced by that choice: the tokens are
those of one step each, up to float rounding, however bad the guesses are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Self

import torch
from torch import Tensor

from aquifer.kernels.attention import attend, merge_attention
from aquifer.server.models.adapter import DecoderAdapter
from aquifer.workloads.guesses import Guesser
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
"""Generated tokens between two measurements of recall: neighbouring ones choose mostly the same."""


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
    guesser: Guesser | None = None,
) -> list[Decoded]:
    """Answer from one prefill with every method, greedily, at most `room` tokens each.

    The first token comes from the prefill's logits, so it is the same for all. Results in the methods' order.
    guesser: makes it faster and changes no token; without one every token is a pass of its own.
    Raises ValueError if a method's budget leaves nothing to choose or its knobs do not fit the model.
    """
    branches = [_Branch(prompt, method, room) for method in methods]
    first = int(first_logits.argmax())
    for branch in branches:
        branch.take(first, eos_token_ids)
    # Equal rankers side by side, so that their queries are scored together.
    running = sorted(branches, key=lambda b: hash(b.method.ranker))
    while running := [branch for branch in running if not branch.stopped and len(branch.tokens) < room]:
        guesses = [branch.guess(guesser) for branch in running]
        fed = [[branch.tokens[-1], *guess] for branch, guess in zip(running, guesses, strict=True)]
        walk = _Pass(prompt, running, [len(tokens) for tokens in fed])
        ids = torch.tensor([token for tokens in fed for token in tokens], device=adapter.device)
        positions = torch.tensor(walk.steps, device=adapter.device) + prompt.tokens
        best = adapter.logits(adapter.forward(ids, positions, walk.attend)).argmax(dim=1).tolist()
        for branch, guess, rows in zip(running, guesses, walk.rows, strict=True):
            branch.check(guess, best[rows], eos_token_ids)
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
        self.store: Rows | None = None
        self.barred: list[dict[int, Tensor]] = []
        """By layer, then by tokens per unit, as `choose` takes it"""
        exact = selector.exact_tokens(prompt)
        self.exact_count = exact.shape[2]
        if method.ranker is not None and self.count:
            ranker, store = method.ranker, method.store
            self.scorer = prompt.once(ranker, lambda: ranker.read(prompt))
            self.store = prompt.once(store, lambda: store.read(prompt))
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
        self._prompt_tokens, self._room = prompt.tokens, room
        self._reach = room
        """Tokens worth guessing: few after a wrong guess, twice as many after each right one"""
        self._recalls: list[dict[int, Tensor]] = [{} for _ in range(spec.num_layers)]
        """By layer, then by the step measured"""
        self._costs = self._count_costs(prompt)

    @property
    def step(self) -> int:
        """Of the last token, which is the next to go through the model: 0 for the first one generated."""
        return len(self.tokens) - 1

    def guess(self, guesser: Guesser | None) -> list[int]:
        """Tokens that may come next; with the one that follows them they fit into the room."""
        count = min(self._reach, self._room - len(self.tokens) - 1)
        return [] if guesser is None else guesser.after(self.tokens, count)

    def check(self, guess: Sequence[int], best: Sequence[int], eos_token_ids: Sequence[int]) -> None:
        """best: the model's choice behind the last token, then behind each guessed one."""
        agreed = 0
        self.take(best[0], eos_token_ids)
        while agreed < len(guess) and guess[agreed] == best[agreed] and not self.stopped:
            agreed += 1
            self.take(best[agreed], eos_token_ids)
        self._reach = 2 * (agreed + 1)

    def take(self, token: int, eos_token_ids: Sequence[int]) -> None:
        self.tokens.append(token)
        self.stopped = token in eos_token_ids

    def result(self) -> Decoded:
        # Steps behind the end were guesses that came to nothing.
        recall = [
            float(torch.stack([found for step, found in steps.items() if step < self.step]).mean())
            for steps in self._recalls
            if steps
        ]
        return Decoded(self.tokens[:-1] if self.stopped else self.tokens, self.stopped, recall, self._costs)

    def note_recall(self, layer: int, steps: Sequence[int], chosen: Tensor, best: Tensor) -> None:
        """chosen, best: int64 [R, S, count], of R steps. A step guessed wrong is noted again, once right."""
        found = torch.zeros(*best.shape[:2], self._prompt_tokens, device=best.device).scatter_(2, chosen, 1.0)
        self._recalls[layer].update(zip(steps, found.gather(2, best).mean(dim=(1, 2)), strict=True))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None) -> Tensor:
        """Store the keys and values of R new tokens and attend from each to what it may see.

        q: [R, Hq, D]; k, v: [R, H, D]; chosen: int64 [R, S, count], of the prompt. Returns [R, Hq, D].
        """
        k, v, queries = k.transpose(0, 1), v.transpose(0, 1), q.transpose(0, 1)
        past = self.exact_count + self.step
        end = past + len(q)
        self.keys[layer, :, past:end], self.values[layer, :, past:end] = k, v
        parts = [attend(queries, k, v, causal=True)]
        if past:
            parts.append(attend(queries, self.keys[layer, :, :past], self.values[layer, :, :past]))
        if chosen is not None:
            assert self.store is not None
            parts.append(_attend_own(q, *self.store.fetch(layer, chosen)))
        return merge_attention(parts).transpose(0, 1)

    def _count_costs(self, prompt: Prompt) -> Costs:
        spec = prompt.spec
        values = 2 * spec.num_layers * spec.channels
        device_bytes = self.exact_count / prompt.tokens * exact_bytes(spec)
        budget = (self.exact_count + self.count) / prompt.tokens
        if self.scorer is None or self.store is None:
            return Costs(budget, 8 * exact_bytes(spec) / values, device_bytes, 0)
        coded = self.scorer.device_bytes + self.store.device_bytes
        bits = 8 * (coded + self.store.host_bytes) / values
        return Costs(budget, bits, device_bytes + coded, round(self.count * self.store.host_bytes))


def _attend_own(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of R queries, each to keys of its own. q: [R, Hq, D]; k, v: [R, H, n, D].

    Returns (out [Hq, R, D], lse [Hq, R]) like `attend`.
    """
    rows, heads, _ = q.shape
    # To `attend`, the heads of R rows are R times as many heads.
    out, lse = attend(q.reshape(rows * heads, 1, -1), k.flatten(0, 1), v.flatten(0, 1))
    # A copy, since of a single row `contiguous` would keep strides that the merging kernel refuses.
    lse = lse.reshape(rows, heads).T.clone(memory_format=torch.contiguous_format)
    return out.reshape(rows, heads, -1).transpose(0, 1), lse


class _Pass:
    """One pass of all running branches through the model, layer by layer; each has some rows of it."""

    def __init__(self, prompt: Prompt, running: list[_Branch], counts: Sequence[int]) -> None:
        """counts: rows of each branch."""
        self._running = running
        self.rows = [slice(*ends) for ends in pairwise(accumulate(counts, initial=0))]
        self.steps = [b.step + i for b, count in zip(running, counts, strict=True) for i in range(count)]
        scorers = {n: branch.scorer for n, branch in enumerate(running) if branch.scorer is not None}
        ranked = {n: list(range(self.rows[n].start, self.rows[n].stop)) for n in scorers}
        self._groups: list[_Group] = []
        for _, numbers in groupby(scorers, key=lambda n: id(scorers[n])):
            own = {n: ranked[n] for n in numbers}
            self._groups.append(_Group.of(scorers[next(iter(own))], own, prompt))
        truth = prompt.once(ExactKeys(), lambda: ExactKeys().read(prompt))
        measured = {n: [row for row in ranked[n] if self.steps[row] % RECALL_EVERY == 0] for n in ranked}
        self._measured = _Group.of(truth, {n: rows for n, rows in measured.items() if rows}, prompt)

    def attend(self, layer: int, q: Tensor, k_raw: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `adapter.forward` calls it."""
        dtype, q, k, v = q.dtype, q.float(), k.float(), v.float()
        chosen: dict[int, Tensor] = {}
        for group in self._groups:
            chosen |= self._choose(group, layer, q)
        self._measure(layer, q, chosen)
        out = torch.empty_like(q)
        for number, (branch, rows) in enumerate(zip(self._running, self.rows, strict=True)):
            out[rows] = branch.attend(layer, q[rows], k[rows], v[rows], chosen.get(number))
        return out.to(dtype)

    def _choose(self, group: _Group, layer: int, q: Tensor) -> dict[int, Tensor]:
        """int64 [R, S, count] tokens by number of the branch, for its R rows in the group."""
        scorer = group.scorer
        shares = attention_share(scorer.score(layer, q[group.index]))
        chosen = {}
        for number, own in zip(group.rows, shares.split(group.counts), strict=True):
            branch = self._running[number]
            chosen[number] = choose(own, branch.barred[layer][scorer.unit], branch.count, scorer.unit)
        return chosen

    def _measure(self, layer: int, q: Tensor, chosen: dict[int, Tensor]) -> None:
        if not self._measured.rows:
            return
        for number, best in self._choose(self._measured, layer, q).items():
            rows = self._measured.rows[number]
            own = chosen[number][rows[0] - self.rows[number].start :: RECALL_EVERY]
            self._running[number].note_recall(layer, [self.steps[row] for row in rows], own, best)


@dataclass(frozen=True)
class _Group:
    """Rows of one pass that are ranked by the same scorer: their products are taken together."""

    scorer: Scorer
    rows: dict[int, list[int]]
    """By number of the branch"""
    index: Tensor
    """int64, all of them"""
    counts: list[int]

    @classmethod
    def of(cls, scorer: Scorer, rows: dict[int, list[int]], prompt: Prompt) -> Self:
        index = torch.tensor([row for own in rows.values() for row in own], device=prompt.keys.device)
        return cls(scorer, rows, index, [len(own) for own in rows.values()])
