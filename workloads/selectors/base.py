"""The two seams of every offloading method: what ranks tokens, and what stands in for the chosen rows.

A method keeps some tokens exact on the device, ranks the rest at every step with a `Ranker`, and attends to
the chosen ones as a `RowStore` gives them back. Both are small frozen recipes: two methods with equal recipes
share what is built from a prompt, and a diagnosis swaps one of them and leaves the rest alone.

Arithmetic runs in float32; codes are decoded once per prompt, not once per step (the numbers are the same).
Bytes are those of a deployment that keeps unquantized values in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from aquifer.compression.spec import SINK_TOKENS, KVSpec

VALUE_BYTES = 2
"""Of a key or value that is not quantized."""

WINDOW_TOKENS = 64
"""Last tokens of a prompt that stay exact on the device."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Prompt:
    """The KV cache of one prompt of T tokens, read densely; float32, whatever the model computes in."""

    spec: KVSpec
    raw_keys: Tensor
    """[L, H, T, D] before RoPE"""
    keys: Tensor
    """[L, H, T, D] after RoPE"""
    values: Tensor
    """[L, H, T, D]"""
    rope: tuple[Tensor, Tensor]
    """cos and sin [T, D]"""
    key_means: Tensor | None
    """[L, C] calibrated means of keys after RoPE, where the model has them"""
    _made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    def once(self, recipe: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returned the first time it was asked for this recipe."""
        if recipe not in self._made:
            self._made[recipe] = make()
        return cast(Made, self._made[recipe])


class Scorer(Protocol):
    """Estimates attention scores of a prompt's units: single tokens, chunks or pages."""

    @property
    def unit(self) -> int:
        """Consecutive tokens that are chosen together."""
        ...

    @property
    def device_bytes(self) -> float:
        """What ranking keeps on the device: bytes per prompt token, all layers."""
        ...

    def score(self, layer: int, queries: Tensor) -> Tensor:
        """queries: [R, Hq, D] after RoPE, of R independent steps.

        Returns [R, Hq, U], scaled by 1/sqrt(D), short of a constant per query head; U = T // unit.
        """
        ...


@dataclass(frozen=True)
class Rows:
    """Keys (after RoPE) and values as attention sees them once their tokens are chosen."""

    keys: Tensor
    """[L, H, T, D]"""
    values: Tensor
    """[L, H, T, D], contiguous like the keys"""
    device_bytes: float
    """Bytes per prompt token that stay on the device, all layers, beside what ranking keeps."""
    host_bytes: float
    """Bytes per prompt token in host memory, all layers: what fetching one chosen token moves."""

    def fetch(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: int64 [R, S, n], for R steps a set per KV head or one for all.

        Returns keys and values [R, H, n, D].
        """
        heads, length, head_dim = self.keys.shape[1:]
        first = torch.arange(heads, device=tokens.device).unsqueeze(1) * length
        # One flat index copies whole rows, several times faster than indexing by head and token.
        flat = first + tokens
        keys, values = (
            t[layer].view(-1, head_dim).index_select(0, flat.flatten()).view(*flat.shape, head_dim)
            for t in (self.keys, self.values)
        )
        return keys, values


class Ranker(Hashable, Protocol):
    """Recipe of a Scorer. Implementations are frozen dataclasses of their knobs."""

    def read(self, prompt: Prompt) -> Scorer: ...


class RowStore(Hashable, Protocol):
    """Recipe of Rows. Implementations are frozen dataclasses of their knobs."""

    def read(self, prompt: Prompt) -> Rows: ...


class TokenSelector(Protocol):
    """One method with its knobs. Implementations are frozen dataclasses, which `spec.py` parses."""

    @property
    def shared(self) -> bool:
        """Whether all KV heads of a layer read one set of tokens, instead of a set each."""
        ...

    def ranker(self) -> Ranker | None:
        """None: nothing is chosen, the exact tokens are all there is."""
        ...

    def store(self) -> RowStore: ...

    def exact_tokens(self, prompt: Prompt) -> Tensor:
        """int64 [L, H, F], no token twice: tokens kept exact on the device throughout."""
        ...

    def selected(self, tokens: int) -> int:
        """How many further tokens a step reads per layer and head, of a prompt of so many tokens.

        Raises ValueError if the budget does not reach that far.
        """
        ...


@dataclass(frozen=True)
class KeyScorer:
    """Scores by products with one key per unit."""

    keys: Tensor
    """[L, H, U, D], any strides"""
    unit: int
    device_bytes: float
    hidden: tuple[int, int] = (0, 0)
    """So many first and last units have no key here: their scores are -inf"""

    def score(self, layer: int, queries: Tensor) -> Tensor:
        scores = products(queries, self.keys[layer])
        first, last = self.hidden
        scores[..., :first] = -torch.inf
        scores[..., scores.shape[2] - last :] = -torch.inf
        return scores


@dataclass(frozen=True)
class ExactKeys:
    """Ranks by the true scores: what no method can rank better than."""

    def read(self, prompt: Prompt) -> KeyScorer:
        return KeyScorer(prompt.keys, 1, prompt.spec.bytes_per_token / prompt.spec.dtype.itemsize)


@dataclass(frozen=True)
class ExactRows:
    """Unquantized keys and values, fetched from the host."""

    def read(self, prompt: Prompt) -> Rows:
        return Rows(prompt.keys, prompt.values, 0.0, exact_bytes(prompt.spec))


def exact_bytes(spec: KVSpec) -> int:
    """Bytes of one unquantized token, keys and values of all layers."""
    return spec.bytes_per_token // spec.dtype.itemsize * VALUE_BYTES


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """queries: [R, Hq, D]; keys: [H, U, D]. Returns [R, Hq, U], scaled by 1/sqrt(D)."""
    steps, num_q_heads, head_dim = queries.shape
    heads, units, _ = keys.shape
    # All steps read the keys together, since the keys are what costs time; on a CPU, tall times narrow is
    # twice as fast as the reverse.
    columns = queries.view(steps, heads, -1, head_dim).permute(1, 3, 0, 2).reshape(heads, head_dim, -1)
    scores = keys @ (columns * head_dim**-0.5)
    return scores.view(heads, units, steps, -1).permute(2, 0, 3, 1).reshape(steps, num_q_heads, units)


def attention_share(scores: Tensor) -> Tensor:
    """Logarithm of the share of attention each unit gets. scores: [..., Hq, U]; the same shape comes back.

    Only shares can be compared between heads. The logarithm has no ties where a share underflows.
    """
    return scores - scores.logsumexp(dim=-1, keepdim=True)


def choose(shares: Tensor, barred: Tensor, count: int, unit: int) -> Tensor:
    """Choose the units that matter most to any query head of a set.

    shares: [..., Hq, U] as `attention_share` returns them
    barred: bool [S, U], units not to be chosen; S = H for a set per KV head, 1 for one set shared by all
    count: tokens per set, whole units of them
    Returns int64 [..., S, count] tokens. The same rule as `aquifer.kernels.landmarks.select_tokens`, except
    that barred tokens count in the softmax: a head that looks at sinks only should not ask for other tokens.
    """
    best = shares.unflatten(-2, (len(barred), -1)).amax(dim=-2).masked_fill_(barred, -torch.inf)
    chosen = _largest(best, count // unit)
    if unit == 1:
        return chosen
    return (chosen.unsqueeze(-1) * unit + torch.arange(unit, device=chosen.device)).flatten(-2)


def _largest(values: Tensor, count: int) -> Tensor:
    """int64 [..., count]: where the largest of the values [..., U] are, in no order."""
    if values.device.type != "cpu":
        return values.topk(count, dim=-1, sorted=False).indices
    # Selection in NumPy is vectorized; torch's top-k takes six times as long on a CPU.
    return torch.from_numpy(np.argpartition(values.numpy(), values.shape[-1] - count)[..., -count:])


def bar(exact: Tensor, tokens: int, unit: int, *, shared: bool) -> Tensor:
    """Units that hold an exact token. exact: int64 [H, F]. Returns bool [S, U] as `choose` takes it."""
    held = torch.zeros(len(exact), tokens, dtype=torch.bool, device=exact.device)
    held.scatter_(1, exact, torch.ones_like(exact, dtype=torch.bool))
    units = held[:, : tokens // unit * unit].view(len(exact), -1, unit).any(dim=2)
    return units.any(dim=0, keepdim=True) if shared else units


def ends(prompt: Prompt, first: int, last: int) -> Tensor:
    """int64 [L, H, first + last]: the first and the last tokens of a prompt, or all if it is short."""
    spec, tokens = prompt.spec, prompt.tokens
    device = prompt.keys.device
    if first + last >= tokens:
        kept = torch.arange(tokens, device=device)
    else:
        kept = torch.cat(
            (torch.arange(first, device=device), torch.arange(tokens - last, tokens, device=device))
        )
    return kept.expand(spec.num_layers, spec.num_kv_heads, -1)


def within_budget(budget: float, tokens: int, kept: int, unit: int) -> int:
    """Tokens left to choose when `kept` of a share `budget` of the prompt are exact; whole units of them.

    Raises ValueError if none are left.
    """
    count = min(round(budget * tokens), tokens) - kept
    if count < unit:
        raise ValueError(
            f"a budget of {budget:g} is {round(budget * tokens)} of {tokens} tokens, and {kept} of them are "
            "sinks and window: nothing is left to choose; raise the budget or the prompt's length"
        )
    return count // unit * unit


def check_budget(budget: float) -> None:
    if not 0 < budget <= 1:
        raise ValueError(f"budget is {budget:g}; it is a share of the prompt, in (0, 1]")


def unit_aligned_ends(tokens: int, unit: int) -> tuple[int, int]:
    """Sinks and window rounded up so that whole units lie between them."""
    first = -(-SINK_TOKENS // unit) * unit
    last = WINDOW_TOKENS + (tokens - WINDOW_TOKENS) % unit
    return first, last
