import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquifer.compression import wire
from aquifer.compression.wire import (
    HEADER_BYTES,
    DamagedRecordError,
    ForeignRecordError,
    RecordHeader,
    RecordOpener,
    UnknownFormatError,
    WireError,
    record_bytes,
    sealed,
    verify,
)

CHAIN = bytes(range(32))
HEADER = RecordHeader(kind="segment", codec="0f" * 16, chain=CHAIN, start=256, num_tokens=256)
BODY = bytes(i * 37 % 251 for i in range(300))
RECORD = sealed(HEADER, BODY)


def open_as(header: RecordHeader, record: bytes = RECORD) -> memoryview:
    kind, codec, chain, start, num_tokens = header
    return RecordOpener(kind, codec, start, num_tokens, len(BODY)).open(record, chain)


def test_a_sealed_body_comes_back() -> None:
    verify(RECORD, CHAIN)
    assert bytes(open_as(HEADER)) == BODY


def test_a_sound_record_under_another_key_is_refused() -> None:
    with pytest.raises(ForeignRecordError):
        verify(RECORD, CHAIN[::-1])


def test_the_size_is_known_beforehand_and_the_body_is_aligned() -> None:
    assert len(RECORD) == record_bytes(len(BODY))
    assert HEADER_BYTES % 64 == 0 and RECORD[HEADER_BYTES : HEADER_BYTES + len(BODY)] == BODY


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_every_changed_byte_is_detected(data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(RECORD) - 1))
    change = data.draw(st.integers(1, 255))
    damaged = bytearray(RECORD)
    damaged[position] ^= change
    with pytest.raises(WireError):
        verify(damaged, CHAIN)


@given(st.integers(0, len(RECORD) - 1), st.integers(1, 40))
@settings(max_examples=400, deadline=None)
def test_every_missing_byte_is_detected(position: int, length: int) -> None:
    with pytest.raises(WireError):
        verify(RECORD[:position] + RECORD[position + length :], CHAIN)


@pytest.mark.parametrize("record", [b"", RECORD[:8], RECORD[:-1], RECORD + b"\0"])
def test_a_record_of_another_length_does_not_open(record: bytes) -> None:
    with pytest.raises(DamagedRecordError):
        open_as(HEADER, record)


@pytest.mark.parametrize(
    "asked",
    [
        HEADER._replace(kind="sinks"),
        HEADER._replace(codec="1f" * 16),
        HEADER._replace(chain=CHAIN[::-1]),
        HEADER._replace(start=512),
        HEADER._replace(num_tokens=252),
    ],
)
def test_a_foreign_record_does_not_open(asked: RecordHeader) -> None:
    with pytest.raises(ForeignRecordError):
        open_as(asked)


def test_another_version_or_magic_does_not_open() -> None:
    newer = RECORD[:4] + (wire.VERSION + 1).to_bytes(2, "little") + RECORD[6:]
    for record in (newer, b"JUNK" + RECORD[4:]):
        with pytest.raises(UnknownFormatError):
            open_as(HEADER, record)


def test_a_header_that_is_packed_in_another_order_opens() -> None:
    length = int.from_bytes(RECORD[6:8], "little")
    packed = msgpack.packb(dict(reversed(msgpack.unpackb(RECORD[8 : 8 + length]).items())))
    other = RECORD[:8] + packed + RECORD[8 + length :]
    assert other != RECORD and bytes(open_as(HEADER, other)) == BODY


def test_an_unknown_header_field_does_not_open() -> None:
    length = int.from_bytes(RECORD[6:8], "little")
    header = msgpack.unpackb(RECORD[8 : 8 + length]) | {"dictionary": 3}
    packed = msgpack.packb(header)
    head = RECORD[:6] + len(packed).to_bytes(2, "little") + packed
    with pytest.raises(UnknownFormatError, match="dictionary"):
        open_as(HEADER, head.ljust(HEADER_BYTES, b"\0") + RECORD[HEADER_BYTES:])


def test_a_header_that_does_not_fit_is_refused_at_writing() -> None:
    with pytest.raises(ValueError, match="fingerprint"):
        sealed(HEADER._replace(codec="f" * 300), BODY)
    with pytest.raises(ValueError, match="32 bytes"):
        sealed(HEADER._replace(chain=b"short"), BODY)
