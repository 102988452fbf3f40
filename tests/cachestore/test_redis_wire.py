from __future__ import annotations

import itertools
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquifer.cachestore.redis_wire import Bulk, RefusedError, ReplyReader, pack


def reader_of(sent: bytes, *, pieces: list[int] | None = None) -> ReplyReader:
    """Read from a real socket that somebody writes `sent` to, cut at the given positions, and closes."""
    ours, theirs = socket.socketpair()
    cuts = sorted({min(cut, len(sent)) for cut in pieces or []} | {0, len(sent)})

    def send() -> None:
        with theirs:
            for start, end in itertools.pairwise(cuts):
                theirs.sendall(sent[start:end])

    threading.Thread(target=send, daemon=True).start()
    ours.settimeout(10)
    return ReplyReader(ours)


def encode(reply: object) -> bytes:
    if isinstance(reply, list):
        return b"*%d\r\n" % len(reply) + b"".join(map(encode, reply))
    if isinstance(reply, bytes):
        return b"$%d\r\n%s\r\n" % (len(reply), reply)
    return b"$-1\r\n" if reply is None else b":%d\r\n" % reply


simple = st.none() | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=200)
replies = st.lists(simple | st.lists(simple, max_size=3), min_size=1, max_size=8)


@given(replies, st.lists(st.integers(0, 1000), max_size=5))
def test_every_reply_comes_back_however_it_is_cut(expected: list[object], pieces: list[int]) -> None:
    reader = reader_of(b"".join(map(encode, expected)), pieces=pieces)
    assert [reader.reply() for _ in expected] == expected


@pytest.mark.parametrize("size", [0, 1, 4085, 4086, 4087, 4096, 4097, 1_000_000])
def test_a_large_value_lands_in_the_memory_given_and_what_follows_is_intact(size: int) -> None:
    value = bytes(range(256)) * (size // 256 + 1)
    reader = reader_of(encode(value[:size]) + encode(7) + encode(b"next"))
    assert reader.head() == Bulk(size)
    target = bytearray(size)
    reader.read_into(memoryview(target))
    reader.end()
    assert target == value[:size]
    assert [reader.reply(), reader.reply()] == [7, b"next"]


def test_an_unwanted_value_can_be_skipped() -> None:
    reader = reader_of(encode(bytes(100_000)) + encode(7))
    assert reader.head() == Bulk(100_000)
    reader.skip(100_000)
    reader.end()
    assert reader.reply() == 7


def test_a_refusal_is_a_reply_with_a_code() -> None:
    reader = reader_of(b"-OOM command not allowed\r\n+OK\r\n")
    refused = reader.reply()
    assert isinstance(refused, RefusedError)
    assert (refused.code, str(refused)) == ("OOM", "OOM command not allowed")
    assert reader.reply() == b"OK"


@pytest.mark.parametrize(
    "sent",
    [b"", b"$10\r\nabc", b":1", b"HTTP/1.1 400 Bad Request\r\n", b"+" + b"x" * 5000, b"$abc\r\n", b"*x\r\n"],
    ids=["nothing", "value cut", "line cut", "not Redis", "endless line", "bad length", "bad count"],
)
def test_a_broken_stream_is_a_connection_error(sent: bytes) -> None:
    with pytest.raises(ConnectionError):
        reader_of(sent).reply()


def test_commands_are_packed_in_order_and_large_values_are_not_copied() -> None:
    large = memoryview(bytes(5000))
    buffers = pack([("SET", b"key", (b"header", large), "PX", 1000), ("GET", "näme")])
    assert b"".join(buffers) == (
        b"*5\r\n$3\r\nSET\r\n$3\r\nkey\r\n$5006\r\nheader" + large + b"\r\n$2\r\nPX\r\n$4\r\n1000\r\n"
        b"*2\r\n$3\r\nGET\r\n$5\r\nn\xc3\xa4me\r\n"
    )
    assert any(buffer is large for buffer in buffers)


@given(st.lists(st.lists(st.binary(max_size=6000), min_size=1, max_size=3), min_size=1, max_size=3))
def test_packed_commands_read_back_as_what_they_were(commands: list[list[bytes]]) -> None:
    sent = b"".join(pack([tuple(command) for command in commands]))
    reader = reader_of(sent)
    assert [reader.reply() for _ in commands] == commands
