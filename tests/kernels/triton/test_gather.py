import pytest
import torch

from aquifer.kernels.triton.gather import gather_slices, gather_slices_ref


@pytest.fixture
def host(device: torch.device) -> torch.Tensor:
    """Bytes in memory that the device can read by their address."""
    generator = torch.Generator().manual_seed(3)
    memory = torch.randint(0, 256, (40_000,), dtype=torch.uint8, generator=generator)
    return memory.pin_memory() if device.type == "cuda" else memory


@pytest.mark.parametrize("programs", [1, 3, 64])
@pytest.mark.parametrize("sizes", [[16], [4096, 16, 1040], [8192] * 3, [20_000, 512]])
def test_slices_land_in_their_places_and_nowhere_else(
    sizes: list[int], programs: int, host: torch.Tensor, device: torch.device, launched: list[str]
) -> None:
    first = -host.data_ptr() % 16
    starts = [first + 48 * i + sum(sizes[:i]) for i in range(len(sizes))]
    places = [32 * (len(sizes) - i) + sum(sizes[i + 1 :]) for i in range(len(sizes))]  # in reverse order
    slices = [host[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    found = torch.full((sum(sizes) + 32 * len(sizes) + 64,), 7, dtype=torch.uint8)
    expected = found.clone()
    gather_slices_ref(slices, places, expected)
    found = found.to(device)
    places.insert(1, 8)  # of a record that is not there
    gather_slices(
        torch.tensor([host.data_ptr(), 0, *[host.data_ptr()] * (len(sizes) - 1)]).to(device),
        torch.tensor([starts[0], 16, *starts[1:]], dtype=torch.int32).to(device),
        torch.tensor(places, dtype=torch.int32).to(device),
        torch.tensor([sizes[0], 48, *sizes[1:]], dtype=torch.int32).to(device),
        max(sizes),
        found,
        programs=programs,
        block_bytes=1024,
    )
    assert torch.equal(found.cpu(), expected)
    assert launched == ["_gather"]


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    number, wide = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int64)
    target = torch.zeros(64, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="records is"):
        gather_slices(number, number, number, number, 16, target)
    with pytest.raises(ValueError, match="sizes is"):
        gather_slices(wide.to(device), number, number, number.expand(2), 16, target)
