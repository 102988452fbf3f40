"""Runs a model over sample texts and fits on the KV it makes: AQUA-KV's predictors, and the key means of
selective decoding.

Reads a few hundred thousand tokens once. With `offload` the KV rests on disk and the chain states in
CPU memory, so that the model's weights and one layer's activations are all the device has to hold.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aquifer.compression.calibration import Corpus, calibrate
from aquifer.compression.landmarks import KeyMeans
from aquifer.compression.predictors import LayerFit, Predictors
from aquifer.compression.sources import HeldSource, SpilledSource
from aquifer.compression.spec import SEGMENT_TOKENS, SINK_TOKENS
from aquifer.kernels.rope import apply_rope
from aquifer.server.engine.build import LoadedModel, load_model
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.runner import ModelRunner, PagedCache
from aquifer.server.settings import Settings

HELDOUT_EVERY = 10
"""One sequence in ten judges the fit and is not fitted on."""


@dataclass(frozen=True)
class CalibrationPlan:
    """bits: of the residuals in the loop that is fitted. tokens: how many to read, all sequences
    together. sequence_tokens: where a long text is cut. description: of the data, for the card."""

    description: str
    bits: int = 2
    tokens: int = 262_144
    sequence_tokens: int = 8192
    seed: int = 0
    offload: bool = False


def calibrate_model(
    settings: Settings,
    texts: Iterable[str],
    plan: CalibrationPlan,
    out: Path,
    *,
    on_tokens: Callable[[int], None],
    on_layer: Callable[[LayerFit], None],
) -> Predictors:
    """Fit predictors and key means for settings.model and write them to the folder `out`.

    on_tokens: called with the number of tokens each sequence added; on_layer: with each layer's figures.
    Raises ValueError if the texts give fewer than HELDOUT_EVERY sequences.
    """
    loaded = load_model(settings)
    device = loaded.adapter.device
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if plan.offload else None
        means = _RotatedMeans(loaded)
        corpus = _read(loaded, texts, plan, folder, means, on_tokens)
        predictors = calibrate(
            corpus,
            loaded.adapter.spec,
            bits=plan.bits,
            model_fingerprint=loaded.fingerprint,
            device=device,
            codec_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            offload=plan.offload,
            progress=on_layer,
        )
    predictors.save(out)
    means.result().save(out)
    return predictors


def _read(
    loaded: LoadedModel,
    texts: Iterable[str],
    plan: CalibrationPlan,
    folder: Path | None,
    means: _RotatedMeans,
    on_tokens: Callable[[int], None],
) -> Corpus:
    """Keep the KV of the texts: on disk in `folder`, or in memory. Adds the keys to `means`."""
    held: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
    spilled = folder and (SpilledSource(folder / "train"), SpilledSource(folder / "heldout"))
    tokens = 0
    for number, (keys, values) in enumerate(_sequences(loaded, texts, plan)):
        which = int(number % HELDOUT_EVERY == HELDOUT_EVERY - 1)
        if spilled:
            spilled[which].append(keys, values)
        else:
            held[which].append((keys.cpu(), values.cpu()))
        means.add(keys)
        tokens += keys.shape[1]
        on_tokens(keys.shape[1])
        if tokens >= plan.tokens and number >= HELDOUT_EVERY:
            break
    train, heldout = spilled or (HeldSource(held[0]), HeldSource(held[1]))
    return Corpus(train, heldout, plan.description, plan.seed)


def _sequences(
    loaded: LoadedModel, texts: Iterable[str], plan: CalibrationPlan
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys before RoPE and values [L, T, C] of each text, without its sinks."""
    adapter, tokenizer = loaded.adapter, loaded.tokenizer
    num_pages = -(-plan.sequence_tokens // SEGMENT_TOKENS)
    page_bytes = adapter.spec.bytes_per_token * SEGMENT_TOKENS
    pool = PagePool(adapter.spec, num_pages * page_bytes, adapter.device, keep=False)
    runner = ModelRunner(adapter, pool)
    cache = PagedCache(pool, BlockTable(range(num_pages)))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for text in texts:
        ids = (bos + tokenizer.encode(text, add_special_tokens=False))[: plan.sequence_tokens]
        if len(ids) <= SINK_TOKENS:
            continue
        _, kv = runner.prefill(ids, 0, cache)
        yield kv.keys[:, SINK_TOKENS:], kv.values[:, SINK_TOKENS:]


class _RotatedMeans:
    """Running means of the keys after RoPE."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._spec = spec = loaded.adapter.spec
        self._sums = torch.zeros(spec.num_layers, spec.channels, dtype=torch.float64)
        self._tokens = 0

    def add(self, keys: Tensor) -> None:
        """keys: [L, T, C] before RoPE, of the tokens after the sinks."""
        tokens = keys.shape[1]
        positions = torch.arange(SINK_TOKENS, SINK_TOKENS + tokens, device=keys.device)
        cos, sin = self._loaded.adapter.rope_table(positions)
        heads = (tokens, self._spec.num_kv_heads, self._spec.head_dim)
        for layer, rows in enumerate(keys):
            rotated = apply_rope(rows.view(heads), cos, sin)
            self._sums[layer] += rotated.sum(dim=0, dtype=torch.float32).flatten().cpu()
        self._tokens += tokens

    def result(self) -> KeyMeans:
        return KeyMeans((self._sums / self._tokens).float(), self._loaded.fingerprint)
