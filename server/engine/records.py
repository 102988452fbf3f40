"""Which tokens a record holds, and what a prompt weighs in the tiers.

A prompt's full segments are stored, each as one record. The first four tokens are a record of their
own, uncompressed: attention leans on these sinks, and they are shared by every prompt that begins
alike. So segment 0 holds tokens 4 to 255.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from aquifer.compression.codec import Codec
from aquifer.compression.spec import SEGMENT_TOKENS, SINK_TOKENS
from aquifer.compression.wire import record_bytes
from aquifer.server.engine.types import KVUsage


def segment_span(index: int) -> tuple[int, int]:
    """First token and number of tokens of the record of segment `index`."""
    if index == 0:
        return SINK_TOKENS, SEGMENT_TOKENS - SINK_TOKENS
    return index * SEGMENT_TOKENS, SEGMENT_TOKENS


def joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans (first token, number of tokens) as runs (first, last + 1), neighbours in one."""
    runs: list[tuple[int, int]] = []
    for start, count in spans:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + count)
        else:
            runs.append((start, start + count))
    return runs


def numbers_of(runs: Sequence[tuple[int, int]]) -> Tensor:
    """All tokens, or slots, of some runs (first, last + 1), one after the other: int64 [T] on the host."""
    return torch.cat([torch.arange(first, last) for first, last in runs])


# Records are leased read-only, and torch warns, once, that it cannot promise not to write them. Nothing here
# does, so it is let off here, where nobody sees it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(memoryview(b"read only"), dtype=torch.uint8)


def as_tensor(body: memoryview) -> Tensor:
    """The same bytes, uint8; to be read only."""
    return torch.frombuffer(body, dtype=torch.uint8)


def slot_bytes(codec: Codec, raw: Codec) -> int:
    """Size of the largest record: one slot of the RAM arena."""
    bodies = codec.segment_bytes(SEGMENT_TOKENS), raw.segment_bytes(SINK_TOKENS)
    return record_bytes(max(bodies))


def prompt_usage(codec: Codec, raw: Codec, num_tokens: int, mode: str) -> KVUsage:
    """What the full segments of a prompt of num_tokens tokens take: codes, scales, headers and sinks."""
    segments = num_tokens // SEGMENT_TOKENS
    if segments == 0:
        return KVUsage(mode, codec.name, 0, 0, None)
    spec = codec.spec
    values = segments * SEGMENT_TOKENS * 2 * spec.num_layers * spec.channels
    sinks, first, other = (
        record_bytes(own.segment_bytes(count))
        for own, count in ((raw, SINK_TOKENS), (codec, segment_span(0)[1]), (codec, SEGMENT_TOKENS))
    )
    stored = sinks + first + (segments - 1) * other
    return KVUsage(mode, codec.name, values * spec.dtype.itemsize, stored, 8 * stored / values)
