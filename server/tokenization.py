"""Text to token ids: off the event loop, in pieces, never further than the limit, never twice.

    ValueError
    ├── TooLongError         the prompt has more tokens than this server takes
    └── ChatTemplateError    the model has no chat template, or its template refuses the conversation

A tokenizer does about a megabyte per second and core, so a document of tens of megabytes would take minutes
and gigabytes in one call. It is therefore cut where the result cannot change, and the work stops as
soon as the limit is passed.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import tokenizers
from blake3 import blake3
from jinja2 import TemplateError

MIB = 1 << 20
PIECE_CHARS = 64 << 10
# Without a single place to cut (no white space at all) a text is cut here all the same: a merge
# across such a cut is lost, at worst one token per piece, but time and memory stay bounded.
LONGEST_PIECE_CHARS = 256 << 10
PIECES_PER_CALL = 4
# Where the head of a text is dropped, its first word may be half a word: those tokens are dropped too.
TRUNCATE_MARGIN_CHARS = 1024
# Byte-level BPE splits text into words before it merges, and a word ends where a letter or digit
# meets a space or a line end: no token spans that place.
_CUT = re.compile(r"[^\W_](?=[ \n])")


class TooLongError(ValueError):
    """The prompt has more tokens than this server takes. The message has the number and the way out."""

    def __init__(self, limit: int, count: int | None = None) -> None:
        has = f"more than {limit:,}" if count is None else f"{count:,}"
        super().__init__(f"prompt has {has} tokens; this server takes {limit:,} (AQUIFER_MAX_PROMPT_TOKENS)")


class ChatTemplateError(ValueError):
    """The model has no chat template, or its template refuses the conversation."""


@dataclass(frozen=True)
class Token:
    """One token of a text; start and stop are character positions."""

    id: int
    text: str
    start: int
    stop: int


class Tokenizer:
    """Token ids of prompts, bounded in time and memory. Safe to use from many coroutines.

    Wraps a transformers tokenizer (a fast one: there must be a Rust tokenizer inside). Ids are arrays of
    32-bit integers, the form in which a prompt is hashed. Results are kept by the text's digest, so that a
    repeated document is not tokenized again. The digest is salted: how fast an answer comes must not tell one
    tenant what another has sent.
    """

    def __init__(
        self, hf_tokenizer: Any, max_prompt_tokens: int, *, cache_bytes: int = 64 * MIB, threads: int = 2
    ) -> None:
        """Raises ValueError when `hf_tokenizer` is not a fast tokenizer."""
        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ValueError(
                f"{type(hf_tokenizer).__name__} has no tokenizer.json; a fast tokenizer is needed"
            )
        self._hf_tokenizer = hf_tokenizer
        self._backend = backend
        self._bos = array("i", [] if hf_tokenizer.bos_token_id is None else [hf_tokenizer.bos_token_id])
        layout = backend.to_str()
        self.fingerprint = blake3(layout.encode()).hexdigest()
        """Of all that says which ids a text has."""
        self._cuttable = _is_cuttable(json.loads(layout))
        # Byte-level vocabularies spell a byte as one character, so this bounds what one token covers.
        self._longest_token_chars = max(len(token) for token in backend.get_vocab())
        self.max_prompt_tokens = max_prompt_tokens
        self._cache = _TokenCache(cache_bytes)
        # Threads of our own: long documents must not occupy the pool that serves everything else.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")

    @property
    def bos(self) -> array[int]:
        """The tokens every prompt begins with: one, or none where the model knows none."""
        return self._bos

    async def prompt(
        self,
        inputs: str,
        document: str | array[int] | None = None,
        *,
        truncate: int | None = None,
        salt: str = "",
    ) -> array[int]:
        """Token ids of BOS + document + inputs; `truncate` keeps that many last tokens of inputs.

        document: text, or the tokens of one that was read before.
        Raises TooLongError.
        """
        return await self._run(self._prompt, inputs, document, truncate, salt)

    async def document(self, text: str, *, salt: str = "") -> array[int]:
        """Token ids of a document, without BOS. Raises TooLongError."""
        return await self._run(self._document, text, salt)

    async def tokens(self, text: str) -> list[Token]:
        """The tokens of a text with their places in it, without BOS. Raises TooLongError."""
        return await self._run(self._tokens, text)

    async def render_chat(self, messages: list[dict[str, str]]) -> str:
        """A conversation as the model's chat template writes it, ready for the answer, without BOS.

        messages: each with `role` and `content`. Raises ChatTemplateError.
        """
        return await self._run(self._render_chat, messages)

    def check_length(self, num_tokens: int) -> None:
        """Raises TooLongError when a prompt of so many tokens is not taken."""
        if num_tokens > self.max_prompt_tokens:
            raise TooLongError(self.max_prompt_tokens, num_tokens)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _prompt(
        self, inputs: str, document: str | array[int] | None, truncate: int | None, salt: str
    ) -> array[int]:
        if isinstance(document, str):
            document = self._document(document, salt)
        head = self._bos + document if document else self._bos
        if truncate and truncate <= self.max_prompt_tokens:  # else it keeps more than may be sent
            # Only the end counts, and this much text holds it, whatever is before.
            inputs = inputs[-(truncate * self._longest_token_chars + TRUNCATE_MARGIN_CHARS) :]
            ids = head + self._ids(inputs, salt, limit=None)[-truncate:]
        else:
            ids = head + self._ids(inputs, salt, limit=self.max_prompt_tokens - len(head))
        self.check_length(len(ids))
        return ids

    def _render_chat(self, messages: list[dict[str, str]]) -> str:
        if not self._hf_tokenizer.chat_template:
            raise ChatTemplateError("this model has no chat template; use /v1/completions or /generate")
        try:
            text = self._hf_tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses this: {error}") from error
        # Templates write BOS themselves; every prompt gets it from here.
        return str(text).removeprefix(self._hf_tokenizer.bos_token or "")

    def _document(self, text: str, salt: str) -> array[int]:
        return self._ids(text, salt, limit=self.max_prompt_tokens - len(self._bos))

    def _ids(self, text: str, salt: str, limit: int | None) -> array[int]:
        """Token ids of one text; the cache's own, so read only. Raises TooLongError beyond `limit` tokens."""
        self._refuse_early(text, limit)
        digest = blake3(text.encode(), key=blake3(salt.encode()).digest()).digest()
        ids = self._cache.get(digest)
        if ids is None:
            ids = array("i")
            for _, encoding in self._encode(text):
                ids.extend(encoding.ids)
                if limit is not None and len(ids) > limit:
                    raise TooLongError(self.max_prompt_tokens)
            self._cache.put(digest, ids)
        if limit is not None and len(ids) > limit:
            raise TooLongError(self.max_prompt_tokens)
        return ids

    def _tokens(self, text: str) -> list[Token]:
        self._refuse_early(text, self.max_prompt_tokens)
        found: list[Token] = []
        for offset, encoding in self._encode(text):
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
                start, stop = start + offset, stop + offset
                found.append(Token(token_id, text[start:stop], start, stop))
            if len(found) > self.max_prompt_tokens:
                raise TooLongError(self.max_prompt_tokens)
        return found

    def _refuse_early(self, text: str, limit: int | None) -> None:
        """Refuse what cannot fit even if every token were the longest of the vocabulary."""
        if limit is not None and len(text) > max(limit, 0) * self._longest_token_chars:
            raise TooLongError(self.max_prompt_tokens)

    def _encode(self, text: str) -> Iterator[tuple[int, tokenizers.Encoding]]:
        """Encodings of the pieces of `text`, each with the character position its piece begins at."""
        pieces = _cut(text) if self._cuttable else iter([(0, text)])
        batch: list[tuple[int, str]] = []
        for piece in pieces:
            batch.append(piece)
            if len(batch) == PIECES_PER_CALL:
                yield from self._encode_batch(batch)
                batch = []
        yield from self._encode_batch(batch)

    def _encode_batch(self, batch: list[tuple[int, str]]) -> Iterator[tuple[int, tokenizers.Encoding]]:
        encodings = self._backend.encode_batch([piece for _, piece in batch], add_special_tokens=False)
        return zip((offset for offset, _ in batch), encodings, strict=True)


