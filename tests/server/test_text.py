"""Text is shown as soon as nothing can take it back, and never later or earlier."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquifer.server.engine.text import TextStream


def decode_bytes(ids: Sequence[int]) -> str:
    """A tokenizer of one byte per token: the worst case for characters and stop strings."""
    return bytes(ids).decode("utf-8", errors="replace")


def stream(text: str, *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(decode_bytes, stop)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text(text: str) -> None:
    pieces, result = stream(text)
    assert "".join(pieces) == result.text == text


@given(st.text(alphabet="abé", max_size=30), st.text(alphabet="abé", min_size=1, max_size=4))
def test_everything_before_the_first_stop_string_and_nothing_of_it(text: str, stop: str) -> None:
    pieces, result = stream(text, stop)
    expected = text.split(stop)[0]
    assert "".join(pieces) == result.text == expected
    assert result.stopped == (stop in text)


@given(st.text(alphabet="ab€😀", max_size=20))
def test_unfinished_characters_are_never_shown(text: str) -> None:
    pieces, _ = stream(text)
    assert all("\ufffd" not in piece for piece in pieces)


def test_text_is_held_back_only_while_it_could_be_a_stop_string() -> None:
    pieces, _ = stream("xENx", "END")
    assert pieces == ["x", "", "", "ENx", ""]


def test_the_earliest_of_several_stop_strings_counts() -> None:
    assert stream("one two three", "three", "two")[1].text == "one "


@pytest.mark.parametrize("broken", [b"ab\xff", b"\xf0\x9f", b"\xff" * 40 + b"ok"])
def test_bytes_that_are_no_text_come_out_at_the_end_at_the_latest(broken: bytes) -> None:
    result = TextStream(decode_bytes, ())
    shown = "".join(result.push(byte) for byte in broken) + result.finish()
    assert shown == result.text == decode_bytes(broken)
