import pytest
import torch
from torch import Tensor

from aquifer.compression.aqua import load_quantizer
from aquifer.compression.landmarks import TokenCodec
from aquifer.compression.spec import KVSpec
from aquifer.kernels.triton.rows import fetch_rows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
if torch.cuda.is_available():
    TOLERANCE[torch.bfloat16] = 2e-2
UNTOUCHED = 7.0


class Layer:
    """One layer of 600 encoded tokens, and a pool of 300 slots."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(heads * head_dim)
        means = torch.randn(2, heads * head_dim, generator=generator)
        self.codec = TokenCodec(KVSpec(2, heads, head_dim, dtype, "{}"), means, device)
        keys, values = (torch.randn(600, heads, head_dim, generator=generator).to(device) for _ in "kv")
        encoded = self.codec.encode(1, keys + means[1].view(heads, head_dim).to(device), values)
        self.rows = encoded.rows.cpu()
        if device.type == "cuda":
            self.rows = self.rows.pin_memory()
        self.keys, self.values = (
            torch.full((heads, 300, head_dim), UNTOUCHED, dtype=dtype, device=device) for _ in "kv"
        )

    def fetch(self, tokens: Tensor, slots: Tensor, **sizes: int) -> None:
        device = self.keys.device
        grid, signs = load_quantizer(4, device).grid, self.codec._signs
        tokens, slots = tokens.to(device), slots.to(device)
        fetch_rows(
            self.rows, tokens, slots, grid, signs, self.codec.means[1], self.keys, self.values, **sizes
        )

    def expected(self, tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The pool after the plain code did the same."""
        heads, device = len(self.keys), self.keys.device
        keys, values = (torch.full_like(self.keys, UNTOUCHED) for _ in "kv")
        for head in range(heads):
            own = 0 if len(tokens) == 1 else head
            taken = slots[own] >= 0
            rows = self.rows[tokens[own][taken], head].to(device)
            where = slots[own][taken].to(device)
            number = torch.full((len(rows),), head, device=device)
            key, value = self.codec.decode_rows(1, number, rows)
            keys[head, where], values[head, where] = key.to(keys.dtype), value.to(values.dtype)
        return keys, values


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("heads", "head_dim", "count"), [(1, 64, 1), (3, 64, 7), (2, 128, 255)])
def test_fetched_rows_equal_their_twin(
    heads: int,
    head_dim: int,
    count: int,
    shared: bool,
    dtype: torch.dtype,
    device: torch.device,
    launched: list[str],
) -> None:
    layer = Layer(heads, head_dim, dtype, device)
    generator = torch.Generator().manual_seed(count)
    sets = range(1 if shared else heads)
    tokens = torch.stack([torch.randperm(600, generator=generator)[:count].sort().values for _ in sets])
    slots = torch.stack([torch.randperm(300, generator=generator)[:count] for _ in sets])
    slots[:, 1::3] = -1  # those are there already
    layer.fetch(tokens, slots)
    assert launched == ["_fetch_rows"]
    for found, expected in zip((layer.keys, layer.values), layer.expected(tokens, slots), strict=True):
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [{"programs": 1}, {"programs": 3, "block_rows": 32}])
def test_few_programs_fetch_all_rows(
    sizes: dict[str, int], device: torch.device, launched: list[str]
) -> None:
    layer = Layer(2, 64, torch.float32, device)
    tokens, slots = torch.arange(100, 200)[None], torch.arange(299, 199, -1)[None]
    layer.fetch(tokens, slots, **sizes)
    assert launched == ["_fetch_rows"]
    for found, expected in zip((layer.keys, layer.values), layer.expected(tokens, slots), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    layer = Layer(3, 64, torch.float32, device)
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="2 sets of tokens for 3 heads"):
        layer.fetch(tokens.expand(2, 5), tokens.expand(2, 5))
    with pytest.raises(ValueError, match="slots is"):
        layer.fetch(tokens, tokens[:, 1:])
    layer.values = layer.values.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="values has strides"):
        layer.fetch(tokens, tokens)
    layer.rows = layer.rows[:, :, 1:]
    with pytest.raises(ValueError, match="rows is"):
        layer.fetch(tokens, tokens)
