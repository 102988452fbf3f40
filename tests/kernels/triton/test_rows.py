"""Rows of chosen tokens: fetched into cells of the pool, and attended to there."""

import pytest
import torch
from kernel_inputs import a_lane
from torch import Tensor

from aquifer.compression.landmarks import TokenCodec
from aquifer.compression.spec import KVSpec
from aquifer.kernels.attention import attend
from aquifer.kernels.triton.lanes import NOBODY, Lane
from aquifer.kernels.triton.row_attention import attend_rows
from aquifer.kernels.triton.rows import fetch_rows, load_rows

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
if torch.cuda.is_available():
    TOLERANCE[torch.bfloat16] = 2e-2

SINKS = 4
LAYER = 1


class Layer:
    """One layer of 768 encoded tokens, and a pool of six pages of random KV."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(heads * head_dim)
        means = torch.randn(2, heads * head_dim, generator=generator)
        self.codec = TokenCodec(KVSpec(2, heads, head_dim, dtype, "{}"), means, device)
        keys, values = (torch.randn(768, heads, head_dim, generator=generator).to(device) for _ in "kv")
        keys += means[LAYER].view(heads, head_dim).to(device)
        self.rows = self.codec.encode(LAYER, keys, values).rows
        codes, scales = self.rows.split([head_dim, 4], dim=2)
        self.packed, self.scales = codes.flatten(1).contiguous().cpu(), scales.flatten(1).contiguous()
        if device.type == "cuda":
            self.packed = self.packed.pin_memory()
        self.keys, self.values = (
            torch.randn(heads, 6 * 256, head_dim, generator=generator).to(device, dtype) for _ in "kv"
        )

    @property
    def cells(self) -> tuple[Tensor, Tensor]:
        """The pool as cells: uint8 [H, cells, D/2] of keys and of values."""
        heads, _, head_dim = self.keys.shape
        keys, values = (
            half.view(torch.uint8).view(heads, -1, head_dim // 2) for half in (self.keys, self.values)
        )
        return keys, values

    def fetch(self, lanes: Tensor, num_missing: Tensor, **sizes: int) -> None:
        fetch_rows(lanes, num_missing, self.packed, self.keys, self.values, **sizes)

    def attend(self, q: Tensor, lanes: Tensor, sets: int, **sizes: int) -> Tensor:
        coded = self.scales, self.codec.row_quantizer.grid, self.codec.signs, self.codec.means[LAYER]
        return attend_rows(q, self.keys, self.values, *coded, lanes, sets=sets, sinks=SINKS, **sizes)

    def rows_of(self, lane: Lane, tokens: Tensor, head: int) -> Tensor:
        pages = lane.index_pages.long()[tokens // 256]
        return self.rows[pages * 256 + tokens % 256, head]


def wanted(lane: Lane, cells: range, seed: int) -> None:
    """Random tokens are chosen and missing, and these cells of the pool await them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = lane.cell_of.shape[2]
    for own in range(len(lane.chosen)):
        picks = SINKS + torch.randperm(tokens - SINKS, generator=generator)[: lane.wanted].sort().values
        order = torch.randperm(len(cells), generator=generator)[: lane.wanted]
        for tensor in (lane.chosen, lane.missing):
            tensor[own].copy_(picks)
        for tensor in (lane.row_cells, lane.targets):
            tensor[own].copy_(cells.start + order)


def expect_fetched(layer: Layer, before: list[Tensor], wanted: list[tuple[Lane, list[int]]]) -> None:
    """The pool holds the first so many rows of every set, and otherwise what it held."""
    half_row = layer.keys.shape[2] // 2
    for lane, counts in wanted:
        for head in range(len(layer.keys)):
            own = 0 if len(counts) == 1 else head
            token, cell = (t[own, : counts[own]].long() for t in (lane.missing, lane.targets))
            rows = layer.rows_of(lane, token, head)
            before[0][head, cell] = rows[:, :half_row]
            before[1][head, cell] = rows[:, half_row : 2 * half_row]
    for found, expected in zip(layer.cells, before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("heads", "head_dim", "count"), [(1, 64, 1), (3, 64, 7), (2, 128, 120)])
