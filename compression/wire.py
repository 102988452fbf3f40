"""The record: how one segment, or the sink tokens, travels and rests in RAM and Redis.

    offset 0      magic "AQKV" | version u16 | header length u16        (little-endian)
    offset 8      msgpack header, then zeros up to HEADER_BYTES
    offset 256    body                                                  (64-byte aligned)
    end - 16      xxh3-128 over everything before it

The header area has a fixed size, so a codec's records have one size per token count and fit fixed slots.
`verify` is the full check, made once when a record comes in from outside; `RecordOpener` makes the cheap one,
at every use. Whatever either refuses is a miss to the caller, never a guess.

    WireError(ValueError)
    ├── DamagedRecordError   truncated, checksum differs, header does not parse
    ├── UnknownFormatError   another magic or version, or a header field this version does not know
    └── ForeignRecordError   sound, but of another kind, codec, chain or length than asked for
"""

import struct
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import msgpack
import xxhash

RecordKind = Literal["segment", "sinks"]
Buffer = bytes | bytearray | memoryview

MAGIC = b"AQKV"
VERSION = 1
HEADER_BYTES = 256
CHECKSUM_BYTES = 16
CHAIN_BYTES = 32

_PREFIX = struct.Struct("<4sHH")
_NO_CHAIN = b"\xc1" * CHAIN_BYTES
"""Stands where a chain will. The byte is neither a type of msgpack nor part of a text in UTF-8."""


class WireError(ValueError):
    """A record that must not be used."""


class DamagedRecordError(WireError):
    """Bytes are missing or changed."""


class UnknownFormatError(WireError):
    """Written by a program that speaks another format."""


class ForeignRecordError(WireError):
    """A sound record, but not the one asked for."""


class RecordHeader(NamedTuple):
    """What a record says about itself."""

    kind: RecordKind
    codec: str
    """Fingerprint of the codec that wrote the body."""
    chain: bytes
    """The 32-byte key digest the record is stored under."""
    start: int
    """Position of the first token in its sequence."""
    num_tokens: int


_FIELDS = {*RecordHeader._fields, "body_bytes"}


def record_bytes(body_bytes: int) -> int:
    """Exact size of a record with a body of `body_bytes`."""
    return HEADER_BYTES + body_bytes + CHECKSUM_BYTES


def seal(record: memoryview, header: RecordHeader) -> None:
    """Make a record of memory in which the body stands in its place (`body_of`): write header and checksum.

    record: [record_bytes(body)] bytes. Raises ValueError if the header does not fit its area.
    """
    if len(header.chain) != CHAIN_BYTES:
        raise ValueError(f"a chain digest has {CHAIN_BYTES} bytes, not {len(header.chain)}")
    record[:HEADER_BYTES] = _header_area(header, body_of(record).nbytes)
    record[-CHECKSUM_BYTES:] = xxhash.xxh3_128_digest(record[:-CHECKSUM_BYTES])


def sealed(header: RecordHeader, body: Buffer) -> bytes:
    """A record around a copy of `body`. Raises as `seal` does."""
    view = memoryview(body).cast("B")
    record = memoryview(bytearray(record_bytes(view.nbytes)))
    body_of(record)[:] = view
    seal(record, header)
    return bytes(record)


def verify(record: Buffer, chain: bytes) -> None:
    """Check every byte of a record, and that it is the one of this key digest. Raises WireError."""
    view = memoryview(record).cast("B")
    header = _parse(view)
    if xxhash.xxh3_128_digest(view[:-CHECKSUM_BYTES]) != view[-CHECKSUM_BYTES:]:
        raise DamagedRecordError(f"checksum of a {view.nbytes}-byte record differs")
    if header["chain"] != chain:
        raise ForeignRecordError(f"asked for a record with chain {chain!r}, found {header['chain']!r}")


