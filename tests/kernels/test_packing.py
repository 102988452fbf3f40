import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquifer.kernels.packing import INDEX_BITS, indices_per_unit, pack, unpack, word_values, words


@given(st.sampled_from(INDEX_BITS), st.integers(0, 17), st.integers(1, 23), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_unpacking_gives_the_indices_back(bits: int, tokens: int, units: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = units * indices_per_unit(bits)
    indices = torch.randint(0, 1 << bits, (tokens, count), generator=generator, dtype=torch.uint8)
    packed = pack(indices, bits)
    assert packed.shape == (tokens, count * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), indices)


@pytest.mark.parametrize("bits", INDEX_BITS)
def test_words_name_the_same_values_as_single_indices(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    grid = torch.randn(1 << bits, 2, generator=generator)
    indices = torch.randint(0, 1 << bits, (9, 24), generator=generator, dtype=torch.uint8)
    by_word = word_values(grid, bits)[words(pack(indices, bits), bits).long()].flatten(1)
    assert torch.equal(by_word, grid[indices.long()].flatten(1))


def test_rows_are_little_endian() -> None:
    four = torch.tensor([[1, 2]], dtype=torch.uint8)
    assert pack(four, 4).tolist() == [[0x21]]
    six = torch.tensor([[0b000001, 0b000010, 0b000011, 0b000100]], dtype=torch.uint8)
    whole = 0b000100_000011_000010_000001
    assert pack(six, 6).tolist() == [list(whole.to_bytes(3, "little"))]


def test_rows_that_do_not_fill_bytes_and_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill whole bytes"):
        pack(torch.zeros(2, 6, dtype=torch.uint8), 6)
    with pytest.raises(ValueError, match="not 5"):
        pack(torch.zeros(2, 8, dtype=torch.uint8), 5)
