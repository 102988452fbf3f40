"""What an engine is made of. build.py makes the parts; the engine and its loop use them."""

from __future__ import annotations

from dataclasses import dataclass

from aquifer.cachestore.store import TieredStore
from aquifer.compression.codec import Codec
from aquifer.compression.raw import RawCodec
from aquifer.server.engine.gate import LoadGate
from aquifer.server.engine.index import IndexPool
from aquifer.server.engine.pages import PagePool
from aquifer.server.metrics import Metrics
from aquifer.server.models.adapter import DecoderAdapter


@dataclass(frozen=True)
class EngineLimits:
    """max_running: requests admitted at once. max_waiting: beyond it, new ones are refused.
    chunk_tokens: prompt tokens computed in one turn of the loop.
    refuse_when_full: whether a request for which there is no room right now is refused instead of waiting.
    streamed_bytes: device bytes that one request may fill with segments of a document that is not resident;
        None: half of what is free when it starts.
    staging_bytes: device bytes that the passes of one step may take besides pages: documents that are not
        resident are reconstructed layer by layer, so many of them at a time as fit. None: any number.
    selective_budget: share of the prompt that selective attention reads, where a request names none.
    shared_selection: whether all KV heads of a layer attend to one set of selected tokens.
    """

    max_running: int
    max_waiting: int
    chunk_tokens: int
    refuse_when_full: bool = False
    streamed_bytes: int | None = None
    staging_bytes: int | None = None
    selective_budget: float = 0.05
    shared_selection: bool = False


@dataclass(frozen=True)
class EngineParts:
    """raw: the codec of sink records."""

    adapter: DecoderAdapter
    codec: Codec
    raw: RawCodec
    store: TieredStore
    pool: PagePool
    index: IndexPool
    gate: LoadGate
    metrics: Metrics
    limits: EngineLimits
    eos_token_ids: frozenset[int]