def test_fetched_rows_are_those_of_the_missing_tokens(
    heads: int,
    head_dim: int,
    count: int,
    shared: bool,
    dtype: torch.dtype,
    device: torch.device,
    launched: list[str],
) -> None:
    layer, sets = Layer(heads, head_dim, dtype, device), 1 if shared else heads
    launched.clear()  # what encodes on a device
    lane, other = a_lane(sets, count, device), a_lane(sets, 9, device, pages=2)
    wanted(lane, range(150), 1)
    wanted(other, range(150, 300), 2)
    before = [half.clone() for half in layer.cells]
    counts = [max(1, count - own) for own in range(sets)], [9] * sets
    lanes = torch.tensor([lane.row(1, 1), NOBODY, other.row(1, 1)], device=device)
    num_missing = torch.tensor([counts[0], [0] * sets, counts[1]], dtype=torch.int32, device=device)
    layer.fetch(lanes, num_missing, programs=3)
    assert launched == ["_fetch_rows"]
    expect_fetched(layer, before, [(lane, counts[0]), (other, counts[1])])


@pytest.mark.parametrize("sizes", [{"programs": 1}, {"programs": 3, "block_rows": 32}])
def test_few_programs_fetch_all_rows(
    sizes: dict[str, int], device: torch.device, launched: list[str]
) -> None:
    layer, lane = Layer(2, 64, torch.float32, device), a_lane(1, 100, device)
    launched.clear()
    wanted(lane, range(200, 300), 3)
    before = [half.clone() for half in layer.cells]
    num_missing = torch.tensor([[100]], dtype=torch.int32, device=device)
    layer.fetch(torch.tensor([lane.row(1, 1)], device=device), num_missing, **sizes)
    assert launched == ["_fetch_rows"]
    expect_fetched(layer, before, [(lane, [100])])