class RecordOpener:
    """Opens records that were verified when they came in, without computing a checksum. All that may differ
    between its records is the chain."""

    def __init__(self, kind: RecordKind, codec: str, start: int, num_tokens: int, body_bytes: int) -> None:
        """The fields of a record's header, and the size of its body. Raises ValueError if they do not fit."""
        self._asked = RecordHeader(kind, codec, _NO_CHAIN, start, num_tokens)._asdict()
        self._asked["body_bytes"] = body_bytes
        self._size = record_bytes(body_bytes)
        self._before, self._behind = _around_chain(kind, codec, start, num_tokens, body_bytes)

    def open(self, record: Buffer, chain: bytes) -> memoryview:
        """The body. Raises WireError unless the record has this version and says just what is asked for."""
        view = memoryview(record)
        same = bytes(view[:HEADER_BYTES]) == self._before + chain + self._behind
        if same and view.nbytes == self._size:
            return body_of(view)
        header = _parse(view)  # says what is wrong, or packs the same in another way
        for name, value in {**self._asked, "chain": chain}.items():
            if header[name] != value:
                raise ForeignRecordError(f"asked for a record with {name} {value!r}, found {header[name]!r}")
        return body_of(view)


def _header_area(header: RecordHeader, body_bytes: int) -> bytes:
    """The first HEADER_BYTES of a record. Raises ValueError if the header does not fit."""
    kind, codec, chain, start, num_tokens = header
    before, behind = _around_chain(kind, codec, start, num_tokens, body_bytes)
    return before + chain + behind


@lru_cache(maxsize=4096)
def _around_chain(
    kind: RecordKind, codec: str, start: int, num_tokens: int, body_bytes: int
) -> tuple[bytes, bytes]:
    """What stands before and behind the chain, which is all that differs between prompts."""
    header = RecordHeader(kind, codec, _NO_CHAIN, start, num_tokens)
    packed = msgpack.packb(header._asdict() | {"body_bytes": body_bytes})
    if _PREFIX.size + len(packed) > HEADER_BYTES:
        raise ValueError(
            f"a record header takes at most {HEADER_BYTES - _PREFIX.size} bytes, this one {len(packed)}: "
            "shorten the codec fingerprint"
        )
    area = (_PREFIX.pack(MAGIC, VERSION, len(packed)) + packed).ljust(HEADER_BYTES, b"\0")
    before, _, behind = area.partition(_NO_CHAIN)
    return before, behind


def body_of(record: memoryview) -> memoryview:
    """The body of a record that is known to be the right one."""
    return record[HEADER_BYTES:-CHECKSUM_BYTES]


def _parse(view: memoryview) -> dict[str, Any]:
    if view.nbytes < record_bytes(0):
        raise DamagedRecordError(f"a record has at least {record_bytes(0)} bytes, this one {view.nbytes}")
    magic, version, length = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise UnknownFormatError(f"a record starts with {MAGIC!r}, this one with {magic!r}")
    if version != VERSION:
        raise UnknownFormatError(f"record version {version}; this program reads version {VERSION}")
    if length > HEADER_BYTES - _PREFIX.size:
        raise DamagedRecordError(f"a header of {length} bytes does not fit {HEADER_BYTES}")
    try:
        header = msgpack.unpackb(view[_PREFIX.size : _PREFIX.size + length])
    except (ValueError, msgpack.UnpackException) as error:
        raise DamagedRecordError("the header is not msgpack") from error
    if not isinstance(header, dict):
        raise DamagedRecordError("the header is not a map")
    if header.keys() != _FIELDS:
        odd = sorted(map(str, header.keys() ^ _FIELDS))
        raise UnknownFormatError(f"header fields unknown or missing: {', '.join(odd)}")
    body_bytes = header["body_bytes"]
    if not isinstance(body_bytes, int) or record_bytes(body_bytes) != view.nbytes:
        raise DamagedRecordError(f"a record of {view.nbytes} bytes says that its body has {body_bytes!r}")
    return header
