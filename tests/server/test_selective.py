"""What selective attention reads: the right rows, fetched once while they stay, no more than the budget."""

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import DEVICE
from torch import Tensor

from aquifer.compression.landmarks import TokenCodec
from aquifer.compression.spec import KVSpec
from aquifer.server.engine import selective
from aquifer.server.engine.host_memory import until_read
from aquifer.server.engine.index import IndexPool, index_pages
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.selective import RowCache, Selection, indexed_tokens, selected_tokens

SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_dim=16, dtype=torch.float32, rope="{}")
TOKENS = 256


class Case:
    """An index of one page, and a row cache over it."""

    def __init__(self, count: int, *, shared: bool) -> None:
        self.pool = PagePool(SPEC, 4 * 256 * SPEC.bytes_per_token, DEVICE, keep=False)
        self.index = IndexPool(TokenCodec(SPEC, None, DEVICE), 2, DEVICE, keep=False)
        generator = torch.Generator().manual_seed(1)
        self.keys, self.values = torch.randn(2, 2, 2, TOKENS, 16, generator=generator).to(DEVICE)
        for layer in range(2):
            self.index.write(layer, [(256, 512)], self.keys[layer], self.values[layer])
        cells = torch.randperm(1024 * self.index.codec.rows_per_slot, generator=generator)
        self.cells = cells[: 4 * count].to(DEVICE)
        tokens = torch.arange(256, 512, device=DEVICE)
        selection = Selection(count, len(self.cells), 1, shared)
        self.rows = RowCache(self.pool, self.index, tokens, self.cells, selection)

    def expected(self, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, K, D] as their rows say, read straight from the index."""
        per_head = chosen.expand(2, -1)
        heads = torch.arange(2, device=DEVICE).repeat_interleave(chosen.shape[1])
        where = 256 + per_head.flatten(), heads
        rows = torch.cat(
            (*self.index.read_codes(layer, *where), self.index.read_scales(layer, *where)), dim=1
        )
        keys, values = self.index.codec.decode_rows(layer, heads, rows)
        return keys.view(2, -1, 16), values.view(2, -1, 16)


@pytest.mark.parametrize("shared", [True, False])
def test_random_steps_always_find_the_chosen_rows(shared: bool) -> None:
    case = Case(20, shared=shared)
    sets = 1 if shared else 2
    generator = torch.Generator().manual_seed(2)
    for step in range(1, 60):
        for layer in range(2):
            choices = [torch.randperm(TOKENS, generator=generator)[:20].sort().values for _ in range(sets)]
            chosen = torch.stack(choices).to(DEVICE)
            cells, fetched = case.rows.fetch(layer, chosen, step)
            assert 0 <= fetched <= chosen.numel()
            found, expected = case.rows.read(layer, chosen, cells), case.expected(layer, chosen)
            assert all(torch.equal(own, true) for own, true in zip(found, expected, strict=True))
            assert all(len(set(own.tolist())) == 20 for own in cells)
            assert set(cells.flatten().tolist()) <= set(case.cells.tolist())


def test_what_was_fetched_lately_is_not_fetched_again() -> None:
    case = Case(10, shared=True)
    first = torch.arange(10, device=DEVICE)[None]
    assert case.rows.fetch(0, first, 1)[1] == 10
    assert case.rows.fetch(0, first, 2)[1] == 0
    assert case.rows.fetch(0, first + 5, 3)[1] == 5
    assert case.rows.fetch(1, first, 3)[1] == 10  # another layer has rows of its own


def test_the_least_recently_used_row_makes_room() -> None:
    case = Case(10, shared=True)  # room for 40 rows
    for step, start in enumerate((0, 10, 20, 30, 0, 40), start=1):
        fetched = case.rows.fetch(0, torch.arange(start, start + 10, device=DEVICE)[None], step)[1]
        assert fetched == (0 if step == 5 else 10)
    again = [case.rows.fetch(0, torch.arange(at, at + 10, device=DEVICE)[None], 9)[1] for at in (0, 10)]
    assert again == [0, 10]


def test_keys_and_values_come_back_close_to_what_was_written() -> None:
    case = Case(30, shared=False)
    chosen = torch.stack([torch.arange(30), torch.arange(100, 130)]).to(DEVICE)
    cells, _ = case.rows.fetch(1, chosen, 1)
    halves = zip(case.rows.read(1, chosen, cells), (case.keys, case.values), strict=True)
    for half, written in halves:
        for head in range(2):
            found, true = half[head], written[1, head, chosen[head]]
            assert (found - true).square().sum() < 0.02 * true.square().sum()


@pytest.mark.parametrize(
    ("prompt", "budget", "selected"),
    [
        (8192, 0.05, 410 - 256 - 4),  # a whole segment is tail: its last token must be computed
        (8193, 0.05, 410 - 1 - 4),
        (8193, 0.01, 82 - 1 - 4),
        (1000, 0.01, 64),  # the tail alone is above the budget
        (8193, 1.0, 8192 - 4),
        (200, 0.5, 0),
    ],
)
def test_the_budget_counts_sinks_and_tail(prompt: int, budget: float, selected: int) -> None:
    assert selected_tokens(prompt, budget) == selected
    assert indexed_tokens(8193) == 8188


def test_rows_on_the_device_are_sixteen_steps_worth_but_never_more_than_there_are() -> None:
    few = Selection.of(8193, 0.01, shared=False, rows_per_slot=4)
    assert (few.cached, few.row_pages) == (16 * (82 - 5), 2)  # 4 sinks and a fourth of 1,232 rows
    many = Selection.of(8193, 0.5, shared=False, rows_per_slot=8)
    assert (many.cached, many.row_pages) == (8188, 5)  # 4 sinks and 1,024 slots
    rich = Selection.of(8193, 0.01, shared=False, rows_per_slot=4, share_pages=3)
    assert (rich.cached, rich.row_pages) == ((3 * 256 - 4) * 4, 3)
    assert Selection.of(8193, 0.01, shared=False, rows_per_slot=4, share_pages=99).cached == 8188
    assert Selection.of(8193, 0.01, shared=False, rows_per_slot=4, share_pages=-1) == few


def test_an_index_is_bounded_by_host_and_by_device_memory() -> None:
    codec = TokenCodec(SPEC, None, DEVICE)
    rows = 256 * SPEC.num_layers * SPEC.num_kv_heads
    host_page, device_page = rows * (8 + 8), 256 * codec.landmark_bytes + rows * (2 + 2)
    assert index_pages(codec, 7 * host_page, 1 << 40) == 7
    assert index_pages(codec, 1 << 40, 5 * device_page) == 5
    index = IndexPool(codec, 3, DEVICE, keep=False)
    on_device = (index.codes, index.scales, index.row_scales)
    assert index.capacity_bytes == 3 * device_page == sum(tensor.nbytes for tensor in on_device)
    assert index.rows.nbytes == 3 * host_page and index.row_bytes == 8 + 8
    assert index_pages(codec, 0, 1 << 40) == 0


@pytest.mark.parametrize("heads", [1, 3])
def test_rows_are_handed_on_as_they_go_to_the_host(heads: int) -> None:
    """Side by side, as kernels read them."""
    spec = replace(SPEC, num_kv_heads=heads)
    index = IndexPool(TokenCodec(spec, None, DEVICE), 1, DEVICE, keep=False)
    kv = torch.randn(2, heads, 9, spec.head_dim, device=DEVICE)
    rows = index.write(0, [(5, 14)], *kv)
    until_read(DEVICE)
    assert rows.is_contiguous()
    assert torch.equal(rows.cpu(), index.rows[0, 5:14])


@pytest.mark.parametrize("what", ["index", "sinks"])
def test_a_stream_stays_until_the_device_has_read_its_records(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        def next_layer(self) -> tuple[Tensor, Tensor]:
            return torch.zeros(2, SPEC.num_kv_heads, 4, SPEC.head_dim, device=DEVICE).unbind()

    class Source:
        spans = ((0, 4),)

        def open(self) -> Stream:
            stream = Stream()
            streams.append(weakref.ref(stream))
            return stream

    streams: list[weakref.ref[Stream]] = []
    alive: list[bool] = []
    monkeypatch.setattr(selective, "until_read", lambda device: alive.append(streams[-1]() is not None))
    reader: Any = SimpleNamespace(source=lambda *_, **__: Source(), adapter=SimpleNamespace(spec=SPEC))
    cache: Any = SimpleNamespace(table=BlockTable([None]), host={0: None})
    if what == "index":
        index = IndexPool(TokenCodec(SPEC, None, DEVICE), 1, DEVICE, keep=False)
        selective.build_index(index, [0], [0], cache, reader)
    else:
        pool = PagePool(SPEC, 256 * SPEC.bytes_per_token, DEVICE, keep=False)
        selective.fill_sinks(pool, [0], cache, reader)
    assert alive == [True]