def pool_cells(lane: Lane, tokens: Tensor, per_slot: int) -> Tensor:
    """Where tokens have cells of their own."""
    place = SINKS * per_slot + tokens.long() - SINKS
    page_cells = 256 * per_slot
    return lane.row_pages.long()[place // page_cells] * page_cells + place % page_cells


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "head_dim", "sizes"), [(3, 64, {"programs": 5}), (2, 128, {"block_tokens": 8})]
)
def test_all_rows_are_loaded_into_cells_of_their_own(
    heads: int,
    head_dim: int,
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: torch.device,
    launched: list[str],
) -> None:
    layer = Layer(heads, head_dim, dtype, device)
    launched.clear()
    lane = a_lane(1, 1, device, cells=0)
    expected = [half.clone() for half in layer.cells]
    tokens = torch.arange(SINKS, 768, device=device)
    cell = pool_cells(lane, tokens, layer.codec.rows_per_slot)
    for head in range(heads):
        rows = layer.rows_of(lane, tokens, head)
        expected[0][head, cell] = rows[:, : head_dim // 2]
        expected[1][head, cell] = rows[:, head_dim // 2 : head_dim]
    segments = torch.tensor([1, 2, 0], dtype=torch.int32, device=device)  # in any order
    starts = 256 * lane.index_pages[segments].long()
    pool = layer.keys, layer.values
    load_rows(segments, starts, lane.row_pages, layer.packed, *pool, sinks=SINKS, **sizes)
    assert launched == ["_load_rows"]
    for found, right in zip(layer.cells, expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_finds_rows_in_listed_cells_and_in_their_own(
    dtype: torch.dtype, device: torch.device, launched: list[str]
) -> None:
    layer = Layer(2, 64, dtype, device)
    launched.clear()
    listed, at_home = (a_lane(2, 60, device, cells=cells) for cells in (400, 0))
    pool = layer.keys, layer.values
    segments = torch.arange(3, dtype=torch.int32, device=device)
    starts = 256 * at_home.index_pages.long()
    load_rows(segments, starts, at_home.row_pages, layer.packed, *pool, sinks=SINKS)
    for lane in (listed, at_home):
        wanted(lane, range(60), 1)
    listed.row_cells.copy_(pool_cells(listed, listed.chosen, layer.codec.rows_per_slot))
    q = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    lanes = torch.tensor([listed.row(1, 20), at_home.row(1, 20)], device=device)
    found = layer.attend(q[:1].expand(2, -1, -1).contiguous(), lanes, 2, splits=2, block_tokens=32)
    assert torch.equal(found[0], found[1])
    assert launched == ["_load_rows", "_attend_rows", "_join_rows"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("heads", "group", "head_dim", "count", "tail", "splits"),
    [(1, 1, 64, 1, 1, 1), (3, 7, 64, 70, 258, 5), (2, 4, 128, 120, 130, 2), (2, 2, 64, 30, 3, 9)],
)
def test_attention_to_packed_rows_equals_attention_to_decoded_ones(
    heads: int,
    group: int,
    head_dim: int,
    count: int,
    tail: int,
    splits: int,
    shared: bool,
    dtype: torch.dtype,
    device: torch.device,
    launched: list[str],
) -> None:
    layer, sets = Layer(heads, head_dim, dtype, device), 1 if shared else heads
    launched.clear()
    lane, other = a_lane(sets, count, device), a_lane(sets, 9, device, pages=2)
    # Cells of pages 3 and 2 of the pool, which are row pages, behind the sinks in page 3.
    per_slot = layer.codec.rows_per_slot
    wanted(lane, range((3 * 256 + SINKS) * per_slot, 4 * 256 * per_slot), 1)
    wanted(other, range(2 * 256 * per_slot, 3 * 256 * per_slot), 2)
    lanes = torch.tensor([lane.row(1, tail), NOBODY, other.row(1, 40)], device=device)
    num_missing = torch.tensor([[count], [0], [9]], dtype=torch.int32, device=device)
    layer.fetch(lanes, num_missing.expand(3, sets).contiguous(), programs=2)
    q = torch.randn(3, heads * group, head_dim, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    found = layer.attend(q, lanes, sets, splits=splits, block_tokens=32)
    assert launched == ["_fetch_rows", "_attend_rows", "_join_rows"]
    assert not found[1].any()
    for number, one, length in ((0, lane, tail), (2, other, 40)):
        tail_at = torch.cat([torch.arange(256) + 256 * page for page in one.tail_pages.tolist()])[:length]
        exact = torch.cat((3 * 256 + torch.arange(SINKS), tail_at)).to(device)
        for head in range(heads):
            token = one.chosen[0 if shared else head].long()
            which = torch.full((len(token),), head, device=device)
            key, value = layer.codec.decode_rows(LAYER, which, layer.rows_of(one, token, head))
            k, v = (
                torch.cat((half[head, exact].float(), row))[None]
                for half, row in ((layer.keys, key), (layer.values, value))
            )
            own = slice(head * group, (head + 1) * group)
            expected, _ = attend(q[number, own, None].float(), k, v)
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(
                found[number, own].float(), expected[:, 0], atol=tolerance, rtol=tolerance
            )


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    layer, lane = Layer(3, 64, torch.float32, device), a_lane(1, 5, device)
    lanes = torch.tensor([lane.row(1, 1)], device=device)
    none = torch.zeros(1, 1, dtype=torch.int32, device=device)
    q = torch.zeros(1, 6, 64, device=device)
    with pytest.raises(ValueError, match="2 sets of tokens for 3 heads"):
        layer.fetch(lanes, none.expand(1, 2).contiguous())
    with pytest.raises(ValueError, match="2 sets of tokens for 3 heads"):
        layer.attend(q, lanes, 2)
    with pytest.raises(ValueError, match="5 query heads"):
        layer.attend(q[:, :5], lanes, 1)
    with pytest.raises(ValueError, match="lanes is"):
        layer.fetch(lanes[:, 1:], none)
    pool, pages = (layer.keys, layer.values), (lane.index_pages, lanes[0, :3], lane.row_pages)
    with pytest.raises(ValueError, match="block_tokens is 3"):
        load_rows(*pages, layer.packed, *pool, sinks=SINKS, block_tokens=3)
    with pytest.raises(ValueError, match="rows is"):
        load_rows(*pages, layer.packed[:, 1:], *pool, sinks=SINKS)
    with pytest.raises(ValueError, match="starts is"):
        load_rows(lane.tail_pages, *pages[1:], layer.packed, *pool, sinks=SINKS)
    layer.values = layer.values.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="values has strides"):
        layer.fetch(lanes, none)
