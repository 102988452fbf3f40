"""What `aquifer bench kernels` measures on CUDA: every kernel of kernels/triton, and attention of prefill.

Shapes are those of the engine behind a prompt of `tokens` tokens. Imports Triton, so only where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from aquifer.benchmarks.device_codec import codec_kernels
from aquifer.benchmarks.device_selection import found_kernels, selection_kernels, token_kernels
from aquifer.benchmarks.device_shape import BATCH, Shape
from aquifer.benchmarks.engines import QUESTION_TOKENS
from aquifer.benchmarks.plain_kernels import CHUNK_TOKENS
from aquifer.benchmarks.roofline import Kernel, Limit
from aquifer.kernels.attention import attend, attend_in_pieces
from aquifer.kernels.triton.attention import PAGE_TOKENS, attend_pages, merge_parts
from aquifer.kernels.triton.greedy import most_likely
from aquifer.kernels.triton.norms import add_rms_norm, rms_norm, swiglu
from aquifer.kernels.triton.rope import rotate_and_store

EPSILON = 1e-5


def page_kernels(shape: Shape) -> list[Kernel]:
    """Attention of new tokens over pages: of decode steps, and of a question. Many requests have a quarter of
    the tokens each, because so many times all of them fit no device."""
    tokens, quarter = shape.tokens, -(-shape.tokens // 4)
    question = f"attention over pages, {QUESTION_TOKENS} tokens"
    return [
        _over_pages(shape, "attention over pages, 1 request", tokens),
        _over_pages(shape, f"attention over pages, {BATCH} requests", quarter, requests=BATCH),
        _over_pages(shape, question, tokens, queries=QUESTION_TOKENS),
    ]


def _over_pages(shape: Shape, name: str, tokens: int, *, requests: int = 1, queries: int = 1) -> Kernel:
    """Each request has so many tokens, of which the last ones are its queries; pages lie in any order."""
    heads, head_dim, device = shape.heads, shape.head_dim, shape.device
    pages = -(-tokens // PAGE_TOKENS)
    tables = torch.randperm(requests * pages, device=device).int().view(requests, pages)
    last = torch.arange(tokens - queries + 1, tokens + 1, dtype=torch.int32, device=device)
    lengths = last.clamp(min=0).repeat(requests)
    cached = 2 * shape.half_bytes(requests * tokens)
    flop = 4.0 * requests * queries * tokens * shape.query_heads * head_dim

    def layer() -> Callable[[], object]:
        q = shape.random(requests * queries, shape.query_heads, head_dim)
        keys, values = (shape.random(heads, requests * pages * PAGE_TOKENS, head_dim) for _ in range(2))
        return partial(attend_pages, q, keys, values, tables, lengths)

    needs = {Limit.MEMORY: cached, Limit.GEMM: flop, Limit.START: 2}
    note = f"{tokens:,} tokens each" if requests > 1 else None
    return Kernel(name, shape.layers(cached, layer), needs, note=note)


def prefill_kernels(shape: Shape) -> list[Kernel]:
    """Attention of a chunk of a prompt, in the two pieces that are merged."""
    tokens, head_dim = shape.tokens, shape.head_dim
    rows = min(CHUNK_TOKENS, tokens)
    query_bytes = float(shape.query_heads * rows * head_dim * shape.dtype.itemsize)

    def chunk(heads: int) -> Tensor:
        """[heads, rows, D], the heads of a token side by side, as a product gives them."""
        return shape.random(rows, heads, head_dim).transpose(0, 1)

    def past() -> Callable[[], object]:
        keys, values = (shape.random(shape.heads, tokens, head_dim) for _ in range(2))
        return partial(attend_in_pieces, chunk(shape.query_heads), keys, values)

    def itself() -> Callable[[], object]:
        own = [chunk(heads) for heads in (shape.query_heads, shape.heads, shape.heads)]
        return partial(attend, *own, causal=True)

    def merge() -> Callable[[], object]:
        lse = torch.randn(2, shape.query_heads, rows, device=shape.device)
        return partial(merge_parts, [(chunk(shape.query_heads), part) for part in lse])

    past_bytes = 2 * shape.half_bytes(tokens) + 2 * query_bytes
    own_bytes = 2 * shape.half_bytes(rows) + 2 * query_bytes
    flop = 4.0 * shape.query_heads * rows * head_dim
    return [
        Kernel(
            "attention, chunk to past",
            shape.layers(past_bytes, past),
            {Limit.MEMORY: past_bytes, Limit.GEMM: flop * tokens},
        ),
        Kernel(
            "attention, chunk to itself",
            shape.layers(own_bytes, itself),
            {Limit.MEMORY: own_bytes, Limit.GEMM: flop * rows / 2},
        ),
        Kernel(
            "merge of two pieces",
            shape.layers(3 * query_bytes, merge),
            {Limit.MEMORY: 3 * query_bytes, Limit.START: 1},
        ),
    ]


def layer_kernels(shape: Shape) -> list[Kernel]:
    """The small steps of a layer, for a chunk of a prompt and for one new token."""
    chunk = min(CHUNK_TOKENS, shape.tokens)
    return [
        kernel
        for rows, suffix in ((chunk, "chunk"), (1, "one token"))
        for kernel in (_rotation(shape, rows, suffix), *_norms(shape, rows, suffix))
    ]


def _rotation(shape: Shape, rows: int, suffix: str) -> Kernel:
    heads, head_dim = (shape.query_heads, shape.heads, shape.heads), shape.head_dim
    slots = torch.arange(rows, device=shape.device)
    # Of q, k and v one element read each; q written once, k twice, v once.
    moved = float(rows * head_dim * (2 * shape.query_heads + 5 * shape.heads + 2) * shape.dtype.itemsize)

    def layer() -> Callable[[], object]:
        q, k, v = shape.random(rows, sum(heads), head_dim).split(heads, dim=1)
        cos, sin = shape.random(2, rows, head_dim)
        keys, values = shape.random(2, shape.heads, rows, head_dim)
        return partial(rotate_and_store, q, k, v, cos, sin, slots, keys, values)

    return Kernel(
        f"RoPE and store, {suffix}", shape.layers(moved, layer), {Limit.MEMORY: moved, Limit.START: 1}
    )


def _norms(shape: Shape, rows: int, suffix: str) -> list[Kernel]:
    row_bytes = float(rows * shape.hidden * shape.dtype.itemsize)
    gate_bytes = float(rows * shape.intermediate * shape.dtype.itemsize)

    def hidden() -> Tensor:
        return shape.random(rows, shape.hidden)

    def weight() -> Tensor:
        return shape.random(shape.hidden)

    def gated() -> Callable[[], object]:
        return partial(swiglu, *shape.random(rows, 2 * shape.intermediate).chunk(2, dim=1))

    works: Sequence[tuple[str, float, Callable[[], Callable[[], object]]]] = (
        ("RMSNorm", 2 * row_bytes, lambda: partial(rms_norm, hidden(), weight(), EPSILON)),
        (
            "sum and RMSNorm",
            4 * row_bytes,
            lambda: partial(add_rms_norm, hidden(), hidden(), weight(), EPSILON),
        ),
        ("SwiGLU", 3 * gate_bytes, gated),
    )
    return [
        Kernel(f"{name}, {suffix}", shape.layers(moved, layer), {Limit.MEMORY: moved, Limit.START: 1})
        for name, moved, layer in works
    ]


def token_choices(shape: Shape) -> list[Kernel]:
    """What follows the last layer of a decode step."""
    return [_most_likely(shape, "1 row", 1), _most_likely(shape, f"{BATCH} rows", BATCH)]


def _most_likely(shape: Shape, suffix: str, rows: int) -> Kernel:
    read = float(rows * shape.vocabulary * torch.float32.itemsize)

    def layer() -> Callable[[], object]:
        ids = torch.empty(rows, dtype=torch.int32, device=shape.device)
        logits = torch.randn(rows, shape.vocabulary, device=shape.device)
        return partial(most_likely, logits, ids, torch.empty(rows, device=shape.device))

    return Kernel(
        f"most likely token, {suffix}", shape.layers(read, layer), {Limit.MEMORY: read, Limit.START: 2}
    )


GROUPS: Mapping[str, Callable[[Shape], list[Kernel]]] = {
    "codec": partial(codec_kernels, integers=False),
    "codec in integers": partial(codec_kernels, integers=True),
    "attention over pages": page_kernels,
    "attention of prefill": prefill_kernels,
    "layers": layer_kernels,
    "choice of tokens": token_choices,
    "tokens encoded for selection": token_kernels,
    "selection": selection_kernels,
    "rows of the trace": found_kernels,
    "selection, many requests": partial(selection_kernels, requests=BATCH),
    "rows of the trace, many requests": partial(found_kernels, requests=BATCH),
}
"""By what their data has in common: it is on the device at the same time."""
