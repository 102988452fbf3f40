"""Forward passes of the model over paged KV: one chunk of a prompt, or one step of many answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aquifer.kernels.attention import attend, merge_attention
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.models.adapter import DecoderAdapter


@dataclass(frozen=True)
class LayerKV:
    """KV of a chunk before RoPE, as the codec wants it. keys, values: [L, T, C]."""

    keys: Tensor
    values: Tensor


class ModelRunner:
    """Joins the adapter (arithmetic of the model) with the pool (where its KV lies)."""

    def __init__(self, adapter: DecoderAdapter, pool: PagePool) -> None:
        self._adapter = adapter
        self._pool = pool

    def prefill(self, token_ids: Sequence[int], start: int, table: BlockTable) -> tuple[Tensor, LayerKV]:
        """Compute tokens start..start+T of a sequence whose earlier KV stands in the table's pages.

        Writes their KV into the pages. Returns hidden states [T, hidden] and the KV before RoPE.
        """
        count = len(token_ids)
        past = table.runs([(0, start)])
        own = table.runs([(start, count)])
        keys_pre: list[Tensor] = []
        values: list[Tensor] = []

        def attention(layer: int, q: Tensor, k_pre: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys_pre.append(k_pre.flatten(1))
            values.append(v.flatten(1))
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
            self.write(layer, own, k, v)
            # The past in full and the chunk causally, because fused kernels are slow (or wrong) at a
            # causal mask whose corner is not in the corner of the matrix.
            parts = [self._attend_run(layer, q, run) for run in past]
            parts.append(attend(q, k, v, causal=True))
            return merge_attention(parts).transpose(0, 1)

        device = self._adapter.device
        positions = torch.arange(start, start + count, device=device)
        hidden = self._adapter.forward(torch.tensor(token_ids, device=device), positions, attention)
        return hidden, LayerKV(torch.stack(keys_pre), torch.stack(values))

    def decode(
        self, token_ids: Sequence[int], positions: Sequence[int], tables: Sequence[BlockTable]
    ) -> Tensor:
        """One step of B sequences: token_ids[b] stands at positions[b] of tables[b].

        Returns logits [B, vocab], float32.
        """
        device = self._adapter.device
        runs = [table.runs([(0, at + 1)]) for table, at in zip(tables, positions, strict=True)]
        slots = torch.tensor(
            [table.slot(at) for table, at in zip(tables, positions, strict=True)], device=device
        )

        def attention(layer: int, q: Tensor, k_pre: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._pool.keys[layer].index_copy_(1, slots, k.transpose(0, 1))
            self._pool.values[layer].index_copy_(1, slots, v.transpose(0, 1))
            rows = [
                merge_attention([self._attend_run(layer, q[b, :, None], run) for run in runs[b]])
                for b in range(len(runs))
            ]
            return torch.stack(rows).squeeze(2)

        hidden = self._adapter.forward(
            torch.tensor(token_ids, device=device), torch.tensor(positions, device=device), attention
        )
        return self._adapter.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [N, hidden]. Returns [N, vocab] float32."""
        return self._adapter.logits(hidden)

    def write(self, layer: int, runs: Sequence[tuple[int, int]], k: Tensor, v: Tensor) -> None:
        """Put keys (after RoPE) and values of one layer into the slots of `runs`.

        k, v: [H, T, D], T = total length of the runs.
        """
        done = 0
        for first, last in runs:
            self._pool.keys[layer, :, first:last] = k[:, done : done + last - first]
            self._pool.values[layer, :, first:last] = v[:, done : done + last - first]
            done += last - first

    def _attend_run(self, layer: int, q: Tensor, run: tuple[int, int]) -> tuple[Tensor, Tensor]:
        first, last = run
        return attend(q, self._pool.keys[layer, :, first:last], self._pool.values[layer, :, first:last])
