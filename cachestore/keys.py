"""Names of segments: who made the bytes, for whom, and for which tokens.

A key is a namespace (model, codec, tenant) and a digest of every token up to the segment's end.
Both are cryptographic: a short or process-seeded hash would sooner or later hand one prompt the
cache of another.
"""

from __future__ import annotations

import struct
import sys
import threading
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Self

from blake3 import blake3

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAMESPACE_BYTES = 16
DIGEST_BYTES = 32


class SegmentKey(bytes):
    """Name of one stored record: 16 bytes of namespace, from `make_namespace`, and 32 of digest, blake3 over
    the whole token prefix.

    It is those bytes, because a question about 131,072 tokens has 512 names, each looked up in ten
    dictionaries: bytes are compared without Python, and hashed once.
    """

    parent: bytes | None
    """Digest of the record before this one, None for the first. No part of the name, whose digest covers it;
    it tells a tier which records form one prefix, so that eviction can take the end of a prefix before its
    beginning."""

    def __new__(cls, namespace: bytes, digest: bytes, parent: bytes | None = None) -> Self:
        key = super().__new__(cls, namespace + digest)
        if len(key) != NAMESPACE_BYTES + DIGEST_BYTES:
            raise ValueError(f"a key has {NAMESPACE_BYTES} and {DIGEST_BYTES} bytes, not {len(key)} in all")
        key.parent = parent
        return key

    def __getnewargs__(self) -> tuple[bytes, bytes, bytes | None]:  # type: ignore[override]  # bytes take one
        """What makes a copy."""
        return self.namespace, self.digest, self.parent

    @property
    def namespace(self) -> bytes:
        return self[:NAMESPACE_BYTES]

    @property
    def digest(self) -> bytes:
        return self[NAMESPACE_BYTES:]

    @property
    def redis_name(self) -> bytes:
        return b"aquifer:s:%s:%s" % (self.namespace.hex().encode(), self.digest.hex().encode())


@dataclass(frozen=True, slots=True)
class PromptKeys:
    """Keys of one prompt: its sink record, then one key for each full segment, in order."""

    sinks: SegmentKey | None
    segments: tuple[SegmentKey, ...]

    @property
    def records(self) -> tuple[SegmentKey, ...]:
        """Every key, in the order of the prompt."""
        return self.segments if self.sinks is None else (self.sinks, *self.segments)


def make_namespace(model_fingerprint: str, codec_fingerprint: str, tenant_salt: str) -> bytes:
    """Return 16 bytes that differ whenever any of the three fields differs.

    Fields are length-prefixed, so that ("ab", "c") and ("a", "bc") stay apart.
    """
    hasher = blake3(b"aquifer namespace")
    for text in (model_fingerprint, codec_fingerprint, tenant_salt):
        field_bytes = text.encode()
        hasher.update(len(field_bytes).to_bytes(8, "little"))
        hasher.update(field_bytes)
    return hasher.digest(length=NAMESPACE_BYTES)


def chain_keys(
    namespace: bytes,
    token_ids: Sequence[int] | Buffer,
    *,
    segment_tokens: int = 256,
    sink_tokens: int = 4,
    begun: Sequence[SegmentKey] = (),
) -> PromptKeys:
    """Name the sinks and every full segment of a prompt.

    token_ids: integers, or a buffer of integers (array, numpy array), or raw little-endian int32
    as bytes. A prompt shorter than `sink_tokens` has no sinks; a tail shorter than
    `segment_tokens` has no key. begun: keys of the first segments, if they are known.
    Raises ValueError for a namespace that is not 16 bytes, and as `pack_ids` does.
    """
    if len(namespace) != NAMESPACE_BYTES:
        raise ValueError(f"a namespace has {NAMESPACE_BYTES} bytes, got {len(namespace)}")
    ids = pack_ids(token_ids)
    sinks = None
    if len(ids) >= 4 * sink_tokens > 0:
        # A domain tag each: the sink record of 4 tokens is not a segment of 4 tokens.
        sinks = SegmentKey(namespace, blake3(b"aquifer sinks" + namespace + ids[: 4 * sink_tokens]).digest())

    parent = sinks.digest if sinks else None
    digest = blake3(b"aquifer segments" + namespace).digest()
    segments = list(begun)
    if segments:
        parent = digest = segments[-1].digest
    step = 4 * segment_tokens
    for start in range(step * len(segments), len(ids) - step + 1, step):
        digest = blake3(digest + ids[start : start + step]).digest()
        segments.append(SegmentKey(namespace, digest, parent))
        parent = digest
    return PromptKeys(sinks, tuple(segments))


