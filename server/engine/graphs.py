"""Decode steps that are replayed instead of launched.

A step in which every sequence contributes one new token runs the same kernels over the same memory each time,
whatever the lengths of the sequences. So it is recorded once per number of rows as a CUDA graph, and later
steps fill the graph's inputs and replay it: one launch in place of hundreds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from aquifer.server.engine.runner import Rows


class GraphedAttention(Protocol):
    """Attention of one new token of each of B sequences, in a form that a CUDA graph can hold: fixed shapes,
    fixed addresses, no wait for the device.

    `prepare` runs on the host before every replay; what it fills must lie at the same address each time.
    `attend` runs once per layer while a graph is recorded, and its kernels again in every replay. Before a
    graph is recorded the step runs once with `prepare([], bucket)`, so that everything is compiled.
    """

    def accepts(self, row: Rows) -> bool:
        """Whether it can serve this row now: one new token over a cache of the kind it knows."""

    def prepare(self, rows: Sequence[Rows], bucket: int) -> Sequence[int]:
        """Fill the inputs of `rows`, and of bucket - len(rows) more that attend to nothing.

        Returns the slot in the pool of each row's new token; the step stores keys and values there."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [bucket, Hq, D] after RoPE; the new tokens' keys and values stand in the pool already.

        Returns [bucket, Hq, D]; anything finite in rows that attend to nothing."""
