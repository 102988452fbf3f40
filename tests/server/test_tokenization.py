"""Token ids: the same as in one call, cached, and never further than the limit."""

from __future__ import annotations

import asyncio
import resource
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from aquifer.server import tokenization
from aquifer.server.tokenization import Tokenizer, TooLongError

WORDS = st.sampled_from(
    ["crate", "12", "3", " ", "  ", "\n", "\n\n", "\t", "it's", "--", "é", "日本", "1,250", "_x", "'", "\r\n"]
)


def make(limit: int = 100_000) -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), limit)


def ids_of(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(asyncio.run(tokenizer.document(text)))


def prompt_of(
    tokenizer: Tokenizer, inputs: str, document: str | array[int] | None = None, **options: int
) -> tuple[int, ...]:
    return tuple(asyncio.run(tokenizer.prompt(inputs, document, **options)))


def reference(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer().encode(text, add_special_tokens=False))


@given(st.lists(WORDS, max_size=60).map("".join))
@settings(max_examples=200)
def test_pieces_give_the_ids_of_one_call(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "PIECE_CHARS", 5)
        assert ids_of(make(), text) == reference(text)


def test_a_document_of_many_pieces_has_the_ids_of_one_call() -> None:
    text = "The shipment of 240 crates left Rotterdam on 12 March; it's due in Oslo.\n" * 5000
    assert ids_of(make(1_000_000), text) == reference(text)


def test_prompt_is_bos_then_document_then_inputs_tokenized_apart() -> None:
    prompt = prompt_of(make(), "rates?", "crat")
    assert prompt == (0, *reference("crat"), *reference("rates?"))


def test_a_document_given_as_tokens_is_taken_as_it_is() -> None:
    assert prompt_of(make(), "why", array("i", (7, 8, 9))) == (0, 7, 8, 9, *reference("why"))


def test_a_special_token_in_the_text_is_one_token() -> None:
    assert ids_of(make(), "a<|end|>b") == (*reference("a"), 298, *reference("b"))


def test_truncate_keeps_the_last_tokens_of_inputs_only() -> None:
    prompt = prompt_of(make(), "sender receiver weight " * 40, "crate", truncate=5)
    assert prompt == (0, *reference("crate"), *reference("sender receiver weight " * 40)[-5:])


def test_truncate_reads_only_the_end_of_a_huge_text() -> None:
    prompt = prompt_of(make(1000), "sender receiver weight " * 1_000_000, truncate=7)
    assert prompt == (0, *reference("sender receiver weight " * 40)[-7:])


def test_truncate_beyond_the_limit_reads_no_further_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), 100)
    encoded: list[int] = []
    encode = Tokenizer._encode

    def counting(self: Tokenizer, text: str) -> Iterator[tuple[int, Any]]:
        encoded.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "_encode", counting)
    with pytest.raises(TooLongError):
        asyncio.run(tokenizer.prompt("word " * 1_000_000, truncate=1 << 30))
    assert encoded == []
    assert len(asyncio.run(tokenizer.prompt("word " * 10, truncate=1 << 30))) < 100


def test_a_prompt_of_exactly_the_limit_is_taken_and_one_more_token_is_not() -> None:
    text = "one two three four"
    count = len(reference(text)) + 1
    assert len(asyncio.run(make(count).prompt(text))) == count
    with pytest.raises(TooLongError, match=rf"more than {count - 1:,} tokens.*AQUIFER_MAX_PROMPT_TOKENS"):
        asyncio.run(make(count - 1).prompt(text))


def test_a_document_leaves_less_room_for_inputs() -> None:
    with pytest.raises(TooLongError):
        asyncio.run(make(20).prompt("weight " * 9, "crate " * 9))


def test_a_document_in_the_cache_is_still_held_to_the_limit_of_the_whole_prompt() -> None:
    tokenizer = make(60)
    question = "which crate left on which day and why"
    assert asyncio.run(tokenizer.prompt(question))
    with pytest.raises(TooLongError):
        asyncio.run(tokenizer.prompt(question, array("i", range(1, 55))))


@pytest.mark.parametrize("text", ["weight in kg " * 4_000_000, "x" * 50_000_000], ids=["prose", "no-space"])
def test_fifty_megabytes_over_the_limit_are_refused_with_little_memory(text: str) -> None:
    tokenizer = make(131_072)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooLongError, match="more than 131,072"):
        ids_of(tokenizer, text)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 200


def test_tokenizing_stops_soon_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "PIECE_CHARS", 100)
    tokenizer = make(200)
    done: list[str] = []
    encode_batch = tokenizer._encode_batch
    monkeypatch.setattr(
        tokenizer,
        "_encode_batch",
        lambda batch: done.extend(text for _, text in batch) or encode_batch(batch),
    )
    text = "at a kg " * (190 * tokenizer._longest_token_chars // 8)
    with pytest.raises(TooLongError):
        ids_of(tokenizer, text)
    assert 0 < len("".join(done)) < len(text) / 2


def test_a_repeated_document_is_not_tokenized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make()
    text = "The shipment of 240 crates. " * 10
    first = ids_of(tokenizer, text)
    monkeypatch.setattr(tokenizer, "_encode", _must_not_be_called)
    assert ids_of(tokenizer, text) == first


def test_tokens_are_not_remembered_across_salts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make()
    asyncio.run(tokenizer.document("crate", salt="ann"))
    monkeypatch.setattr(tokenizer, "_encode", _must_not_be_called)
    with pytest.raises(AssertionError, match="tokenized again"):
        asyncio.run(tokenizer.document("crate", salt="bob"))


def test_the_cache_forgets_the_least_recently_used_and_stays_within_its_bytes() -> None:
    cache = tokenization._TokenCache(2000)
    for name in (b"a", b"b", b"c"):
        cache.put(name, array("i", range(200)))
        assert cache.get(b"a") is not None
    assert cache.get(b"b") is None
    assert cache._used_bytes <= 2000
    cache.put(b"huge", array("i", range(1000)))
    assert cache.get(b"huge") is None


def test_tokens_have_their_places_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "PIECE_CHARS", 10)
    text = "The shipment of 240 crates left Rotterdam."
    tokens = asyncio.run(make().tokens(text))
    assert tuple(token.id for token in tokens) == reference(text)
    assert "".join(token.text for token in tokens) == text
    assert all(text[token.start : token.stop] == token.text for token in tokens)


def test_the_event_loop_runs_while_a_document_is_tokenized() -> None:
    async def count_turns() -> int:
        work = asyncio.ensure_future(make(1_000_000).document("The shipment of 240 crates. " * 10_000))
        turns = 0
        while not work.done():
            turns += 1
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(count_turns()) > 100


def _sentencepiece_like() -> PreTrainedTokenizerFast:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(["a crate of 12 weights"], trainers.BpeTrainer(show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _llama2_like() -> PreTrainedTokenizerFast:
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.train_from_iterator(["a crate of 12 weights"], trainers.BpeTrainer(show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("build", [_sentencepiece_like, _llama2_like])
def test_tokenizers_that_prefix_every_text_are_not_cut(
    build: Callable[[], PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "PIECE_CHARS", 5)
    text = "a crate of 12 weights " * 5
    expected = tuple(build().encode(text, add_special_tokens=False))
    assert ids_of(Tokenizer(build(), 1000), text) == expected


def test_a_tokenizer_without_bos_adds_none() -> None:
    assert Tokenizer(_sentencepiece_like(), 1000).bos == array("i")


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="fast tokenizer"):
        Tokenizer(object(), 1000)


def _must_not_be_called(text: str) -> None:
    raise AssertionError("tokenized again")