class _TokenCache:
    """Least recently used token ids by text digest, bounded by their bytes."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._entries: OrderedDict[bytes, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> array[int] | None:
        with self._lock:
            ids = self._entries.get(digest)
            if ids is not None:
                self._entries.move_to_end(digest)
            return ids

    def put(self, digest: bytes, ids: array[int]) -> None:
        with self._lock:
            if digest in self._entries or _bytes(ids) > self._capacity_bytes:
                return
            self._entries[digest] = ids
            self._used_bytes += _bytes(ids)
            while self._used_bytes > self._capacity_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._used_bytes -= _bytes(dropped)


def _bytes(ids: array[int]) -> int:
    # 128: about what the digest, the array and the dictionary entry take themselves.
    return len(ids) * ids.itemsize + 128


def _cut(text: str) -> Iterator[tuple[int, str]]:
    """Pieces of about PIECE_CHARS with their positions, cut where no token can span."""
    start = 0
    while start < len(text):
        stop = start + LONGEST_PIECE_CHARS
        cut = _CUT.search(text, start + PIECE_CHARS, stop)
        end = cut.end() if cut else stop
        yield start, text[start:end]
        start = end


def _is_cuttable(layout: dict[str, Any]) -> bool:
    """Whether cutting at _CUT leaves the token ids unchanged. layout: a tokenizer.json.

    True for byte-level BPE that splits words by itself or by a pattern. False for SentencePiece
    (Metaspace, or a normalizer that prepends a space): every piece would get a prefix of its own.
    """
    normalizer = layout.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        return False
    # An added token is matched before words are split: none may reach over a cut.
    if any(re.search(r"[^\W_](?: |\n|$)", token["content"]) for token in layout.get("added_tokens", [])):
        return False
    pre_tokenizer = layout.get("pre_tokenizer") or {"type": None}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    splits_words = any(step["type"] == "Split" for step in steps) or any(s["use_regex"] for s in byte_level)
    return bool(byte_level) and splits_words
