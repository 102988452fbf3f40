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

_FILLING = 64
"""Steps of the trace that are left out: the device has few rows yet, and four in five are found."""

_GOLDEN = 0.6180339887498949
"""Multiples of it, less their whole part, lie evenly between 0 and 1: the bins take turns."""


@dataclass(frozen=True)
class SelectionTrace:
    """hits: float32 [2, steps, L, H], by step of one answer, layer and KV head: the share of the chosen rows
    that was on the device, if as many are kept there as ROW_CACHE_STEPS steps choose, and if all are.
    about: model, question, and how many tokens were chosen of how many."""

    hits: NDArray[np.float32]
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        np.savez_compressed(path, hits=self.hits.astype(np.float16), about=json.dumps(self.about))

    @classmethod
    def load(cls, path: Path = TRACE_FILE) -> Self:
        with np.load(path) as file:
            return cls(file["hits"].astype(np.float32), json.loads(str(file["about"])))

    def for_model(self, layers: int, heads: int) -> Tensor:
        """float32 [2, steps, layers, heads]; each layer gets the recorded one at the same depth."""
        _, _, own_layers, own_heads = self.hits.shape
        layer = np.arange(layers) * own_layers // layers
        return torch.from_numpy(self.hits[:, :, layer][..., np.arange(heads) % own_heads])


def found(chosen: NDArray[np.int64], kept: int) -> NDArray[np.float32]:
    """Share of the chosen tokens that are among the `kept` ones chosen most recently before.

    chosen: [steps, count]. Returns [steps]."""
    shares = np.zeros(len(chosen), dtype=np.float32)
    last_chosen = np.full(chosen.max() + 1, -1)  # or dropped since
    for step, tokens in enumerate(chosen):
        shares[step] = (last_chosen[tokens] >= 0).mean()
        last_chosen[tokens] = step
        surplus = np.count_nonzero(last_chosen >= 0) - kept
        if surplus > 0:
            held = np.flatnonzero(last_chosen >= 0)
            last_chosen[held[np.argsort(last_chosen[held], kind="stable")[:surplus]]] = -1
    return shares


def record(settings: Settings, prompt: Sequence[int], new_tokens: int, count: int) -> SelectionTrace:
    """Answer a question in selective mode, and write down which of the chosen rows were on the device.

    count: tokens chosen per step, layer and head. Raises RuntimeError if the request fails.
    """
    steps: list[list[NDArray[np.int64]]] = []
    fetch = RowCache.fetch

    def watched(cache: RowCache, layer: int, chosen: Tensor, now: int) -> tuple[Tensor, int]:
        if layer == 0:
            steps.append([])
        steps[-1].append(chosen.numpy(force=True))
        return fetch(cache, layer, chosen, now)

    engine = build_engine(settings, Metrics())
    exact = len(prompt) - indexed_tokens(len(prompt))
    budget = (count + exact) / len(prompt)
    sampling = SamplingParams(max_new_tokens=new_tokens)
    try:
        with patch.object(RowCache, "fetch", watched):
            request = GenerateRequest("record", prompt, sampling, mode="selective", budget=budget)
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
    chosen = np.array(steps)  # [steps, L, H, count]
    hits = np.zeros((2, *chosen.shape[:3]), dtype=np.float32)
    for case, kept in enumerate((ROW_CACHE_STEPS * count, len(prompt))):
        for layer, head in np.ndindex(*chosen.shape[1:3]):
            hits[case, :, layer, head] = found(chosen[:, layer, head], kept)
    return SelectionTrace(hits, about)


class Rows:
    """Makes an engine choose rows of which a given share is in the row cache. `use` says which share."""

    def __init__(self, spec: KVSpec, device: torch.device) -> None:
        # [2, L, H, steps], see SelectionTrace: rows missed so far, as a multiple of those of one step; below
        # 0: the model's own choice. Always at one address, because recorded steps read it there.
        self._missed = torch.full((2, spec.num_layers, spec.num_kv_heads, _STEPS), -1.0, device=device)
        self.lets_rows_come = True
        """To the device before they are chosen."""

    def use(self, kind: RowsKind) -> None:
        """From the next request on. Answers longer than the trace's repeat it."""
        self.lets_rows_come = kind != "misses"
        self._missed.copy_(self._misses(kind))
        if self._missed.is_cuda:
            torch.cuda.synchronize(self._missed.device)  # engines read it on streams of their own

    def _misses(self, kind: RowsKind) -> Tensor:
        """float32, broadcasts to what is read."""
        if kind == "own":
            return torch.tensor(-1.0)
        _, layers, heads, _ = self._missed.shape
        hits = torch.zeros(2, 1, layers, heads)
        if kind == "trace":
            hits = SelectionTrace.load().for_model(layers, heads)[:, _FILLING:]
        return (1 - hits[:, torch.arange(_STEPS) % hits.shape[1]]).cumsum(1).permute(0, 2, 3, 1)

    @contextmanager
    def imposed(self) -> Iterator[None]:
        """Within it, engines choose by this. Keep it around an engine's whole life."""
        fetch = RowCache.fetch

        def chosen_by_share(cache: RowCache, layer: int, chosen: Tensor, now: int) -> tuple[Tensor, int]:
            tokens, kept = cache._cell_of.shape[2], cache._token_in.shape[2]
            return fetch(cache, layer, self._impose(chosen, tokens, layer, now, all_kept=kept >= tokens), now)

        with patch.object(RowCache, "fetch", chosen_by_share):
            if self._missed.is_cuda and find_spec("triton"):
                from aquifer.benchmarks.selection_cuda import imposed_on_lanes

                with imposed_on_lanes(self._missed, lambda: self.lets_rows_come):
                    yield
            else:
                yield

    def _impose(self, chosen: Tensor, tokens: int, layer: int, now: int, *, all_kept: bool) -> Tensor:
        """Tokens are cut into as many bins as are chosen, and each bin gives one. With every row that misses,
        one bin goes on to its next token, so that what a bin gave last is in the row cache still, and what it
        gives next was there at least `tokens / chosen` steps ago, if ever."""
        sets, count = chosen.shape
        missed = self._missed[int(all_kept), layer, :sets, now % _STEPS, None]
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