class PromptNamer:
    """`chain_keys` for one prompt after the other. Thread-safe.

    Remembers the last ones: questions about a document begin alike, and comparing their tokens takes a
    twentieth of the time of hashing them.
    """

    def __init__(self, *, segment_tokens: int = 256, most: int = 16) -> None:
        """most: prompts to remember, 4 bytes per token and a key per segment."""
        self._segment_tokens = segment_tokens
        self._last: deque[_Named] = deque(maxlen=most)
        self._lock = threading.Lock()

    def keys(self, namespace: bytes, ids: bytes) -> PromptKeys:
        """ids: as of `pack_ids`. Raises as `chain_keys` does."""
        with self._lock:
            known = [named for named in self._last if named.namespace == namespace]
        counted = [(named.shared(ids), named) for named in known]
        shared, alike = max(counted, key=itemgetter(0), default=(0, _Named(namespace, b"", ())))
        keys = chain_keys(namespace, ids, segment_tokens=self._segment_tokens, begun=alike.segments[:shared])
        if not keys.segments:
            return keys
        named = alike
        if shared < len(keys.segments):
            whole = ids[: 4 * self._segment_tokens * len(keys.segments)]
            named = _Named(namespace, whole, keys.segments)
        with self._lock:
            if alike in self._last and (named is alike or shared == len(alike.segments)):
                self._last.remove(alike)  # it is the newest now, or the newest says all that it says
            self._last.append(named)
        return keys


@dataclass(frozen=True, slots=True, eq=False)
class _Named:
    """The full segments of a prompt: their tokens, as they are hashed, and their keys."""

    namespace: bytes
    ids: bytes
    segments: tuple[SegmentKey, ...]

    def shared(self, ids: bytes) -> int:
        """How many of them a prompt begins with."""
        count = len(self.segments)
        if ids.startswith(self.ids):
            return count

        def differs(segments: int) -> bool:
            return not ids.startswith(self.ids[: len(self.ids) // count * segments])

        most = 1  # doubled while that many are shared, because most prompts share few or all
        while most < count and not differs(most):
            most *= 2
        least = most // 2
        return least + bisect_left(range(least + 1, min(most, count)), True, key=differs)


def pack_ids(token_ids: Sequence[int] | Buffer) -> bytes:
    """Token ids as little-endian int32, the form that is hashed; bytes are in it already.

    Raises ValueError for a buffer that holds no integers, and for an id that is none of 32 bits.
    """
    if isinstance(token_ids, bytes | bytearray):
        if len(token_ids) % 4:
            raise ValueError(f"{len(token_ids)} bytes are no whole number of int32 token ids")
        return bytes(token_ids)
    ids: Sequence[int]
    if isinstance(token_ids, Sequence) and not isinstance(token_ids, array | memoryview):
        ids = token_ids
    else:
        view = memoryview(token_ids)
        if view.format == "i" and view.itemsize == 4 and sys.byteorder == "little":
            return view.tobytes()  # as they lie
        if view.format not in {"b", "B", "h", "H", "i", "I", "l", "L", "q", "Q"}:
            raise ValueError(f"token ids must be integers, got a buffer of format {view.format!r}")
        ids = view.tolist()
    try:
        return struct.pack(f"<{len(ids)}i", *ids)  # three times as fast as an array
    except struct.error as error:
        place = next(place for place, one in enumerate(ids) if not _is_int32(one))
        raise ValueError(f"token id {ids[place]!r} at place {place:,} is no integer of 32 bits") from error


def _is_int32(number: object) -> bool:
    try:
        struct.pack("<i", number)
    except struct.error:
        return False
    return True
