import pytest
import torch
from kernel_inputs import a_lane
from torch import Tensor

from aquifer.compression.aqua import load_quantizer
from aquifer.compression.landmarks import TokenCodec
from aquifer.compression.spec import KVSpec
from aquifer.kernels.triton.lanes import NOBODY, Lane
from aquifer.kernels.triton.rows import fetch_rows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
if torch.cuda.is_available():
    TOLERANCE[torch.bfloat16] = 2e-2
UNTOUCHED = 7.0


class Layer:
    """One layer of 768 encoded tokens, and a pool of 300 slots."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(heads * head_dim)
        means = torch.randn(2, heads * head_dim, generator=generator)
        self.codec = TokenCodec(KVSpec(2, heads, head_dim, dtype, "{}"), means, device)
        keys, values = (torch.randn(768, heads, head_dim, generator=generator).to(device) for _ in "kv")
        encoded = self.codec.encode(1, keys + means[1].view(heads, head_dim).to(device), values)
        self.rows = encoded.rows.cpu()
        codes, scales = self.rows.split([head_dim, 4], dim=2)
        self.packed, self.scales = codes.flatten(1).contiguous(), scales.flatten(1).contiguous().to(device)
        if device.type == "cuda":
            self.packed = self.packed.pin_memory()
        self.keys, self.values = (
            torch.full((heads, 300, head_dim), UNTOUCHED, dtype=dtype, device=device) for _ in "kv"
        )

    def fetch(self, lanes: Tensor, num_missing: Tensor, **sizes: int) -> None:
        grid, signs = load_quantizer(4, self.keys.device).grid, self.codec.signs
        means = self.codec.means[1]
        rows = self.packed, self.scales
        fetch_rows(lanes, num_missing, *rows, grid, signs, means, self.keys, self.values, **sizes)

    def expected(self, wanted: list[tuple[Lane, list[int]]]) -> tuple[Tensor, Tensor]:
        """The pool after the plain code fetched the first so many rows of every set."""
        heads, device = len(self.keys), self.keys.device
        keys, values = (torch.full_like(self.keys, UNTOUCHED) for _ in "kv")
        for lane, counts in wanted:
            slot_at = torch.cat([torch.arange(256) + 256 * page for page in lane.index_pages.tolist()])
            for head in range(heads):
                own = 0 if len(counts) == 1 else head
                token, target = (t[own, : counts[own]].long() for t in (lane.missing, lane.targets))
                rows = self.rows[slot_at[token.cpu()], head].to(device)
                number = torch.full((len(rows),), head, device=device)
                key, value = self.codec.decode_rows(1, number, rows)
                keys[head, target], values[head, target] = key.to(keys.dtype), value.to(values.dtype)
        return keys, values


def wanted(lane: Lane, slots: range, seed: int) -> None:
    """Random tokens are missing, and these slots of the pool await them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = lane.keys.shape[1]
    for own in range(len(lane.missing)):
        picks = torch.randperm(tokens, generator=generator)[: lane.wanted].sort().values
        order = torch.randperm(len(slots), generator=generator)[: lane.wanted]
        lane.missing[own].copy_(picks)
        lane.targets[own].copy_(slots.start + order)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("heads", "head_dim", "count"), [(1, 64, 1), (3, 64, 7), (2, 128, 120)])
def test_fetched_rows_equal_their_twin(
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
    counts = [max(1, count - own) for own in range(sets)], [9] * sets
    lanes = torch.tensor([lane.row(1, 1), NOBODY, other.row(1, 1)], device=device)
    num_missing = torch.tensor([counts[0], [0] * sets, counts[1]], dtype=torch.int32, device=device)
    layer.fetch(lanes, num_missing)
    assert launched == ["_fetch_rows"]
    expected = layer.expected([(lane, counts[0]), (other, counts[1])])
    for found, plain in zip((layer.keys, layer.values), expected, strict=True):
        torch.testing.assert_close(found, plain, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [{"programs": 1}, {"programs": 3, "block_rows": 32}])
def test_few_programs_fetch_all_rows(
    sizes: dict[str, int], device: torch.device, launched: list[str]
) -> None:
    layer, lane = Layer(2, 64, torch.float32, device), a_lane(1, 100, device)
    launched.clear()
    wanted(lane, range(200, 300), 3)
    num_missing = torch.tensor([[100]], dtype=torch.int32, device=device)
    layer.fetch(torch.tensor([lane.row(1, 1)], device=device), num_missing, **sizes)
    assert launched == ["_fetch_rows"]
    for found, plain in zip((layer.keys, layer.values), layer.expected([(lane, [100])]), strict=True):
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    layer, lane = Layer(3, 64, torch.float32, device), a_lane(1, 5, device)
    lanes = torch.tensor([lane.row(1, 1)], device=device)
    none = torch.zeros(1, 1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="2 sets of tokens for 3 heads"):
        layer.fetch(lanes, none.expand(1, 2).contiguous())
    with pytest.raises(ValueError, match="lanes is"):
        layer.fetch(lanes[:, 1:], none)
    layer.values = layer.values.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="values has strides"):
        layer.fetch(lanes, none)
    layer.scales = layer.scales[1:]
    with pytest.raises(ValueError, match="scales is"):
        layer.fetch(lanes, none)
    layer.packed = layer.packed[:, 1:]
    with pytest.raises(ValueError, match="rows is"):
        layer.fetch(lanes, none)
