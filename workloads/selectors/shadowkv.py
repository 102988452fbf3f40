"""Low-rank keys on the device, values on the host, chunk means as landmarks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from aquifer.kernels.rope import apply_rope
from aquifer.workloads.selectors.base import VALUE_BYTES, Prompt, Rows, check_budget, ends
from aquifer.workloads.selectors.chunks import ChunkMeans


@dataclass(frozen=True)
class LowRankKeys:
    """Exact values; keys from the best approximation of a layer's keys before RoPE by `rank` directions.

    The directions are those of the prompt itself, over all its tokens and all heads together.
    """

    rank: int

    def read(self, prompt: Prompt) -> Rows:
        spec = prompt.spec
        if not 1 <= self.rank <= spec.channels:
            raise ValueError(f"rank is {self.rank}; keys of this model have {spec.channels} channels")
        keys = torch.empty_like(prompt.keys)
        for layer, raw in enumerate(prompt.raw_keys):
            rows = raw.transpose(0, 1).flatten(1)
            # The Gram matrix is small, unlike the keys; eigenvalues ascend.
            directions = torch.linalg.eigh(rows.mT @ rows).eigenvectors[:, -self.rank :]
            projected = (rows @ directions).bfloat16().float() @ directions.mT
            rotated = apply_rope(projected.view(prompt.tokens, -1, spec.head_dim), *prompt.rope)
            keys[layer] = rotated.transpose(0, 1)
        factors = self.rank * (1 + spec.channels / prompt.tokens)
        values = spec.num_layers * spec.channels * VALUE_BYTES
        return Rows(keys, prompt.values, spec.num_layers * factors * VALUE_BYTES, values)


@dataclass(frozen=True)
class ShadowKV:
    """Chooses chunks by their means, rebuilds their keys from low rank and fetches their values.

    Chunks whose keys resemble their mean least are outliers and stay exact on the device, like the last ones.
    The original's rank is 160 of 1,024 channels; of a model with 256 channels 40 are the same share.
    Source: ShadowKV, arXiv 2410.21465.
    """

    budget: float = 0.015625
    """Selected / prompt tokens, as the original counts: outliers and window come on top"""
    rank: int = 40
    chunk: int = 8
    """Tokens per chunk"""
    outliers: int = 384
    """Tokens, per layer and head"""
    window: int = 32
    """Last tokens kept exact"""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if min(self.rank, self.chunk) < 1 or min(self.outliers, self.window) < 0:
            raise ValueError("rank and chunk are at least 1, outliers and window at least 0")

    @property
    def shared(self) -> bool:
        return False

    def ranker(self) -> ChunkMeans:
        return ChunkMeans(self.chunk)

    def store(self) -> LowRankKeys:
        return LowRankKeys(self.rank)

    def exact_tokens(self, prompt: Prompt) -> Tensor:
        recent = ends(prompt, 0, self._recent(prompt.tokens))
        chunks = self._chunks(prompt.tokens)
        keys = prompt.keys[:, :, : chunks * self.chunk].unflatten(2, (-1, self.chunk))
        likeness = torch.cosine_similarity(keys, keys.mean(dim=3, keepdim=True), dim=-1).amin(dim=3)
        count = min(self.outliers // self.chunk, chunks)
        strange = likeness.topk(count, dim=2, largest=False).indices.unsqueeze(3) * self.chunk
        outliers = (strange + torch.arange(self.chunk, device=strange.device)).flatten(2)
        return torch.cat((outliers, recent), dim=2)

    def selected(self, tokens: int) -> int:
        free = max(0, self._chunks(tokens) - self.outliers // self.chunk)
        return min(max(1, round(self.budget * tokens / self.chunk)), free) * self.chunk

    def _recent(self, tokens: int) -> int:
        """The window, and what is left over behind the last whole chunk."""
        return min(tokens, self.window + (tokens - self.window) % self.chunk)

    def _chunks(self, tokens: int) -> int:
        """Whole chunks before the window."""
        return (tokens - self._recent(tokens)) // self.chunk
