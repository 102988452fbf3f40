"""Which share of the chosen rows is on the device already: recorded from a trained model, imposed on others.

How fast selective decoding is hangs on this share, and random KV has one that is no text's. So the row cache
of the bundled model is watched while it answers a real question (`record`), and a measurement can make any
model choose tokens that are found in the row cache as often, or never (`Rows`). Everything else is done as
always: landmarks are scored, tokens ranked, rows looked up, fetched and attended to. Only what the ranking
says is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aquifer.compression.spec import KVSpec
from aquifer.server.engine.build import build_engine
from aquifer.server.engine.selective import ROW_CACHE_STEPS, RowCache, indexed_tokens
from aquifer.server.engine.types import GenerateRequest, SamplingParams
from aquifer.server.metrics import Metrics
from aquifer.server.settings import Settings

TRACE_FILE = Path(__file__).with_name("selection.npz")

RowsKind = Literal["own", "misses", "trace"]
"""Rows of the model's own choice; rows none of which is on the device; rows found there as in the trace."""

_STEPS = 4096
"""Of one answer; a longer one begins again."""

_GOLDEN = 0.6180339887498949
"""Multiples of it, less their whole part, lie evenly between 0 and 1: the bins take turns."""


@dataclass(frozen=True)
class SelectionTrace:
    """hits: float32 [steps, L, H], by step of one answer, layer and KV head: the share of the chosen rows
    that was in the row cache. about: model, question, and how many tokens were chosen of how many."""

    hits: NDArray[np.float32]
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        np.savez_compressed(path, hits=self.hits.astype(np.float16), about=json.dumps(self.about))

    @classmethod
    def load(cls, path: Path = TRACE_FILE) -> Self:
        with np.load(path) as file:
            return cls(file["hits"].astype(np.float32), json.loads(str(file["about"])))

    def for_model(self, layers: int, heads: int) -> Tensor:
        """float32 [steps, layers, heads]: each layer gets the recorded one at the same depth."""
        _, own_layers, own_heads = self.hits.shape
        layer = np.arange(layers) * own_layers // layers
        return torch.from_numpy(self.hits[:, layer][:, :, np.arange(heads) % own_heads])


def record(settings: Settings, prompt: Sequence[int], new_tokens: int, count: int) -> SelectionTrace:
    """Answer a question in selective mode, and write down what the row cache held.

    count: tokens chosen per step, layer and head. Raises RuntimeError if the request fails.
    """
    steps: list[list[list[float]]] = []
    fetch = RowCache.fetch

    def watched(cache: RowCache, layer: int, chosen: Tensor, now: int) -> tuple[Tensor, int]:
        there = cache._slot_of[layer].gather(1, chosen) >= 0
        if layer == 0:
            steps.append([])
        steps[-1].append(there.float().mean(dim=1).tolist())
        return fetch(cache, layer, chosen, now)

    engine = build_engine(settings, Metrics())
    exact = len(prompt) - indexed_tokens(len(prompt))
    budget = (count + exact) / len(prompt)
    sampling = SamplingParams(max_new_tokens=new_tokens)
    try:
        with patch.object(RowCache, "fetch", watched):
            request = GenerateRequest("record", tuple(prompt), sampling, mode="selective", budget=budget)
            (event,) = engine.generate([request])
    finally:
        engine.close()
    about = {
        "model_fingerprint": engine.info.model_fingerprint,
        "prompt_tokens": len(prompt),
        "chosen_tokens": count,
        "row_cache_steps": ROW_CACHE_STEPS,
        "answer": event.text,
    }
    return SelectionTrace(np.array(steps, dtype=np.float32), about)


class Rows:
    """Makes an engine choose rows of which a given share is in the row cache. `use` says which share."""

    def __init__(self, spec: KVSpec, device: torch.device) -> None:
        # [L, H, steps]: rows missed so far, as a multiple of those of one step; below 0: the model's own
        # choice. Always at one address, because recorded steps read it there.
        self._missed = torch.full((spec.num_layers, spec.num_kv_heads, _STEPS), -1.0, device=device)

    def use(self, kind: RowsKind) -> None:
        """From the next request on. Answers longer than the trace's repeat it, less its first step."""
        self._missed.copy_(self._misses(kind))
        if self._missed.is_cuda:
            torch.cuda.synchronize(self._missed.device)  # engines read it on streams of their own

    def _misses(self, kind: RowsKind) -> Tensor:
        """float32, broadcasts to what is read."""
        if kind == "own":
            return torch.tensor(-1.0)
        layers, heads, _ = self._missed.shape
        hits = (
            SelectionTrace.load().for_model(layers, heads)
            if kind == "trace"
            else torch.zeros(1, layers, heads)
        )
        step = torch.arange(_STEPS)
        again = 1 + (step - 1) % max(1, len(hits) - 1)
        order = torch.where(step < len(hits), step, again.clamp(max=len(hits) - 1))
        return (1 - hits[order]).cumsum(0).permute(1, 2, 0)

    @contextmanager
    def imposed(self) -> Iterator[None]:
        """Within it, engines choose by this. Keep it around an engine's whole life."""
        fetch = RowCache.fetch

        def chosen_by_share(cache: RowCache, layer: int, chosen: Tensor, now: int) -> tuple[Tensor, int]:
            return fetch(cache, layer, self._impose(chosen, cache._slot_of.shape[2], layer, now), now)

        with patch.object(RowCache, "fetch", chosen_by_share):
            if self._missed.is_cuda and find_spec("triton"):
                from aquifer.benchmarks.selection_cuda import imposed_on_lanes

                with imposed_on_lanes(self._missed):
                    yield
            else:
                yield

    def _impose(self, chosen: Tensor, tokens: int, layer: int, now: int) -> Tensor:
        """Tokens are cut into as many bins as are chosen, and each bin gives one. With every row that misses,
        one bin goes on to its next token, so that what a bin gave last is in the row cache still, and what it
        gives next was there at least `tokens / chosen` steps ago, if ever."""
        sets, count = chosen.shape
        missed = self._missed[layer, :sets, now % _STEPS, None]
        bins = torch.arange(count, device=chosen.device)
        width = tokens // count
        offset = (missed + (bins * _GOLDEN) % 1).floor().long() % width
        return torch.where(missed < 0, chosen, (bins * width + offset).expand(sets, -1))


def check_imposable(prompt_tokens: int, count: int) -> None:
    """Raise ValueError where so many of a prompt's tokens are chosen that a bin would come back to what the
    row cache still holds."""
    tokens = indexed_tokens(prompt_tokens)
    if tokens // count <= ROW_CACHE_STEPS:
        raise ValueError(
            f"{count:,} of {tokens:,} tokens are too many to impose which rows are found; "
            f"less than one in {ROW_CACHE_STEPS + 1} must be chosen"
        )
